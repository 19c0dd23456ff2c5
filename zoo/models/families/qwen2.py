"""Qwen2, Qwen2.5 (Yang et al. 2024, arXiv:2407.10671, 2412.15115): Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    fields("use_sliding_window")  # without it the configuration has no sliding_window
    fields.only("use_mrope", False, None)  # of released configurations alone
    mixer = parts.attention(fields) | {"bias": True, "output_bias": False}
    return {"norm": {"eps": fields("rms_norm_eps")}} | parts.windowed(fields, mixer, parts.mlp(fields))


def write(model: ZooConfig) -> dict[str, Any]:
    fields = parts.attention_fields(parts.first(model, "attention")) | parts.window_fields(model)
    fields.pop("attention_bias")
    return fields | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "intermediate_size": parts.first(model, "mlp").intermediate_size,
        "rms_norm_eps": model.norm_config.eps,
    }


FAMILY = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
    immaterial=("max_window_layers",),  # layer_types says it
)
