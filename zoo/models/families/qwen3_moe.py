"""Qwen3 with experts (Yang et al. 2025, arXiv:2505.09388, section 2)."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields
from zoo.pattern import spell


def read(fields: Fields) -> dict[str, Any]:
    fields("use_sliding_window")  # the configuration has no sliding_window without it
    fields.only("use_qk_norm", True, None)  # these three are of released configurations alone
    fields.only("qkv_bias", False, None)
    fields.only("shared_expert_intermediate_size", 0, None)
    mixer = parts.attention(fields) | {"qk_norm": True}
    experts = parts.experts(fields, "num_local_experts", fields("norm_topk_prob"), "moe_intermediate_size")
    dense, step = fields("mlp_only_layers"), fields("decoder_sparse_step")
    layers = range(fields("num_hidden_layers"))
    names = ["dense" if i in dense or (i + 1) % step or not experts["num_experts"] else "moe" for i in layers]
    ffns = {"dense": parts.mlp(fields), "moe": experts}
    blocks = {name: {"mixer": mixer, "ffn": ffns[name]} for name in ffns if name in names}
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    attention = parts.first(model, "attention")
    fields = parts.attention_fields(attention) | {
        "use_sliding_window": attention.window is not None,
        "rms_norm_eps": model.norm_config.eps,
        "mlp_only_layers": parts.layers_with(model, "mlp"),
    }
    if parts.layers_with(model, "moe"):
        moe = parts.first(model, "moe")
        fields |= parts.expert_fields(moe, "num_local_experts", "moe_intermediate_size")
        fields["norm_topk_prob"] = moe.renormalize
    if parts.layers_with(model, "mlp"):
        fields["intermediate_size"] = parts.first(model, "mlp").intermediate_size
    return fields


FAMILY = Family(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "attention": parts.ATTENTION | {f"{part}_norm.*": f"self_attn.{part}_norm.*" for part in "qk"},
        "mlp": parts.within("mlp", parts.MLP),
        "moe": parts.within("mlp", parts.GATED_EXPERTS),
    },
    immaterial=("max_window_layers",),
)
