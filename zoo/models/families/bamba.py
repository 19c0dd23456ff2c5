"""Bamba (IBM, Princeton, CMU and UIUC 2024, huggingface.co/blog/bamba): Mamba-2 and a little attention."""

from __future__ import annotations

import math
from typing import Any

from zoo.blocks.mamba2 import Mamba2Config
from zoo.config import ZooConfig
from zoo.models.families import mamba2, parts
from zoo.models.families.base import Family, Fields
from zoo.pattern import spell

# Fields that Bamba's relatives have too, which change nothing here.
IMMATERIAL = ("mamba_chunk_size", "num_logits_to_keep", "mamba_expand", "mamba_dt_rank", "attn_rotary_emb")


def mixer(fields: Fields) -> dict[str, Any]:
    """`mixer:` of Mamba-2, as Bamba, Granite 4 and Falcon-H1 name its fields."""
    fields.only("hidden_act", "silu")
    least, most = fields("time_step_limit")
    return {
        "kind": "mamba2",
        "num_heads": fields("mamba_n_heads"),
        "head_dim": fields("mamba_d_head"),
        "state_size": fields("mamba_d_state"),
        "num_groups": fields("mamba_n_groups"),
        "conv_kernel": fields("mamba_d_conv"),
        "bias": fields("mamba_proj_bias"),
        "conv_bias": fields("mamba_conv_bias"),
        "dt_min": float(least),
        "dt_max": None if math.isinf(most) else float(most),
    }


def mixer_fields(config: Mamba2Config) -> dict[str, Any]:
    """The inverse of `mixer`, but for how wide it is."""
    return {
        "mamba_n_heads": config.num_heads,
        "mamba_d_head": config.head_dim,
        "mamba_d_state": config.state_size,
        "mamba_n_groups": config.num_groups,
        "mamba_d_conv": config.conv_kernel,
        "mamba_proj_bias": config.bias,
        "mamba_conv_bias": config.conv_bias,
        "time_step_limit": (config.dt_min, math.inf if config.dt_max is None else config.dt_max),
    }


def read(fields: Fields) -> dict[str, Any]:
    fields.only("z_loss_coefficient", 0.0, None)
    at = fields("attn_layer_indices", ())
    names = ["softmax" if i in at else "mamba2" for i in range(fields("num_hidden_layers"))]
    mixers = {"mamba2": mixer(fields), "softmax": parts.attention(fields, partial=True)}
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "defaults": {"ffn": parts.mlp(fields)},
        "blocks": {name: {"mixer": mixers[name]} for name in mixers if name in names},
        "pattern": spell(names),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    ffn = parts.first(model, "mlp")
    fields = {
        "rms_norm_eps": model.norm_config.eps,
        "intermediate_size": ffn.intermediate_size,
        "mlp_bias": ffn.bias,
        "attn_layer_indices": parts.layers_with(model, "attention"),
    }
    if parts.layers_with(model, "attention"):
        fields |= parts.attention_fields(parts.first(model, "attention"))
        fields.pop("sliding_window")
        if "rope_parameters" in fields:
            fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # there it is 0.5 by default
    return fields | mamba_fields(model)


def mamba_fields(model: ZooConfig) -> dict[str, Any]:
    """What a configuration says of the Mamba-2 layers, and without any a width that its checks accept."""
    if not parts.layers_with(model, "mamba2"):
        return {"mamba_n_heads": 1, "mamba_d_head": model.hidden_size, "mamba_expand": 1}
    config = parts.first(model, "mamba2")
    return mixer_fields(config) | {"mamba_expand": parts.expansion(config.num_heads * config.head_dim, model)}


FAMILY = Family(
    model_type="bamba",
    model_class="BambaForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE | {"model.norm.weight": "model.final_layernorm.weight"},
    layer={"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight"},
    blocks={
        "attention": parts.ATTENTION,
        "mamba2": parts.within("mamba", mamba2.MIXER),
        "mlp": parts.within("feed_forward", parts.MLP),
    },
    immaterial=IMMATERIAL,
)
