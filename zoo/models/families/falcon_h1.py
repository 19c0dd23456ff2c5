"""Falcon-H1 (TII 2025, arXiv:2507.22448): attention and Mamba-2 side by side in every layer, and multipliers from
maximal update parametrisation on nearly everything."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import bamba, mamba2, parts
from zoo.models.families.base import Family, Fields

ONES = [1.0] * 5


def read(fields: Fields) -> dict[str, Any]:
    fields.only("mamba_use_mlp", True, None)
    fields.only("projectors_bias", fields("mamba_proj_bias"))
    fields("mamba_d_ssm")  # as wide as its heads together, says the configuration's own check
    norm = "norm_first" if fields("mamba_norm_before_gate") else "gate_first"
    multipliers = [float(each) for each in fields("ssm_multipliers")]
    mamba = bamba.mixer(fields) | {
        "norm": norm if fields("mamba_rms_norm") else "none",
        "multipliers": None if multipliers == ONES else multipliers,
    }
    attention = parts.attention(fields)
    attention["scale"] = fields("key_multiplier") * attention["head_dim"] ** -0.5
    mixer = {
        "kind": "parallel",
        "branches": [mamba, attention],
        "input_scales": [float(fields(f"{name}_in_multiplier")) for name in ("ssm", "attention")],
        "output_scales": [float(fields(f"{name}_out_multiplier")) for name in ("ssm", "attention")],
    }
    gate, down = fields("mlp_multipliers")
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "residual": {"kind": "pre", "ffn_scale": float(down)},
        "embedding_scale": float(fields("embedding_multiplier")),
        "logit_scale": float(fields("lm_head_multiplier")),
        "blocks": {"falcon": {"mixer": mixer, "ffn": parts.mlp(fields) | {"gate_scale": float(gate)}}},
        "pattern": f"falcon*{fields('num_hidden_layers')}",
    }


def write(model: ZooConfig) -> dict[str, Any]:
    mixer, ffn = parts.first(model, "parallel"), parts.first(model, "mlp")
    mamba, attention = (branch.config for branch in mixer.branches)
    root = attention.head_dim**-0.5
    fields = parts.attention_fields(attention) | {
        **bamba.mixer_fields(mamba),
        "mamba_d_ssm": mamba.num_heads * mamba.head_dim,
        "projectors_bias": mamba.bias,
        "mamba_rms_norm": mamba.norm != "none",
        "mamba_norm_before_gate": mamba.norm == "norm_first",
        "ssm_multipliers": mamba.multipliers or ONES,
        "key_multiplier": parts.solve(lambda factor: factor * root, attention.scale, attention.scale / root),
        "embedding_multiplier": model.embedding_scale,
        "lm_head_multiplier": model.logit_scale,
        "mlp_multipliers": [ffn.gate_scale, model.layers[0].residual.ffn_scale],
        "intermediate_size": ffn.intermediate_size,
        "mlp_bias": ffn.bias,
        "rms_norm_eps": model.norm_config.eps,
    }
    for i, name in enumerate(("ssm", "attention")):
        fields[f"{name}_in_multiplier"] = mixer.input_scales[i]
        fields[f"{name}_out_multiplier"] = mixer.output_scales[i]
    return fields


BRANCHES = (parts.within("mamba", mamba2.MIXER), parts.ATTENTION)

FAMILY = Family(
    model_type="falcon_h1",
    model_class="FalconH1ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE | {"model.norm.weight": "model.final_layernorm.weight"},
    layer={"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight"},
    blocks={
        "parallel": {f"branches.{i}.{ours}": names[ours] for i, names in enumerate(BRANCHES) for ours in names},
        "mlp": parts.within("feed_forward", parts.MLP),
    },
    immaterial=(*bamba.IMMATERIAL, "mlp_expansion_factor", "expansion_factor", "add_bos_token"),
)
