"""MiniMax-Text-01 (MiniMax 2025, arXiv:2501.08313) as it was released, with a configuration and code of its own: half
of each head is rotated, and head counts that are no power of two get ALiBi's decays. transformers' family is
`minimax`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from zoo.config import ZooConfig
from zoo.models.families import minimax, parts
from zoo.models.families.base import Family, Fields
from zoo.pattern import spell

ALPHAS = ("layernorm_linear_attention", "layernorm_full_attention", "layernorm_mlp")


class MiniMaxText01Config(PreTrainedConfig):
    """config.json of the release."""

    model_type = "minimax_text_01"

    vocab_size: int = 200064
    hidden_size: int = 6144
    intermediate_size: int = 9216
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    attn_type_list: list | None = None
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0
    shared_moe_mode: str = "sigmoid"
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    postnorm: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rotary_dim: int | None = None
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    router_jitter_noise: float = 0.0
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    max_position_embeddings: int = 1_000_000
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True


def read(fields: Fields) -> dict[str, Any]:
    fields.only("postnorm", True)
    fields.only("shared_intermediate_size", 0)
    fields("shared_moe_mode")  # of experts that there are none of
    fields.only("rope_scaling", None)
    fields.only("attention_dropout", 0)
    heads = {"num_heads": fields("num_attention_heads"), "head_dim": fields("head_dim")}
    softmax = {
        "kind": "attention",
        **heads,
        "num_kv_heads": fields("num_key_value_heads"),
        "rope": {"theta": float(fields("rope_theta")), "rotary_dim": fields("rotary_dim", heads["head_dim"])},
        "window": fields("sliding_window"),
    }
    linear, full, mlp = ({each: float(fields(f"{name}_{each}")) for each in ("alpha", "beta")} for name in ALPHAS)

    def block(mixer: dict[str, Any], weights: dict[str, float]) -> dict[str, Any]:
        residual = {f"mixer_{name}": weight for name, weight in weights.items()}
        residual |= {f"ffn_{name}": weight for name, weight in mlp.items()}
        return {"mixer": mixer, "residual": {"kind": "normalized"} | residual}

    types = fields("attn_type_list") or [1] * fields("num_hidden_layers")
    return {
        "norm": {"eps": fields("rms_norm_eps")},
        "defaults": {"ffn": parts.experts(fields, "num_local_experts", renormalize=True)},
        "blocks": {"lightning": block({"kind": "lightning", **heads}, linear), "softmax": block(softmax, full)},
        "pattern": spell(["softmax" if each else "lightning" for each in types]),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "attn_type_list": [int(layer.mixer.kind == "attention") for layer in model.layers],
        "rms_norm_eps": model.norm_config.eps,
        "postnorm": True,
    }
    linear, full, mlp = ALPHAS
    for layer in model.layers:
        name = full if layer.mixer.kind == "attention" else linear
        fields |= {f"{name}_{each}": getattr(layer.residual, f"mixer_{each}") for each in ("alpha", "beta")}
        fields |= {f"{mlp}_{each}": getattr(layer.residual, f"ffn_{each}") for each in ("alpha", "beta")}
    mixers = [layer.mixer.config for layer in model.layers]
    fields |= {"num_attention_heads": mixers[0].num_heads, "head_dim": mixers[0].head_dim}
    fields["num_key_value_heads"] = mixers[0].num_heads
    if parts.layers_with(model, "attention"):
        attention = parts.first(model, "attention")
        fields |= {"num_key_value_heads": attention.num_kv_heads, "sliding_window": attention.window}
        fields |= {"rope_theta": attention.rope.theta, "rotary_dim": attention.rope.rotary_dim}
    return fields | parts.expert_fields(parts.first(model, "moe"), "num_local_experts")


def notes(model: ZooConfig) -> tuple[str, ...]:
    attention = [layer.mixer.config for layer in model.layers if layer.mixer.kind == "attention"]
    return tuple(f"softmax layers rotate {config.rope.rotary_dim} of {config.head_dim} dimensions, as the released "
                 "code does; transformers' minimax rotates all of them" for config in attention[:1])  # fmt: skip


FAMILY = Family(
    model_type="minimax_text_01",
    model_class="MiniMaxText01ForCausalLM",
    config_class=MiniMaxText01Config,
    read=read,
    write=write,
    outside=minimax.FAMILY.outside,
    layer=minimax.FAMILY.layer,
    blocks=minimax.FAMILY.blocks,
    derived=minimax.FAMILY.derived,
    notes=notes,
)
