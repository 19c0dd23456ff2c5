"""Hybrid Zoo: hybrid-architecture language models from one YAML file.

After `import zoo`, transformers' Auto classes and pipelines know the model type `zoo`.
"""

from zoo import ops
from zoo.blocks import register
from zoo.config import ConfigError, ZooConfig, load_config
from zoo.models import ZooForCausalLM, build

__all__ = ["ConfigError", "ZooConfig", "ZooForCausalLM", "build", "load_config", "ops", "register"]
