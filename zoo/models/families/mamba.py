"""Mamba (Gu and Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, FamilyError, Fields, Taps
from zoo.schema import shown

OUTSIDE = {
    # In the middle as mamba-ssm has it.
    "model.embed_tokens.weight": (
        "backbone.embeddings.weight",
        "backbone.embedding.weight",
        "backbone.embeddings.weight",
    ),
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


# mamba-ssm's `ssm_cfg` in transformers' fields: Mamba's, and of Mamba-2's those with the same names.
SSM = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}


def original(values: Mapping[str, Any]) -> dict[str, Any] | None:
    return from_mamba_ssm(values, "Mamba1", SSM | {"dt_rank": "time_step_rank"}, multiple=8)


def from_mamba_ssm(
    values: Mapping[str, Any], layer: str, names: Mapping[str, str], multiple: int
) -> dict[str, Any] | None:
    """The config.json of a model of mamba-ssm with such layers, in transformers' fields; None if it is of another.

    `multiple` is what the vocabulary is padded to by default.

    Raises:
        FamilyError: it has what transformers' family has not.
    """
    ssm = dict(values.get("ssm_cfg") or {})
    if not {"d_model", "n_layer", "vocab_size"} <= set(values) or ssm.pop("layer", "Mamba1") != layer:
        return None
    known = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "pad_vocab_size_multiple", "tie_embeddings"}
    needed = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
    free = {"residual_in_fp32", "fused_add_norm"}  # how it is computed
    for name, value in [*values.items(), *ssm.items()]:
        if name in needed and value != needed[name]:
            raise FamilyError(f"{layer}: {name} is {shown(value)}; supported is {shown(needed[name])}")
        if name not in known | free | set(needed) | set(names):
            raise FamilyError(f"{layer}: {name} is {shown(value)}, which is not supported")
    multiple = values.get("pad_vocab_size_multiple", multiple)
    return {
        "vocab_size": -(-values["vocab_size"] // multiple) * multiple,
        "hidden_size": values["d_model"],
        "num_hidden_layers": values["n_layer"],
        "tie_word_embeddings": values.get("tie_embeddings", True),
        **{theirs: ssm[name] for name, theirs in names.items() if name in ssm},
    }


def read(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    fields("expand")  # intermediate_size follows from it
    # What released configurations keep of mamba-ssm's.
    for name, value in {"d_model": fields("hidden_size"), "d_inner": fields("intermediate_size"),
                        "n_layer": fields("num_hidden_layers"), "rms_norm": True, "ssm_cfg": {}}.items():  # fmt: skip
        fields.only(name, value, None)
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
    original=original,
    immaterial=("fused_add_norm", "pad_vocab_size_multiple"),  # vocab_size is padded
)
