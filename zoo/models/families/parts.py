"""What families have in common: fields of attention, rotary positions, experts, and the names of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from zoo.blocks.attention import AttentionConfig
from zoo.blocks.moe import MoEConfig
from zoo.blocks.rope import SCALING, RopeConfig
from zoo.config import ZooConfig
from zoo.models.families.base import FamilyError, Fields, Form, Names, PerExpert
from zoo.pattern import spell

OUTSIDE = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
ATTENTION = {
    f"{part}.*": f"self_attn.{part}.*" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
}
MLP = {f"{part}_proj.*": f"{part}_proj.*" for part in ("gate", "up", "down")}
# As Mixtral was released; transformers holds all experts in one tensor.
EXPERTS = {
    "router.weight": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    "experts.gate_up_proj": (
        PerExpert(("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight")),
        "mlp.experts.gate_up_proj",
    ),
    "experts.down_proj": (PerExpert(("block_sparse_moe.experts.{e}.w2.weight",)), "mlp.experts.down_proj"),
}
# As most others are: one module per expert.
GATED_EXPERTS = {
    "router.weight": "gate.weight",
    "router.correction_bias": "gate.e_score_correction_bias",
    "experts.gate_up_proj": (
        PerExpert(("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight")),
        "experts.gate_up_proj",
    ),
    "experts.down_proj": (PerExpert(("experts.{e}.down_proj.weight",)), "experts.down_proj"),
    **{f"shared.{ours}": f"shared_experts.{theirs}" for ours, theirs in MLP.items()},
}


def attention(fields: Fields, rotary: bool = True, partial: bool = False) -> dict[str, Any]:
    """`mixer:` of softmax attention as Llama has it; `partial` is of `rope`."""
    fields.only("attention_dropout", 0, None)
    heads = fields("num_attention_heads")
    return {
        "kind": "attention",
        "num_heads": heads,
        "num_kv_heads": fields("num_key_value_heads", heads),
        "head_dim": fields("head_dim", fields("hidden_size") // heads),
        "rope": rope(fields, partial) if rotary else None,
        "window": fields.own("sliding_window"),
        "bias": fields.own("attention_bias", False),
    }


def rope(fields: Fields, partial: bool = False) -> dict[str, Any]:
    """`rope:`, from the rotary parameters that transformers standardises; `partial` where a family can turn a part of
    each head.

    Raises:
        FamilyError: a kind of scaling, or a parameter of one, that ours does not have.
    """
    given = {name: value for name, value in fields("rope_parameters").items() if value is not None}
    kind, theta = given.pop("rope_type", "default"), given.pop("rope_theta")
    given.pop("type", None)  # the older name of rope_type
    turning = given.pop("partial_rotary_factor", 1.0)
    if turning != 1 and not partial:
        raise FamilyError(f"{fields.model_type}: rope_parameters.partial_rotary_factor is {turning!r}; supported is 1")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise FamilyError(f"{fields.model_type}: rope_parameters.rope_type is {kind!r}; supported is default, linear, "
                          "yarn, llama3 or longrope")  # fmt: skip
    for name, value in given.items():
        if name not in SCALING:
            raise FamilyError(f"{fields.model_type}: rope_parameters.{name} is {value!r}, which is not supported")
    if kind in ("yarn", "llama3", "longrope"):
        context = given.setdefault("original_max_position_embeddings", fields("max_position_embeddings"))
        if kind == "longrope":
            given.setdefault("factor", fields("max_position_embeddings") / context)
    if turning != 1:
        head_dim = fields("head_dim", fields("hidden_size") // fields("num_attention_heads"))
        given["rotary_dim"] = int(head_dim * turning)
    return {"type": kind, "theta": float(theta)} | given


def rope_fields(config: RopeConfig, head_dim: int | None) -> dict[str, Any]:
    """The inverse of `rope`: `rope_parameters`."""
    given = {name: getattr(config, name) for name in SCALING if getattr(config, name) is not None}
    assert config.rotary_dim is not None and head_dim is not None, "resolve() fills them in"
    if config.rotary_dim != head_dim:
        factor = config.rotary_dim / head_dim
        # They multiply again and cut off.
        exact = int(head_dim * factor) == config.rotary_dim
        given["partial_rotary_factor"] = factor if exact else math.nextafter(factor, 1)
    return {"rope_type": config.type, "rope_theta": config.theta} | given


def experts(
    fields: Fields, number: str, renormalize: bool, intermediate_size: str = "intermediate_size"
) -> dict[str, Any]:
    """`ffn:` of a mixture as Mixtral has it; `number` and `intermediate_size` are the fields with the number of experts
    and their width."""
    fields.only("hidden_act", "silu")
    fields.only("router_jitter_noise", 0, None)
    # transformers adds the balancing loss only to a model that gives out its router's logits.
    weight = fields("router_aux_loss_coef") if fields("output_router_logits") else 0.0
    return {
        "kind": "moe",
        "intermediate_size": fields(intermediate_size),
        "num_experts": fields(number),
        "top_k": fields("num_experts_per_tok"),
        "renormalize": renormalize,
        "router": {"aux_loss_coef": weight},
    }


def sigmoid_router(fields: Fields) -> dict[str, Any]:
    """`router:` of DeepSeek-V3; transformers has no loss for it."""
    return {
        "kind": "sigmoid",
        "correction_bias": True,
        "num_groups": fields("n_group"),
        "top_k_groups": fields("topk_group"),
        "scale": float(fields("routed_scaling_factor")),
        "aux_loss_coef": 0.0,
    }


def mlp(fields: Fields) -> dict[str, Any]:
    """`ffn:` of Llama."""
    fields.only("hidden_act", "silu")
    return {"kind": "mlp", "intermediate_size": fields("intermediate_size"), "bias": fields.own("mlp_bias", False)}


def first(model: ZooConfig, kind: str) -> Any:
    """The config of the first mixer or feed-forward of a kind.

    Raises:
        FamilyError: there is none.
    """
    for layer in model.layers:
        for part in (layer.mixer, layer.ffn):
            if part.kind == kind:
                return part.config
    raise FamilyError(f"it has no {kind}")


def attention_fields(config: AttentionConfig) -> dict[str, Any]:
    """The inverse of `attention`."""
    fields: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.window,
        "attention_bias": config.bias,
    }
    if config.rope is not None:
        fields["rope_parameters"] = rope_fields(config.rope, config.head_dim)
    return fields


def windows(fields: Fields) -> list[int | None]:
    """How many keys each layer sees, by `layer_types`; None is all.

    Raises:
        FamilyError: another type of layer, or a window of no size.
    """
    size = fields("sliding_window")
    found = []
    for kind in fields("layer_types"):
        if kind not in ("full_attention", "sliding_attention"):
            raise FamilyError(
                f"{fields.model_type}: layer_types has {kind!r}; supported is full_attention or sliding_attention"
            )
        if kind == "sliding_attention" and size is None:
            raise FamilyError(f"{fields.model_type}: layer_types has sliding_attention, but sliding_window is null")
        found.append(size if kind == "sliding_attention" else None)
    return found


def windowed(fields: Fields, mixer: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    """`blocks` and `pattern` of layers that differ only in their window."""
    sizes = windows(fields)
    names = ["full" if size is None else "sliding" for size in sizes]
    blocks = {name: {"mixer": mixer | {"window": size}, "ffn": ffn} for name, size in zip(names, sizes, strict=True)}
    return {"blocks": blocks, "pattern": spell(names)}


def window_fields(model: ZooConfig) -> dict[str, Any]:
    """The inverse of `windows`."""
    sizes = [layer.mixer.config.window for layer in model.layers]
    return {
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in sizes],
        "sliding_window": next((size for size in sizes if size is not None), None),
    }


def expert_fields(config: MoEConfig, number: str, intermediate_size: str = "intermediate_size") -> dict[str, Any]:
    """The inverse of `experts`."""
    return {
        intermediate_size: config.intermediate_size,
        number: config.num_experts,
        "num_experts_per_tok": config.top_k,
        "router_aux_loss_coef": config.router.aux_loss_coef,
        "output_router_logits": config.router.aux_loss_coef > 0,
    }


def sigmoid_router_fields(config: MoEConfig) -> dict[str, Any]:
    """The inverse of `sigmoid_router`."""
    router = config.router
    return {"n_group": router.num_groups, "topk_group": router.top_k_groups, "routed_scaling_factor": router.scale}


def expansion(inner: int, model: ZooConfig) -> int:
    """How many times as wide as the stream a mixer is.

    Raises:
        FamilyError: no whole number.
    """
    if inner % model.hidden_size:
        raise FamilyError(f"a mixer's {inner} channels are no multiple of hidden_size ({model.hidden_size})")
    return inner // model.hidden_size


def solve(function: Callable[[float], float], value: float, near: float) -> float:
    """The shortest number, near `near`, of which `function` is `value` to the last bit; `near` if there is none."""
    rounded = (float(f"{near:.{digits}g}") for digits in range(1, 18))
    beside = (math.nextafter(near, to) for to in (-math.inf, math.inf))
    return next((x for x in (*rounded, *beside) if function(x) == value), near)


def layers_with(model: ZooConfig, kind: str) -> list[int]:
    """The layers whose mixer or feed-forward is of this kind."""
    return [i for i, layer in enumerate(model.layers) if kind in (layer.mixer.kind, layer.ffn.kind)]


def within(module: str, names: Names) -> Names:
    """The names of a part that stands in `module` there."""

    def inside(layout: str | Form) -> str | Form:
        return f"{module}.{layout}" if isinstance(layout, str) else layout.at(lambda name: f"{module}.{name}")

    return {
        ours: inside(theirs) if isinstance(theirs, str | Form) else [inside(layout) for layout in theirs]
        for ours, theirs in names.items()
    }
