"""Nemotron-H (NVIDIA 2025, arXiv:2504.03624) and Nemotron 3 (arXiv:2512.20856): each layer is Mamba-2, attention
without positions, an MLP or experts, alone."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import mamba2, parts
from zoo.models.families.base import Family, FamilyError, Fields, PerExpert
from zoo.pattern import spell

BLOCKS = {"linear_attention": "mamba2", "full_attention": "softmax", "mlp": "mlp", "moe": "moe"}
KINDS = {"mamba2": "linear_attention", "attention": "full_attention", "mlp": "mlp", "moe": "moe"}


def read(fields: Fields) -> dict[str, Any]:
    for name in ("attention_bias", "hidden_dropout", "sliding_window"):
        fields.only(name, None, 0)  # False is 0
    fields.only("tie_word_embeddings", False)  # transformers does not tie them whatever this says
    fields.only("rms_norm_eps", fields("layer_norm_epsilon"), None)  # released configurations say it twice
    fields.only("attention_head_dim", None, fields("head_dim"))  # its name before
    fields.only("mamba_hidden_act", "silu")
    fields.only("mlp_hidden_act", "relu2")
    fields.only("n_shared_experts", 1)
    names = [BLOCKS[name] for name in fields("layers_block_type")]
    if fields("mlp_bias") and "moe" in names:
        raise FamilyError("nemotron_h: mlp_bias is true, which is not supported beside layers of experts")
    plain = {"activation": "relu2", "gated": False}
    blocks: dict[str, Any] = {
        "mamba2": {
            "mixer": {
                "kind": "mamba2",
                "num_heads": fields("mamba_num_heads"),
                "head_dim": fields("mamba_head_dim"),
                "state_size": fields("ssm_state_size"),
                "num_groups": fields("n_groups"),
                "conv_kernel": fields("conv_kernel"),
                "bias": fields("use_bias"),
                "conv_bias": fields("use_conv_bias"),
                "dt_min": fields("time_step_min"),
            }
        },
        "softmax": {"mixer": parts.attention(fields, rotary=False)},
        "mlp": {
            "ffn": plain | {"kind": "mlp", "intermediate_size": fields("intermediate_size"), "bias": fields("mlp_bias")}
        },
        "moe": {
            "ffn": plain
            | {
                "kind": "moe",
                "intermediate_size": fields("moe_intermediate_size"),
                "num_experts": fields("n_routed_experts"),
                "top_k": fields("num_experts_per_tok"),
                "renormalize": fields("norm_topk_prob"),
                "num_shared_experts": 1,
                "shared_intermediate_size": fields("moe_shared_expert_intermediate_size"),
                "latent_size": fields("moe_latent_size"),
                "router": parts.sigmoid_router(fields),
            }
        },
    }
    return {
        "norm": {"eps": fields("layer_norm_epsilon")},
        "blocks": {name: block for name, block in blocks.items() if name in names},
        "pattern": spell(names),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    kinds = [layer.ffn.kind if layer.mixer.kind == "none" else layer.mixer.kind for layer in model.layers]
    fields: dict[str, Any] = {
        "layers_block_type": [KINDS[kind] for kind in kinds],
        "layer_norm_epsilon": model.norm_config.eps,
    }
    if "mamba2" in kinds:
        mamba = parts.first(model, "mamba2")
        fields |= {
            "mamba_num_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.state_size,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.conv_kernel,
            "use_bias": mamba.bias,
            "use_conv_bias": mamba.conv_bias,
            "time_step_min": mamba.dt_min,
        }
    if "attention" in kinds:
        fields |= parts.attention_fields(parts.first(model, "attention"))
    if "mlp" in kinds:
        mlp = parts.first(model, "mlp")
        fields |= {"intermediate_size": mlp.intermediate_size, "mlp_bias": mlp.bias}
    if "moe" in kinds:
        moe = parts.first(model, "moe")
        fields |= parts.sigmoid_router_fields(moe) | {
            "moe_intermediate_size": moe.intermediate_size,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.renormalize,
            "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
            "moe_latent_size": moe.latent_size,
        }
    return fields


MLP = {f"{part}_proj.*": f"{part}_proj.*" for part in ("up", "down")}

FAMILY = Family(
    model_type="nemotron_h",
    model_class="NemotronHForCausalLM",
    read=read,
    write=write,
    outside={
        "model.embed_tokens.weight": "model.embeddings.weight",
        "model.norm.weight": "model.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layer={"mixer_norm.weight": "norm.weight", "ffn_norm.weight": "norm.weight"},
    blocks={
        "attention": {f"{part}_proj.*": f"mixer.{part}_proj.*" for part in "qkvo"},
        "mamba2": parts.within("mixer", mamba2.MIXER),
        "mlp": parts.within("mixer", MLP),
        "moe": parts.within("mixer", {
            "latent_in_proj.*": "fc1_latent_proj.*",
            "latent_out_proj.*": "fc2_latent_proj.*",
            "router.weight": "gate.weight",
            "router.correction_bias": "gate.e_score_correction_bias",
            **{f"experts.{part}_proj": (PerExpert((f"experts.{{e}}.{part}_proj.weight",)), f"experts.{part}_proj")
               for part in ("up", "down")},
            **{f"shared.{ours}": f"shared_experts.{theirs}" for ours, theirs in MLP.items()},
        }),
    },
    former={"backbone.": "model."},
    notes=mamba2.bounded_below,
    beside=("mtp.",),
    immaterial=("num_logits_to_keep", "expand", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
                "num_nextn_predict_layers", "mtp_layers_block_type", "keep_mtp_spec_in_bf16", "rope_parameters",
                "rope_theta", "partial_rotary_factor", "norm_eps", "num_query_groups"),
)  # fmt: skip
