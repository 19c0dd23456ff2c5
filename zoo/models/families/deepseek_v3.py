"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437), without its modules for the prediction of further tokens."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields
from zoo.pattern import spell

MLA = {"num_heads": "num_attention_heads", "bias": "attention_bias"} | {
    name: name for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("attention_dropout", 0, None)
    fields.only("num_key_value_heads", fields("num_attention_heads"))
    fields.only("scoring_func", "sigmoid", None)  # these four are of the authors' own code
    fields.only("topk_method", "noaux_tc", None)
    fields.only("moe_layer_freq", 1, None)
    fields.only("ep_size", 1, None)
    rope = parts.rope(fields) | {"interleaved": fields("rope_interleave")}
    mixer = {"kind": "mla", "rope": rope} | {ours: fields(theirs) for ours, theirs in MLA.items()}
    experts = parts.experts(fields, "n_routed_experts", fields("norm_topk_prob"), "moe_intermediate_size") | {
        "num_shared_experts": fields("n_shared_experts"),
        "router": parts.sigmoid_router(fields),
    }
    layers, dense = fields("num_hidden_layers"), fields("first_k_dense_replace")
    names = ["dense" if i < dense else "moe" for i in range(layers)]
    ffns = {"dense": parts.mlp(fields), "moe": experts}
    blocks = {
        name: {"mixer": {"kind": "mla", "rope": rope} | mixer, "ffn": ffns[name]} for name in dict.fromkeys(names)
    }
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    mixer = parts.first(model, "mla")
    fields = {theirs: getattr(mixer, ours) for ours, theirs in MLA.items()} | {
        "num_key_value_heads": mixer.num_heads,
        "rope_parameters": parts.rope_fields(mixer.rope, mixer.qk_rope_head_dim),
        "rope_interleave": mixer.rope.interleaved,
        "rms_norm_eps": model.norm_config.eps,
        "first_k_dense_replace": len(parts.layers_with(model, "mlp")),
        "num_nextn_predict_layers": 0,
    }
    if parts.layers_with(model, "mlp"):
        fields["intermediate_size"] = parts.first(model, "mlp").intermediate_size
    if parts.layers_with(model, "moe"):
        moe = parts.first(model, "moe")
        fields |= parts.expert_fields(moe, "n_routed_experts", "moe_intermediate_size")
        fields |= parts.sigmoid_router_fields(moe)
        fields |= {"n_shared_experts": moe.num_shared_experts, "norm_topk_prob": moe.renormalize}
    return fields


MLA_NAMES = {
    "q_proj.*": "q_proj.*",
    "q_a_proj.*": "q_a_proj.*",
    "q_a_norm.*": "q_a_layernorm.*",
    "q_b_proj.*": "q_b_proj.*",
    "kv_a_proj.*": "kv_a_proj_with_mqa.*",
    "kv_a_norm.*": "kv_a_layernorm.*",
    "kv_b_proj.*": "kv_b_proj.*",
    "o_proj.*": "o_proj.*",
}

FAMILY = Family(
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "mla": parts.within("self_attn", MLA_NAMES),
        "mlp": parts.within("mlp", parts.MLP),
        "moe": parts.within("mlp", parts.GATED_EXPERTS),
    },
    immaterial=("head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux"),
    further_layers=True,
)
