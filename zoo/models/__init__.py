"""Decoder, cache and the transformers classes."""

from zoo.models.build import build, materialize
from zoo.models.cache import ZooCache
from zoo.models.modeling import ZooCausalLMOutput, ZooForCausalLM, ZooModel

__all__ = ["ZooCache", "ZooCausalLMOutput", "ZooForCausalLM", "ZooModel", "build", "materialize"]
