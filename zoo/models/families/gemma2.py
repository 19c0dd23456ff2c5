"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): alternating windows, capped logits, four norms a layer."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    fields.only("use_bidirectional_attention", False, None)
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    mixer = parts.attention(fields) | {
        "scale": fields("query_pre_attn_scalar") ** -0.5,
        "softcap": fields("attn_logit_softcapping"),
    }
    ffn = {"kind": "mlp", "intermediate_size": fields("intermediate_size"), "activation": "gelu_tanh"}
    return {
        "norm": {"eps": fields("rms_norm_eps"), "zero_centered": True},
        "residual": {"kind": "sandwich"},
        "embedding_scale": fields("hidden_size") ** 0.5,
        "logit_softcap": fields("final_logit_softcapping"),
    } | parts.windowed(fields, mixer, ffn)


def write(model: ZooConfig) -> dict[str, Any]:
    attention = parts.first(model, "attention")
    return (
        parts.attention_fields(attention)
        | parts.window_fields(model)
        | {
            "query_pre_attn_scalar": round(attention.scale**-2),
            "attn_logit_softcapping": attention.softcap,
            "final_logit_softcapping": model.logit_softcap,
            "intermediate_size": parts.first(model, "mlp").intermediate_size,
            "rms_norm_eps": model.norm_config.eps,
        }
    )


FAMILY = Family(
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer={
        "mixer_norm.weight": "input_layernorm.weight",
        "mixer_second_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "ffn_second_norm.weight": "post_feedforward_layernorm.weight",
    },
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
    # What released configurations hold beside; transformers goes by hidden_activation and sliding_window.
    immaterial=("hidden_act", "sliding_window_size", "cache_implementation"),
)
