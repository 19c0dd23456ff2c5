"""Ling 3.0 (inclusionAI 2026): Kimi Delta Attention with bounded decays, multi-head latent attention with a gate for
each head, experts as DeepSeek-V3 has them. (Ling 2.6 bears the same name with Lightning attention, which transformers
does not have: its fields are refused.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.blocks.kda import KDAConfig
from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Form, Names
from zoo.models.families.deepseek_v3 import MLA, MLA_NAMES
from zoo.models.families.kimi_linear import layer_fields, layers
from zoo.models.families.olmo_hybrid import conv

LATENT = {ours: theirs for ours, theirs in MLA.items() if ours != "q_lora_rank"}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("attention_dropout", 0, None)
    fields.only("tie_word_embeddings", False)  # transformers does not tie them whatever this says
    fields.only("num_key_value_heads", fields("num_attention_heads"))
    bound = fields("kda_lower_bound")
    kda = {
        "kind": "kda",
        "num_heads": fields("linear_num_heads"),
        "head_dim": fields("linear_head_dim"),
        "conv_kernel": fields("linear_conv_kernel_dim"),
        "low_rank": False,
        "lower_bound": float(bound) if fields("kda_safe_gate") else None,
    }
    rope = parts.rope(fields) | {"interleaved": True}
    mla = {"kind": "mla", "rope": rope, "output_gate": True} | {ours: fields(theirs) for ours, theirs in LATENT.items()}
    mixers = {"kda": kda, "mla": mla}
    return layers(fields, mixers)


def write(model: ZooConfig) -> dict[str, Any]:
    fields = layer_fields(model)
    if parts.layers_with(model, "kda"):
        kda = parts.first(model, "kda")
        fields |= {
            "linear_num_heads": kda.num_heads,
            "linear_head_dim": kda.head_dim,
            "linear_conv_kernel_dim": kda.conv_kernel,
            "kda_safe_gate": kda.lower_bound is not None,
            **({} if kda.lower_bound is None else {"kda_lower_bound": kda.lower_bound}),
        }
    if parts.layers_with(model, "mla"):
        mla = parts.first(model, "mla")
        fields |= {theirs: getattr(mla, ours) for ours, theirs in LATENT.items()}
        fields["num_key_value_heads"] = mla.num_heads
        fields["rope_parameters"] = parts.rope_fields(mla.rope, mla.qk_rope_head_dim)
    return fields


def attention(names: Names) -> Names:
    """Of a mixer, `attention` in the checkpoint, where o_proj is `dense`, and `self_attn` in the module."""

    def both(layouts: str | Form | Sequence[str | Form]) -> tuple[str | Form, str | Form]:
        released, module = (layouts, layouts) if isinstance(layouts, str | Form) else layouts
        return inside("attention", released, "dense"), inside("self_attn", module, "o_proj")

    def inside(place: str, layout: str | Form, output: str) -> str | Form:
        if isinstance(layout, str):
            return f"{place}.{layout.replace('o_proj', output)}"
        return layout.at(lambda name: f"{place}.{name}")

    return {ours: both(theirs) for ours, theirs in names.items()}


def kda_names(config: KDAConfig) -> Names:
    assert config.head_dim is not None, "resolve() fills it in"
    inner = config.num_heads * config.head_dim
    return attention(
        {f"{part}_proj.*": f"{part}_proj.*" for part in "qkvbo"}
        | {name: (name, f"forget_gate.{name}") for name in ("f_proj.weight", "A_log", "dt_bias")}
        | {"gate_proj.*": "g_proj.*", "conv.weight": conv(inner, inner), "norm_weight": "o_norm.weight"}
    )


FAMILY = Family(
    model_type="bailing_hybrid",
    model_class="BailingHybridForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "mla": attention(MLA_NAMES | {"gate_proj.*": "g_proj.*"}),
        "kda": kda_names,
        "mlp": parts.within("mlp", parts.MLP),
        "moe": parts.within("mlp", parts.GATED_EXPERTS)
        | {"router.correction_bias": ("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias")},
    },
    immaterial=(
        "head_dim", "qk_head_dim", "first_k_dense_replace", "layer_group_size", "short_conv_kernel_size", "rope_theta",
        "model_max_length", "num_nextn_predict_layers", "num_mtp_layers", "mtp_loss_scaling_factor",
    ),
    former={"model.word_embeddings.": "model.embed_tokens."},
    further_layers=True,
)  # fmt: skip
