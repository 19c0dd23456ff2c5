"""Mixtral (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    block = {"mixer": parts.attention(fields), "ffn": parts.experts(fields, "num_local_experts", renormalize=True)}
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "blocks": {"mixtral": block},
        "pattern": f"mixtral*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    attention = parts.attention_fields(parts.first(model, "attention"))
    attention.pop("attention_bias")
    experts = parts.expert_fields(parts.first(model, "moe"), "num_local_experts")
    return attention | experts | {"rms_norm_eps": model.norm_config.eps}


FAMILY = Family(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": parts.ATTENTION, "moe": parts.EXPERTS},
)
