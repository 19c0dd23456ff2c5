"""Hybrid Zoo: hybrid-architecture language models from one YAML file.

After `import zoo`, transformers' Auto classes and pipelines know the model type `zoo`.
"""

from zoo import ops
from zoo.blocks import register
from zoo.config import ConfigError, ZooConfig, load_config
from zoo.models import ZooForCausalLM, build
from zoo.models.families.convert import from_hf, to_hf

__all__ = ["ConfigError", "ZooConfig", "ZooForCausalLM", "build", "from_hf", "load_config", "ops", "register", "to_hf"]
