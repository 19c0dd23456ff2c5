"""OLMo Hybrid (Merrill et al. 2026, arXiv:2604.03444): Gated DeltaNet three layers of four, with norms before its
sublayers; OLMo 3's attention in the fourth, with norms behind them and mostly without positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.gated_delta import GatedDeltaConfig
from zoo.config import Layer, ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Form, Names, Taps
from zoo.models.families.qwen3_next import KINDS, MIXERS, delta, delta_fields
from zoo.pattern import spell

NORM_EPS = 1e-5  # of Gated DeltaNet's output, whatever the model's own eps


@dataclass(frozen=True)
class TapsOfEach(Form):
    """The weights of several nn.Conv1d of one channel per group, `[channels, 1, kernel]`, with so many channels each;
    ours is one, `[channels, kernel]`."""

    parts: tuple[str, ...]
    channels: tuple[int, ...]

    def names(self) -> list[str]:
        return list(self.parts)

    def at(self, rename: Callable[[str], str], experts: int = 0) -> TapsOfEach:
        return replace(self, parts=tuple(rename(part) for part in self.parts))

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [torch.cat(list(theirs)).squeeze(1)]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours[0].unsqueeze(1).split(self.channels))


def conv(inner: int, v_inner: int) -> tuple[Form, Form]:
    """The layouts of the short convolution over queries, keys and values: the checkpoint's and the module's."""
    each = TapsOfEach(tuple(f"{part}_conv1d.weight" for part in "qkv"), (inner, inner, v_inner))
    return each, Taps("conv1d.weight")


def read(fields: Fields) -> dict[str, Any]:
    rotary = fields("rope_parameters", {}).get("rope_theta") is not None
    mixers = {
        "delta": delta(fields) | {"negative_eigenvalues": fields("linear_allow_neg_eigval"), "norm_eps": NORM_EPS},
        "softmax": parts.attention(fields, rotary) | {"qk_norm": "projection"},
    }
    residuals = {"delta": {"kind": "pre"}, "softmax": {"kind": "reordered"}}
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "defaults": {"ffn": parts.mlp(fields)},
        "blocks": {name: {"mixer": mixers[name], "residual": residuals[name]} for name in mixers},
        "pattern": spell([MIXERS[name] for name in fields("layer_types")]),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    mixer = parts.first(model, "gated_delta")
    attention = parts.attention_fields(parts.first(model, "attention"))
    attention.pop("sliding_window")
    attention.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": None})
    return (
        delta_fields(mixer)
        | attention
        | {
            "layer_types": [KINDS[layer.mixer.kind] for layer in model.layers],
            "linear_allow_neg_eigval": mixer.negative_eigenvalues,
            "intermediate_size": parts.first(model, "mlp").intermediate_size,
            "rms_norm_eps": model.norm_config.eps,
        }
    )


def layer_names(layer: Layer) -> Names:
    """The released checkpoint has names of its own for the norms before the sublayers, and transformers saves whatever
    it calls post_attention_layernorm under one of them."""
    behind = ("feedforward_layer_norm.weight", "post_attention_layernorm.weight")
    if layer.mixer.kind == "attention":
        return {
            "mixer_norm.weight": behind,
            "ffn_norm.weight": "post_feedforward_layernorm.weight",
        }
    return {
        "mixer_norm.weight": ("attention_layer_norm.weight", "input_layernorm.weight"),
        "ffn_norm.weight": behind,
    }


def delta_names(config: GatedDeltaConfig) -> Names:
    assert config.head_dim and config.num_v_heads and config.v_head_dim, "resolve() fills them in"
    return parts.within(
        "linear_attn",
        {f"{part}_proj.*": f"{part}_proj.*" for part in "qkvabo"}
        | {
            "gate_proj.*": "g_proj.*",
            "conv.weight": conv(config.num_heads * config.head_dim, config.num_v_heads * config.v_head_dim),
            "A_log": "A_log",
            "dt_bias": "dt_bias",
            "norm_weight": "o_norm.weight",
        },
    )


FAMILY = Family(
    model_type="olmo_hybrid",
    model_class="OlmoHybridForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=layer_names,
    blocks={
        "attention": parts.ATTENTION | {f"{part}_norm.*": f"self_attn.{part}_norm.*" for part in "qk"},
        "gated_delta": delta_names,
        "mlp": parts.within("mlp", parts.MLP),
    },
    immaterial=tuple(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")),
)
