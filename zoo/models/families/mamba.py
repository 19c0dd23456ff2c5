"""Mamba (Gu and Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Taps

OUTSIDE = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.norm.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {"mixer_norm.weight": "norm.weight"}
# Within the mixer, which has another name in every family.
MIXER = {
    "A_log": "A_log",
    "D": "D",
    "conv.weight": Taps("conv1d.weight"),
    "conv.bias": "conv1d.bias",
    "in_proj.*": "in_proj.*",
    "x_proj.*": "x_proj.*",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "out_proj.*": "out_proj.*",
}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    fields("expand")  # intermediate_size follows from it
    mixer = {
        "kind": "mamba",
        "intermediate_size": fields("intermediate_size"),
        "state_size": fields("state_size"),
        "conv_kernel": fields("conv_kernel"),
        "dt_rank": fields("time_step_rank"),
        "bias": fields("use_bias"),
        "conv_bias": fields("use_conv_bias"),
    }
    return {
        "norm": {"eps": fields("layer_norm_epsilon")},
        "blocks": {"mamba": {"mixer": mixer}},
        "pattern": f"mamba*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    mixer = parts.first(model, "mamba")
    return {
        "layer_norm_epsilon": model.norm_config.eps,
        "expand": parts.expansion(mixer.intermediate_size, model),
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_kernel,
        "time_step_rank": mixer.dt_rank,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }


FAMILY = Family(
    model_type="mamba",
    model_class="MambaForCausalLM",
    read=read,
    write=write,
    outside=OUTSIDE,
    layer=LAYER,
    blocks={"mamba": parts.within("mixer", MIXER)},
    prefix="backbone.layers.{i}.",
)
