"""LFM2 (Liquid AI 2025, arXiv:2511.23404): short convolutions and a few attention layers."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Taps
from zoo.pattern import spell

KINDS = {"short_conv": "conv", "attention": "full_attention"}


def read(fields: Fields) -> dict[str, Any]:
    head_dim = fields("head_dim", fields("hidden_size") // fields("num_attention_heads"))
    mixers = {
        "conv": {"kind": "short_conv", "conv_kernel": fields("conv_L_cache"), "bias": fields("conv_bias")},
        "full_attention": parts.attention(fields) | {"head_dim": head_dim, "qk_norm": True},
    }
    names = fields("layer_types")
    return {
        "norm": {"eps": fields("norm_eps")},
        "defaults": {"ffn": {"kind": "mlp", "intermediate_size": _width(fields)}},
        "blocks": {name: {"mixer": mixer} for name, mixer in mixers.items() if name in names},
        "pattern": spell(names),
    }


def _width(fields: Fields) -> int:
    """Of the feed-forward: of what a plain one would have, two thirds, for it has three matrices; rounded up."""
    width, adjust = fields("intermediate_size"), fields("block_auto_adjust_ff_dim")
    factor, multiple = fields("block_ffn_dim_multiplier"), fields("block_multiple_of")
    if not adjust:
        return int(width)
    return -(-int(factor * int(2 * width / 3)) // multiple) * multiple


def write(model: ZooConfig) -> dict[str, Any]:
    fields = {
        "layer_types": [KINDS[layer.mixer.kind] for layer in model.layers],
        "norm_eps": model.norm_config.eps,
        "intermediate_size": parts.first(model, "mlp").intermediate_size,
        "block_auto_adjust_ff_dim": False,
    }
    if parts.layers_with(model, "attention"):
        fields |= parts.attention_fields(parts.first(model, "attention"))
        for name in ("sliding_window", "attention_bias"):
            fields.pop(name)
    if parts.layers_with(model, "short_conv"):
        conv = parts.first(model, "short_conv")
        fields |= {"conv_L_cache": conv.conv_kernel, "conv_bias": conv.bias}
    return fields


FAMILY = Family(
    model_type="lfm2",
    model_class="Lfm2ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE | {"model.norm.weight": "model.embedding_norm.weight"},
    layer={"mixer_norm.weight": "operator_norm.weight", "ffn_norm.weight": "ffn_norm.weight"},
    blocks={
        "attention": parts.ATTENTION
        | {
            "o_proj.weight": "self_attn.out_proj.weight",
            "q_norm.weight": "self_attn.q_layernorm.weight",
            "k_norm.weight": "self_attn.k_layernorm.weight",
        },
        "short_conv": {
            "in_proj.*": "conv.in_proj.*",
            "conv.weight": Taps("conv.conv.weight"),
            "conv.bias": "conv.conv.bias",
            "out_proj.*": "conv.out_proj.*",
        },
        "mlp": {f"{ours}_proj.weight": f"feed_forward.w{n}.weight" for n, ours in enumerate(("gate", "down", "up"), 1)},
    },
    # Which layers attend is in layer_types too; the others are left from training.
    immaterial=("full_attn_idxs", "block_dim", "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale",
                "block_use_swiglu", "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init",
                "num_heads", "theta", "use_pos_enc"),
)  # fmt: skip
