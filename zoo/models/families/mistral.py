"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a window."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "blocks": {"mistral": {"mixer": parts.attention(fields), "ffn": parts.mlp(fields)}},
        "pattern": f"mistral*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    fields = parts.attention_fields(parts.first(model, "attention"))
    fields.pop("attention_bias")
    return fields | {
        "intermediate_size": parts.first(model, "mlp").intermediate_size,
        "rms_norm_eps": model.norm_config.eps,
    }


FAMILY = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
)
