"""gpt-oss (OpenAI 2025, arXiv:2508.10925), its experts in bfloat16 or wider, not in MXFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Same
from zoo.pattern import spell

TYPES = {"sliding_attention": "sliding", "full_attention": "full"}


@dataclass(frozen=True)
class Columns(Same):
    """The experts' weights `[experts, in, out]`; ours are `[experts, out, in]`."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [theirs[0].mT.contiguous()]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0].mT.contiguous()]


@dataclass(frozen=True)
class AlternateRows(Same):
    """Gate and up in turn along dimension 1; ours has all of the gate first."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [torch.cat([theirs[0][:, ::2], theirs[0][:, 1::2]], 1)]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(ours[0].chunk(2, 1), 2).flatten(1, 2)]


@dataclass(frozen=True)
class AlternateColumns(AlternateRows):
    """Both of these."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return super().join([theirs[0].mT], shapes)

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [super().split(ours)[0].mT.contiguous()]


def read(fields: Fields) -> dict[str, Any]:
    fields.only("experts_per_token", fields("num_experts_per_tok"), None)  # released configurations say it twice
    attention = parts.attention(fields) | {"sink_logits": True}
    mixers = {"sliding": attention, "full": attention | {"window": None}}
    experts = parts.experts(fields, "num_local_experts", renormalize=True)
    experts["router"]["bias"] = True
    experts |= {"bias": True, **{f"swiglu_{name}": float(fields(f"swiglu_{name}")) for name in ("limit", "alpha")}}
    names = [TYPES[name] for name in fields("layer_types")]
    blocks = {name: {"mixer": mixers[name], "ffn": experts} for name in dict.fromkeys(names)}
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    windows = [layer.mixer.config.window for layer in model.layers]
    moe = parts.first(model, "moe")
    return (
        parts.attention_fields(parts.first(model, "attention"))
        | parts.expert_fields(moe, "num_local_experts")
        | {
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
            # It wants one even where nothing slides.
            "sliding_window": next((window for window in windows if window is not None), 128),
            "rms_norm_eps": model.norm_config.eps,
            "swiglu_limit": moe.swiglu_limit,
            "swiglu_alpha": moe.swiglu_alpha,
        }
    )


FAMILY = Family(
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "attention": parts.ATTENTION | {"sinks.weight": "self_attn.sinks"},
        "moe": {
            "router.*": "mlp.router.*",
            "experts.gate_up_proj": AlternateColumns("mlp.experts.gate_up_proj"),
            "experts.gate_up_proj_bias": AlternateRows("mlp.experts.gate_up_proj_bias"),
            "experts.down_proj": Columns("mlp.experts.down_proj"),
            "experts.down_proj_bias": "mlp.experts.down_proj_bias",
        },
    },
    immaterial=("initial_context_length",),
)
