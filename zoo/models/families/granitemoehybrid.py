"""Granite 4 (IBM 2025, huggingface.co/ibm-granite): Mamba-2 or attention in each layer, experts beside a shared MLP or
that MLP alone, and multipliers on embeddings, sublayers, attention and logits."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import bamba, mamba2, parts
from zoo.models.families.base import Family, Fields, Rows
from zoo.pattern import spell

MIXERS = {"linear_attention": "mamba2", "full_attention": "softmax"}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("normalization_function", "rmsnorm", None)
    fields.only("mlp_bias", False, None)
    rotary = fields.only("position_embedding_type", "rope", "nope", None) == "rope"
    fields("rope_parameters")  # there without a use for them too
    attention = parts.attention(fields, rotary) | {"scale": float(fields("attention_multiplier"))}
    mixers = {"mamba2": bamba.mixer(fields), "softmax": attention}
    shared = fields("shared_intermediate_size")
    moe = parts.experts(fields, "num_local_experts", renormalize=True)
    moe |= {"num_shared_experts": 1, "shared_intermediate_size": shared}
    scale = float(fields("residual_multiplier"))
    names = [MIXERS[name] for name in fields("layer_types")]
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "residual": {"kind": "pre", "mixer_scale": scale, "ffn_scale": scale},
        "embedding_scale": float(fields("embedding_multiplier")),
        "logit_scale": 1 / fields("logits_scaling"),
        "defaults": {"ffn": moe if moe["num_experts"] else {"kind": "mlp", "intermediate_size": shared}},
        "blocks": {name: {"mixer": mixers[name]} for name in mixers if name in names},
        "pattern": spell(names),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    kinds = {"mamba2": "linear_attention", "attention": "full_attention"}
    fields = {
        "layer_types": [kinds[layer.mixer.kind] for layer in model.layers],
        "rms_norm_eps": model.norm_config.eps,
        "residual_multiplier": model.layers[0].residual.mixer_scale,
        "embedding_multiplier": model.embedding_scale,
        "logits_scaling": parts.solve(lambda factor: 1 / factor, model.logit_scale, 1 / model.logit_scale),
        "num_local_experts": 0,
    }
    if parts.layers_with(model, "attention"):
        attention = parts.first(model, "attention")
        fields |= parts.attention_fields(attention) | {"attention_multiplier": attention.scale}
        fields["position_embedding_type"] = "nope" if attention.rope is None else "rope"
        fields.pop("sliding_window")
    if parts.layers_with(model, "moe"):
        moe = parts.first(model, "moe")
        fields |= parts.expert_fields(moe, "num_local_experts")
        fields["shared_intermediate_size"] = moe.shared_intermediate_size
    else:
        fields["shared_intermediate_size"] = parts.first(model, "mlp").intermediate_size
    return fields | bamba.mamba_fields(model)


# The gate's rows stand over those that it multiplies.
SHARED = {
    ("gate_proj.weight", "up_proj.weight"): Rows("shared_mlp.input_linear.weight"),
    "down_proj.weight": "shared_mlp.output_linear.weight",
}
EXPERTS = {
    "router.weight": ("router.layer.weight", "router.weight"),
    "experts.gate_up_proj": ("input_linear.weight", "experts.gate_up_proj"),
    "experts.down_proj": ("output_linear.weight", "experts.down_proj"),
}

FAMILY = Family(
    model_type="granitemoehybrid",
    model_class="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "attention": parts.ATTENTION,
        "mamba2": parts.within("mamba", mamba2.MIXER),
        "mlp": SHARED,
        "moe": parts.within("block_sparse_moe", EXPERTS)
        | {
            ("shared.gate_proj.weight", "shared.up_proj.weight"): SHARED["gate_proj.weight", "up_proj.weight"],
            "shared.down_proj.weight": SHARED["down_proj.weight"],
        },
    },
    immaterial=(*bamba.IMMATERIAL, "init_method"),
)
