"""Kimi Linear (Moonshot AI 2025, arXiv:2510.26692): Kimi Delta Attention in three layers of four, multi-head latent
attention without positions in the fourth, experts as DeepSeek-V3 has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.kda import KDAConfig
from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, FamilyError, Fields, Names, PerExpert, Same
from zoo.models.families.deepseek_v3 import MLA, MLA_NAMES
from zoo.models.families.olmo_hybrid import conv
from zoo.pattern import spell

MIXERS = {"linear_attention": "kda", "full_attention": "mla"}
KINDS = {kind: name for name, kind in MIXERS.items()}
FFNS = {"dense": "_dense", "sparse": ""}
# Of `linear_attn_config`, from which the configuration's class takes what it holds.
LINEAR = {"head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers"}


@dataclass(frozen=True)
class Rates(Same):
    """One number per head, `[1, 1, heads, 1]` there."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [theirs[0].flatten()]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0].view(1, 1, -1, 1)]


def read(fields: Fields) -> dict[str, Any]:
    fields.only("attention_dropout", 0, None)
    fields.only("tie_word_embeddings", False)  # transformers does not tie them whatever this says
    fields.only("num_key_value_heads", fields("num_attention_heads"))
    fields.only("mla_use_nope", True, None)  # these six are of the authors' own code
    fields.only("moe_router_activation_func", "sigmoid", None)
    fields.only("topk_method", "noaux_tc", None)
    fields.only("use_grouped_topk", True, None)
    fields.only("moe_layer_freq", 1, None)
    for name, value in fields("linear_attn_config", {}).items():
        if name not in LINEAR:
            raise FamilyError(f"kimi_linear: linear_attn_config.{name} is {value!r}, which is not supported")
    kda = {
        "kind": "kda",
        "num_heads": fields("linear_num_heads"),
        "head_dim": fields("linear_head_dim"),
        "conv_kernel": fields("linear_conv_kernel_dim"),
    }
    mixers = {"kda": kda, "mla": {"kind": "mla", "rope": None} | {ours: fields(theirs) for ours, theirs in MLA.items()}}
    return layers(fields, mixers)


def layers(fields: Fields, mixers: dict[str, Any]) -> dict[str, Any]:
    """Norm, blocks and pattern of a model whose layers have one of `mixers` each, and experts or an MLP."""
    experts = parts.experts(fields, "num_experts", fields("norm_topk_prob"), "moe_intermediate_size")
    routed = {"num_shared_experts": fields("n_shared_experts"), "router": parts.sigmoid_router(fields)}
    ffns = {"": experts | routed, "_dense": parts.mlp(fields)}
    types = zip(fields("layer_types"), fields("mlp_layer_types"), strict=True)
    names = [MIXERS[mixer] + FFNS[ffn] for mixer, ffn in types]
    blocks = {m + f: {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns if m + f in names}
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    fields = layer_fields(model)
    if parts.layers_with(model, "kda"):
        kda = parts.first(model, "kda")
        fields |= {
            "linear_num_heads": kda.num_heads,
            "linear_head_dim": kda.head_dim,
            "linear_conv_kernel_dim": kda.conv_kernel,
        }
    if parts.layers_with(model, "mla"):
        mla = parts.first(model, "mla")
        fields |= {theirs: getattr(mla, ours) for ours, theirs in MLA.items()} | {"num_key_value_heads": mla.num_heads}
    return fields


def layer_fields(model: ZooConfig) -> dict[str, Any]:
    """The inverse of `layers`."""
    fields = {
        "rms_norm_eps": model.norm_config.eps,
        "layer_types": [KINDS[layer.mixer.kind] for layer in model.layers],
        "mlp_layer_types": ["sparse" if layer.ffn.kind == "moe" else "dense" for layer in model.layers],
    }
    if parts.layers_with(model, "moe"):
        moe = parts.first(model, "moe")
        fields |= parts.expert_fields(moe, "num_local_experts", "moe_intermediate_size")
        fields |= parts.sigmoid_router_fields(moe)
        fields |= {"n_shared_experts": moe.num_shared_experts, "norm_topk_prob": moe.renormalize}
    if parts.layers_with(model, "mlp"):
        fields["intermediate_size"] = parts.first(model, "mlp").intermediate_size
    return fields


def kda_names(config: KDAConfig) -> Names:
    assert config.head_dim is not None, "resolve() fills it in"
    inner = config.num_heads * config.head_dim
    return parts.within(
        "self_attn",
        {f"{part}_proj.*": f"{part}_proj.*" for part in "qkvbo"}
        | {f"gate_{part}_proj.*": f"g_{part}_proj.*" for part in "ab"}
        | {f"f_{part}_proj.*": (f"f_{part}_proj.*", f"forget_gate.f_{part}_proj.*") for part in "ab"}
        | {
            "conv.weight": conv(inner, inner),
            "A_log": (Rates("A_log"), Rates("forget_gate.A_log")),
            "dt_bias": ("dt_bias", "forget_gate.dt_bias"),
            "norm_weight": "o_norm.weight",
        },
    )


def either(names: Names) -> Names:
    """Of a feed-forward: in the checkpoint experts stand in `block_sparse_moe`, and transformers saves what is dense
    there too."""
    given = {ours: theirs for ours, theirs in names.items() if isinstance(theirs, str)}
    return {ours: (f"block_sparse_moe.{theirs}", f"mlp.{theirs}") for ours, theirs in given.items()}


EXPERTS = either({name: their for name, their in parts.GATED_EXPERTS.items() if not name.startswith("experts.")}) | {
    "experts.gate_up_proj": (
        PerExpert(("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight")),
        "mlp.experts.gate_up_proj",
    ),
    "experts.down_proj": (PerExpert(("block_sparse_moe.experts.{e}.w2.weight",)), "mlp.experts.down_proj"),
}

FAMILY = Family(
    model_type="kimi_linear",
    model_class="KimiLinearForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "mla": parts.within("self_attn", MLA_NAMES),
        "kda": kda_names,
        "mlp": either(parts.MLP),
        "moe": EXPERTS,
    },
    immaterial=(
        "head_dim", "qk_head_dim", "first_k_dense_replace", "model_max_length", "rope_theta", "rope_scaling",
        "rope_parameters", "num_nextn_predict_layers",
    ),
)  # fmt: skip
