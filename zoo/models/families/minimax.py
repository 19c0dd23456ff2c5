"""MiniMax-Text-01 (MiniMax 2025, arXiv:2501.08313) as transformers has it: every dimension is rotated (unless
the configuration has the release's rotary_dim), and one formula gives the decays for any number of heads (`slopes:
geometric`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import MiniMaxConfig, PreTrainedConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields
from zoo.pattern import spell

MIXERS = {"linear_attention": "lightning", "full_attention": "softmax"}


def read(fields: Fields) -> dict[str, Any]:
    types = fields("layer_types")
    # What released configurations keep of those of minimax_text_01.
    fields.only("attn_type_list", [int(each == "full_attention") for each in types], None)
    fields.only("postnorm", True, None)
    fields.only("shared_intermediate_size", 0, None)
    attention = parts.attention(fields)
    rotary_dim = fields("rotary_dim")
    if rotary_dim is not None:  # transformers rotates everything whatever this says, the model was not trained so
        attention["rope"]["rotary_dim"] = rotary_dim
    lightning = {
        "kind": "lightning",
        "num_heads": fields("num_attention_heads"),
        "head_dim": fields("head_dim"),
        "slopes": "geometric",
    }
    ffn = {"ffn_alpha": float(fields("mlp_alpha_factor")), "ffn_beta": float(fields("mlp_beta_factor"))}

    def block(mixer: dict[str, Any], name: str) -> dict[str, Any]:
        weights = {f"mixer_{each}": float(fields(f"{name}_attn_{each}_factor")) for each in ("alpha", "beta")}
        return {"mixer": mixer, "residual": {"kind": "normalized"} | weights | ffn}

    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "defaults": {"ffn": parts.experts(fields, "num_local_experts", renormalize=True)},
        "blocks": {"lightning": block(lightning, "linear"), "softmax": block(attention, "full")},
        "pattern": spell([MIXERS[name] for name in types]),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    kinds = {"lightning": "linear_attention", "attention": "full_attention"}
    fields = {
        "layer_types": [kinds[layer.mixer.kind] for layer in model.layers],
        "rms_norm_eps": model.norm_config.eps,
        "mlp_alpha_factor": model.layers[0].residual.ffn_alpha,
        "mlp_beta_factor": model.layers[0].residual.ffn_beta,
    }
    for layer in model.layers:
        name = kinds[layer.mixer.kind].partition("_")[0]
        fields |= {f"{name}_attn_{each}_factor": getattr(layer.residual, f"mixer_{each}") for each in ("alpha", "beta")}
    if parts.layers_with(model, "attention"):
        fields |= parts.attention_fields(parts.first(model, "attention"))
        fields.pop("attention_bias")
    else:
        lightning = parts.first(model, "lightning")
        fields |= {"num_attention_heads": lightning.num_heads, "num_key_value_heads": lightning.num_heads}
        fields |= {"head_dim": lightning.head_dim}
    return fields | parts.expert_fields(parts.first(model, "moe"), "num_local_experts")


def derive(config: PreTrainedConfig, i: int) -> dict[str, Tensor]:
    """The decays that transformers saves, from its own layer, made as narrow as can be."""
    if config.layer_types[i] != "linear_attention":
        return {}
    narrow = MiniMaxConfig(**config.to_dict() | {"hidden_size": 2, "head_dim": 2})
    return {f"self_attn.{name}": tensor for name, tensor in MiniMaxLightningAttention(narrow, i).named_buffers()}


def notes(model: ZooConfig) -> tuple[str, ...]:
    given = ["states are float32 while decoding; transformers keeps them in the model's dtype"]
    for config in dict.fromkeys(layer.mixer.config for layer in model.layers):
        if config.num_heads & (config.num_heads - 1) and getattr(config, "slopes", "alibi") == "geometric":
            given.append("decays follow transformers' formula, which for this number of heads is not that of the "
                         "released code: --override blocks.lightning.mixer.slopes=alibi")  # fmt: skip
        rope = getattr(config, "rope", None)
        if rope is not None and rope.rotary_dim == config.head_dim:
            override = f"--override blocks.softmax.mixer.rope.rotary_dim={config.head_dim // 4 * 2}"
            given.append(f"softmax layers rotate all {config.head_dim} dimensions, as transformers does; "
                         f"MiniMax-Text-01 was released with half of them: {override}")  # fmt: skip
        if rope is not None and rope.rotary_dim != config.head_dim:
            given.append(f"softmax layers rotate {rope.rotary_dim} of {config.head_dim} dimensions, as released; "
                         "transformers' minimax rotates all of them")  # fmt: skip
    return tuple(given)


FAMILY = Family(
    model_type="minimax",
    model_class="MiniMaxForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={
        "attention": parts.ATTENTION,
        "lightning": {
            "qkv_proj.*": "self_attn.qkv_proj.*",
            "gate_proj.*": "self_attn.output_gate.*",
            "norm.*": "self_attn.norm.*",
            "o_proj.*": "self_attn.out_proj.*",
        },
        "moe": parts.EXPERTS,
    },
    derived=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
    derive=derive,
    immaterial=("shared_moe_mode",),  # of experts that there are none of
    notes=notes,
)
