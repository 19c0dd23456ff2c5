"""Qwen3-Next (Qwen team 2025): Gated DeltaNet in three layers of four, gated attention in the fourth, small experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.attention import AttentionConfig
from zoo.blocks.gated_delta import GatedDeltaConfig
from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Names, Same, Taps
from zoo.pattern import spell

MIXERS = {"linear_attention": "delta", "full_attention": "softmax"}
KINDS = {"gated_delta": "linear_attention", "attention": "full_attention"}


@dataclass(frozen=True)
class HeadByHead(Same):
    """One tensor: of each head in turn, the rows of each of ours one under the other."""

    heads: int

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        rows = [shape[0] // self.heads for shape in shapes]
        return [part.flatten(0, 1) for part in theirs[0].unflatten(0, (self.heads, -1)).split(rows, 1)]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.unflatten(0, (self.heads, -1)) for tensor in ours], 1).flatten(0, 1)]


def delta(fields: Fields) -> dict[str, Any]:
    """`mixer:` of Gated DeltaNet."""
    return {
        "kind": "gated_delta",
        "num_heads": fields("linear_num_key_heads"),
        "num_v_heads": fields("linear_num_value_heads"),
        "head_dim": fields("linear_key_head_dim"),
        "v_head_dim": fields("linear_value_head_dim"),
        "conv_kernel": fields("linear_conv_kernel_dim"),
    }


def delta_fields(config: GatedDeltaConfig) -> dict[str, Any]:
    """The inverse of `delta`."""
    return {
        "linear_num_key_heads": config.num_heads,
        "linear_num_value_heads": config.num_v_heads,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.v_head_dim,
        "linear_conv_kernel_dim": config.conv_kernel,
    }


def read(fields: Fields) -> dict[str, Any]:
    fields.only("use_sliding_window", False, None)  # in released configurations; transformers has no window here
    experts = parts.experts(fields, "num_experts", fields("norm_topk_prob"), "moe_intermediate_size")
    shared = {"num_shared_experts": 1, "shared_intermediate_size": fields("shared_expert_intermediate_size")}
    ffns = {"": experts | shared | {"shared_gate": True}, "_dense": parts.mlp(fields)}
    mixers = {
        "delta": delta(fields),
        "softmax": parts.attention(fields, partial=True) | {"qk_norm": True, "output_gate": True},
    }
    dense, step = fields("mlp_only_layers"), fields("decoder_sparse_step")
    names = []
    for i, name in enumerate(fields("layer_types")):
        mixture = i not in dense and experts["num_experts"] > 0 and (i + 1) % step == 0
        names.append(MIXERS[name] + ("" if mixture else "_dense"))
    blocks = {m + f: {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns if m + f in names}
    norm = {"eps": fields("rms_norm_eps"), "zero_centered": True}
    return {"norm": norm, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    fields = {
        "rms_norm_eps": model.norm_config.eps,
        "layer_types": [KINDS[layer.mixer.kind] for layer in model.layers],
        "mlp_only_layers": parts.layers_with(model, "mlp"),
    }
    if parts.layers_with(model, "gated_delta"):
        fields |= delta_fields(parts.first(model, "gated_delta"))
    if parts.layers_with(model, "attention"):
        fields |= parts.attention_fields(parts.first(model, "attention"))
        fields.pop("sliding_window")
        fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # there it is 0.25 by default
    if parts.layers_with(model, "moe"):
        moe = parts.first(model, "moe")
        fields |= parts.expert_fields(moe, "num_experts", "moe_intermediate_size")
        fields |= {"norm_topk_prob": moe.renormalize, "shared_expert_intermediate_size": moe.shared_intermediate_size}
    if parts.layers_with(model, "mlp"):
        fields["intermediate_size"] = parts.first(model, "mlp").intermediate_size
    return fields


def attention_names(config: AttentionConfig) -> Names:
    """Each head's queries are followed by its gate."""
    names = {ours: theirs for ours, theirs in parts.ATTENTION.items() if ours != "q_proj.*"}
    both = HeadByHead("self_attn.q_proj.*", config.num_heads)
    norms = {f"{part}_norm.*": f"self_attn.{part}_norm.*" for part in "qk"}
    return {("q_proj.*", "gate_proj.*"): both, **names, **norms}


def delta_names(config: GatedDeltaConfig) -> Names:
    heads = config.num_heads
    return parts.within(
        "linear_attn",
        {
            ("q_proj.*", "k_proj.*", "v_proj.*", "gate_proj.*"): HeadByHead("in_proj_qkvz.*", heads),
            ("b_proj.*", "a_proj.*"): HeadByHead("in_proj_ba.*", heads),
            "conv.weight": Taps("conv1d.weight"),
            "A_log": "A_log",
            "dt_bias": "dt_bias",
            "norm_weight": "norm.weight",
            "o_proj.*": "out_proj.*",
        },
    )


EXPERTS = {ours: theirs for ours, theirs in parts.GATED_EXPERTS.items() if not ours.startswith("shared.")} | {
    **{f"shared.{part}_proj.*": f"shared_expert.{part}_proj.*" for part in ("gate", "up", "down")},
    "shared_gate.*": "shared_expert_gate.*",
}

FAMILY = Family(
    model_type="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "attention": attention_names,
        "gated_delta": delta_names,
        "mlp": parts.within("mlp", parts.MLP),
        "moe": parts.within("mlp", EXPERTS),
    },
    beside=("mtp.",),
    immaterial=("full_attention_interval",),
)
