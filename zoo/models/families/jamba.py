"""Jamba (Lieber et al. 2024, arXiv:2403.19887)."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, PerExpert
from zoo.models.families.mamba import MIXER
from zoo.pattern import spell


def read(fields: Fields) -> dict[str, Any]:
    fields.only("mamba_inner_layernorms", True, None)
    hidden = fields("hidden_size")
    experts = fields("num_experts")
    mixers = {
        "mamba": {
            "kind": "mamba",
            "intermediate_size": fields("mamba_expand") * hidden,
            "state_size": fields("mamba_d_state"),
            "conv_kernel": fields("mamba_d_conv"),
            "dt_rank": fields("mamba_dt_rank"),
            "inner_norms": True,
            "bias": fields("mamba_proj_bias"),
            "conv_bias": fields("mamba_conv_bias"),
        },
        "softmax": parts.attention(fields, rotary=False),
    }
    ffns = {"": parts.mlp(fields), "_moe": parts.experts(fields, "num_experts", renormalize=False)}
    period, offset = fields("attn_layer_period"), fields("attn_layer_offset")
    moe_period, moe_offset = fields("expert_layer_period"), fields("expert_layer_offset")
    names = []
    for i in range(fields("num_hidden_layers")):
        mixture = experts > 1 and i % moe_period == moe_offset
        names.append(("softmax" if i % period == offset else "mamba") + ("_moe" if mixture else ""))
    blocks = {m + f: {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns if m + f in names}
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    fields = {
        "rms_norm_eps": model.norm_config.eps,
        "intermediate_size": parts.first(model, "mlp" if parts.layers_with(model, "mlp") else "moe").intermediate_size,
        "num_experts": 1,
    }
    if parts.layers_with(model, "mamba"):
        mamba = parts.first(model, "mamba")
        fields |= {
            "mamba_expand": parts.expansion(mamba.intermediate_size, model),
            "mamba_d_state": mamba.state_size,
            "mamba_d_conv": mamba.conv_kernel,
            "mamba_dt_rank": mamba.dt_rank,
            "mamba_proj_bias": mamba.bias,
            "mamba_conv_bias": mamba.conv_bias,
        }
    never = {"period": model.num_hidden_layers + 1, "offset": model.num_hidden_layers}
    for name, kind in (("attn", "attention"), ("expert", "moe")):
        fields |= {f"{name}_layer_{key}": value for key, value in (_every(model, kind) or never).items()}
    if parts.layers_with(model, "attention"):
        attention = parts.first(model, "attention")
        fields |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
        }
    if parts.layers_with(model, "moe"):
        fields |= parts.expert_fields(parts.first(model, "moe"), "num_experts")
    return fields


def _every(model: ZooConfig, kind: str) -> dict[str, int] | None:
    """Period and offset of the layers of a kind, if the first two are repeated; None if there are none."""
    at = parts.layers_with(model, kind)
    if not at:
        return None
    period = at[1] - at[0] if len(at) > 1 else model.num_hidden_layers
    return {"period": period, "offset": at[0]}


FAMILY = Family(
    model_type="jamba",
    model_class="JambaForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE | {"model.norm.weight": "model.final_layernorm.weight"},
    layer={"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight"},
    blocks={
        "attention": parts.ATTENTION,
        "mamba": parts.within("mamba", MIXER)
        | {f"inner_norms.{i}.weight": f"mamba.{part}_layernorm.weight" for i, part in enumerate(("dt", "b", "c"))},
        "mlp": parts.within("feed_forward", parts.MLP),
        "moe": {
            "router.weight": "feed_forward.router.weight",
            "experts.gate_up_proj": (
                PerExpert(tuple(f"feed_forward.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up"))),
                "feed_forward.experts.gate_up_proj",
            ),
            "experts.down_proj": (
                PerExpert(("feed_forward.experts.{e}.down_proj.weight",)),
                "feed_forward.experts.down_proj",
            ),
        },
    },
    immaterial=("calc_logits_for_entire_prompt", "n_ctx", "num_logits_to_keep"),
)
