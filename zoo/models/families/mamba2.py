"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, FamilyError, Fields, Taps
from zoo.models.families.mamba import LAYER, OUTSIDE, SSM, from_mamba_ssm

MIXER = {
    "A_log": "A_log",
    "D": "D",
    "dt_bias": "dt_bias",
    "conv.weight": Taps("conv1d.weight"),
    "conv.bias": "conv1d.bias",
    "in_proj.*": "in_proj.*",
    "norm_weight": "norm.weight",
    "out_proj.*": "out_proj.*",
}


def original(values: Mapping[str, Any]) -> dict[str, Any] | None:
    fields = from_mamba_ssm(values, "Mamba2", SSM | {"headdim": "head_dim", "ngroups": "n_groups"}, multiple=16)
    if fields is None:
        return None
    fields = {"state_size": 128, "head_dim": 64, "n_groups": 1, "expand": 2} | fields
    return fields | {"num_heads": fields["expand"] * fields["hidden_size"] // fields["head_dim"]}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    fields.only("rms_norm", True, None)
    inner = int(fields("expand") * fields("hidden_size"))
    if inner != fields("num_heads") * fields("head_dim"):
        raise FamilyError(f"mamba2: expand * hidden_size is {inner}; it must be num_heads * head_dim")
    fields.only("intermediate_size", inner, None)  # released configurations say it twice
    least, most = fields("time_step_limit")
    mixer = {
        "kind": "mamba2",
        "num_heads": fields("num_heads"),
        "head_dim": fields("head_dim"),
        "state_size": fields("state_size"),
        "num_groups": fields("n_groups"),
        "conv_kernel": fields("conv_kernel"),
        "bias": fields("use_bias"),
        "conv_bias": fields("use_conv_bias"),
        "dt_min": float(least),
        "dt_max": None if math.isinf(most) else float(most),
    }
    return {
        "norm": {"eps": fields("layer_norm_epsilon")},
        "blocks": {"mamba2": {"mixer": mixer}},
        "pattern": f"mamba2*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    mixer = parts.first(model, "mamba2")
    return {
        "layer_norm_epsilon": model.norm_config.eps,
        "expand": parts.expansion(mixer.num_heads * mixer.head_dim, model),
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_size,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_kernel,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "time_step_limit": (mixer.dt_min, math.inf if mixer.dt_max is None else mixer.dt_max),
    }


def bounded_below(model: ZooConfig) -> tuple[str, ...]:
    """The note of families for which transformers takes `time_step_min`, about initial values, as a bound."""
    found = {layer.name: layer.mixer.config.dt_min for layer in model.layers if layer.mixer.kind == "mamba2"}
    bounded = {name: least for name, least in found.items() if least > 0}
    if not bounded:
        return ()
    free = " ".join(f"--override blocks.{name}.mixer.dt_min=0" for name in bounded)
    return (f"step sizes are at least {min(bounded.values())}, as transformers has it, which takes time_step_min for a "
            f"bound; without: {free}",)  # fmt: skip


FAMILY = Family(
    model_type="mamba2",
    model_class="Mamba2ForCausalLM",
    read=read,
    write=write,
    outside=OUTSIDE,
    layer=LAYER,
    blocks={"mamba2": parts.within("mixer", MIXER)},
    prefix="backbone.layers.{i}.",
    original=original,
    immaterial=("norm_before_gate",),  # the gate comes first whatever it says
)
