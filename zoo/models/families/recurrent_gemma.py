"""RecurrentGemma (Botev et al. 2024, arXiv:2404.07839): Griffin's recurrent blocks and windowed attention."""

from __future__ import annotations

from typing import Any

import torch

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Taps
from zoo.pattern import spell

KINDS = {"rglru": "recurrent", "attention": "attention"}


def read(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    hidden, kinds, layers = fields("hidden_size"), fields("block_types"), fields("num_hidden_layers")
    fields.only("_block_types", kinds, None)  # released configurations say it twice
    fields.only("embeddings_scale_by_sqrt_dim", True, None)
    names = [kinds[i % len(kinds)] for i in range(layers)]
    mixers = {
        "recurrent": {
            "kind": "rglru",
            "num_heads": fields("num_attention_heads"),
            "width": fields("lru_width"),
            "conv_kernel": fields("conv1d_width"),
        },
        "attention": parts.attention(fields, partial=True)
        | {"window": fields("attention_window_size"), "output_bias": True},
    }
    width = fields("intermediate_size") // 2  # of both projections together
    return {
        "norm": {"eps": fields("rms_norm_eps"), "zero_centered": True},
        "embedding_scale": torch.tensor(hidden**0.5, dtype=torch.bfloat16).item(),  # rounded, as in training
        "logit_softcap": float(fields("logits_soft_cap")),
        "defaults": {"ffn": {"kind": "mlp", "intermediate_size": width, "activation": "gelu_tanh", "bias": True}},
        "blocks": {name: {"mixer": mixer} for name, mixer in mixers.items() if name in names},
        "pattern": spell(names),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    fields = {
        "block_types": [KINDS[layer.mixer.kind] for layer in model.layers],
        "rms_norm_eps": model.norm_config.eps,
        "logits_soft_cap": model.logit_softcap,
        "intermediate_size": 2 * parts.first(model, "mlp").intermediate_size,
    }
    if parts.layers_with(model, "rglru"):
        rglru = parts.first(model, "rglru")
        fields |= {"num_attention_heads": rglru.num_heads, "lru_width": rglru.width, "conv1d_width": rglru.conv_kernel}
    if parts.layers_with(model, "attention"):
        fields |= parts.attention_fields(parts.first(model, "attention"))
        fields["attention_window_size"] = fields.pop("sliding_window")
        fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # there it is 0.5 by default
    return fields


FAMILY = Family(
    model_type="recurrent_gemma",
    model_class="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE | {"model.norm.weight": "model.final_norm.weight"},
    layer={"mixer_norm.weight": "temporal_pre_norm.weight", "ffn_norm.weight": "channel_pre_norm.weight"},
    blocks={
        "attention": {f"{part}_proj.*": f"temporal_block.{part}_proj.*" for part in "qkvo"},
        "rglru": parts.within(
            "temporal_block",
            {
                "x_proj.*": "linear_x.*",
                "y_proj.*": "linear_y.*",
                "out_proj.*": "linear_out.*",
                "conv.weight": Taps("conv_1d.weight"),
                "conv.bias": "conv_1d.bias",
                "a_param": "rg_lru.recurrent_param",
                "recurrence_gate.weight": "rg_lru.recurrent_gate_weight",
                "recurrence_gate.bias": "rg_lru.recurrent_gate_bias",
                "input_gate.weight": "rg_lru.input_gate_weight",
                "input_gate.bias": "rg_lru.input_gate_bias",
            },
        ),
        "mlp": parts.within("mlp_block", parts.MLP),
    },
    immaterial=("w_init_variance_scale", "final_w_init_variance_scale"),
)
