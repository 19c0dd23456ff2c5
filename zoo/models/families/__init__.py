"""Published architectures: each file maps one family of transformers to a model file and back, as data."""

from importlib import import_module

from zoo.models.families.base import Family, FamilyError

# In the order in which a model is tried as one of them: the plainer before those that contain it.
_NAMES = (
    # of this library's own two styles, and their parts
    "minimax",
    "minimax_text_01",
    "jamba",
    "mamba2",
    "mamba",
    "mixtral",
    "llama",
    # attention
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "gemma2",
    "smollm3",
    "phi3",
    # experts
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    # delta rules
    "qwen3_next",
    "olmo_hybrid",
    "kimi_linear",
    # Mamba-2 beside attention
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "falcon_h1",
    # other recurrences
    "lfm2",
    "recurrent_gemma",
    "zamba2",
    "bailing_hybrid",
)
FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in _NAMES}

__all__ = ["FAMILIES", "Family", "FamilyError"]
