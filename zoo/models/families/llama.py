"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "blocks": {"llama": {"mixer": parts.attention(fields), "ffn": parts.mlp(fields)}},
        "pattern": f"llama*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    ffn = parts.first(model, "mlp")
    return parts.attention_fields(parts.first(model, "attention")) | {
        "intermediate_size": ffn.intermediate_size,
        "mlp_bias": ffn.bias,
        "rms_norm_eps": model.norm_config.eps,
    }


FAMILY = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
    immaterial=("is_llama_config", "max_sequence_length"),  # of released configurations alone
)
