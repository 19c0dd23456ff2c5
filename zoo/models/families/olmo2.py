"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms behind the sublayers, and over whole queries and keys."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    block = {"mixer": parts.attention(fields) | {"qk_norm": "projection"}, "ffn": parts.mlp(fields)}
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "residual": {"kind": "reordered"},
        "blocks": {"olmo2": block},
        "pattern": f"olmo2*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    fields = parts.attention_fields(parts.first(model, "attention"))
    fields.pop("sliding_window")
    return fields | {
        "intermediate_size": parts.first(model, "mlp").intermediate_size,
        "rms_norm_eps": model.norm_config.eps,
    }


FAMILY = Family(
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer={
        "mixer_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "post_feedforward_layernorm.weight",
    },
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
)
