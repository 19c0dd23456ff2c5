"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219): Llama with fused projections and LongRoPE."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Rows

ATTENTION = {
    ("q_proj.*", "k_proj.*", "v_proj.*"): Rows("self_attn.qkv_proj.*"),
    "o_proj.*": "self_attn.o_proj.*",
}
MLP = {("gate_proj.*", "up_proj.*"): Rows("gate_up_proj.*"), "down_proj.*": "down_proj.*"}


def read(fields: Fields) -> dict[str, Any]:
    for name in ("resid_pdrop", "embd_pdrop"):
        fields.only(name, 0, None)
    # These are of released configurations alone: those of Phi-3, and of Phi-4-mini.
    for name, value in {
        "attention_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }.items():
        fields.only(name, value, None)
    turning = fields("rope_parameters").get("partial_rotary_factor", 1.0)
    fields.only("partial_rotary_factor", turning, None)  # its place before
    fields("original_max_position_embeddings")  # rope_parameters has it where it counts
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "blocks": {"phi3": {"mixer": parts.attention(fields, partial=True), "ffn": parts.mlp(fields)}},
        "pattern": f"phi3*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    attention = parts.first(model, "attention")
    fields = parts.attention_fields(attention)
    fields.pop("attention_bias")
    if attention.rope.type == "longrope":
        context = attention.rope.original_max_position_embeddings
        fields["original_max_position_embeddings"] = context
        fields["max_position_embeddings"] = round(context * attention.rope.factor)
    return fields | {
        "intermediate_size": parts.first(model, "mlp").intermediate_size,
        "rms_norm_eps": model.norm_config.eps,
    }


FAMILY = Family(
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": ATTENTION, "mlp": parts.within("mlp", MLP)},
)
