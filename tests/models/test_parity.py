"""Whole models against transformers': MiniMax, Jamba, Mamba-2, Llama, Mixtral, at odd shapes, with mapped weights."""

import pytest
import torch
from torch import nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.blocks.helpers import assert_close, copy_weights, perturb
from zoo import build

VOCAB = 50
ATTENTION = {f"mixer.{name}_proj.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
LLAMA_NORMS = {"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
JAMBA_NORMS = {"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight"}


def conv(name):
    return (name, lambda weight: weight.squeeze(1))


def dense(theirs):
    return {f"ffn.{name}_proj.weight": f"{theirs}.{name}_proj.weight" for name in ("gate", "up", "down")}


def moe(theirs, router):
    experts = {f"ffn.experts.{name}": f"{theirs}.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    return experts | {"ffn.router.weight": f"{theirs}.{router}.weight"}


LIGHTNING = {
    "mixer.qkv_proj.weight": "self_attn.qkv_proj.weight",
    "mixer.gate_proj.weight": "self_attn.output_gate.weight",
    "mixer.norm.weight": "self_attn.norm.weight",
    "mixer.o_proj.weight": "self_attn.out_proj.weight",
}
MAMBA = {f"mixer.{name}.weight": f"mamba.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")} | {
    "mixer.conv.weight": conv("mamba.conv1d.weight"),
    "mixer.conv.bias": "mamba.conv1d.bias",
    "mixer.dt_bias": "mamba.dt_proj.bias",
    "mixer.A_log": "mamba.A_log",
    "mixer.D": "mamba.D",
    "mixer.inner_norms.0.weight": "mamba.dt_layernorm.weight",
    "mixer.inner_norms.1.weight": "mamba.b_layernorm.weight",
    "mixer.inner_norms.2.weight": "mamba.c_layernorm.weight",
}
MAMBA2 = {
    f"mixer.{name}": f"mixer.{name}" for name in ("in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D")
} | {
    "mixer.conv.weight": conv("mixer.conv1d.weight"),
    "mixer.conv.bias": "mixer.conv1d.bias",
    "mixer.norm_weight": "mixer.norm.weight",
    "mixer_norm.weight": "norm.weight",
}


def weights(layers, embedding, norm, prefix, tied):
    """The mapping of a whole model from those of its layers."""
    mapping = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    if not tied:
        mapping["lm_head.weight"] = "lm_head.weight"
    for i, layer in enumerate(layers):
        for ours, theirs in layer.items():
            name, function = (theirs, None) if isinstance(theirs, str) else theirs
            name = f"{prefix}.{i}.{name}"
            mapping[f"model.layers.{i}.{ours}"] = name if function is None else (name, function)
    return mapping


def minimax(tied):
    theirs = MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=VOCAB,
            hidden_size=36,
            intermediate_size=28,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            rms_norm_eps=1e-2,
            num_local_experts=5,
            num_experts_per_tok=2,
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
            block_size=16,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            linear_attn_alpha_factor=1.3,
            linear_attn_beta_factor=0.7,
            full_attn_alpha_factor=1.1,
            full_attn_beta_factor=0.9,
            mlp_alpha_factor=1.7,
            mlp_beta_factor=0.6,
            tie_word_embeddings=tied,
        )
    )
    factors = {"kind": "normalized", "ffn_alpha": 1.7, "ffn_beta": 0.6}
    ours = {
        "hidden_size": 36,
        "norm": {"eps": 1e-2},
        "defaults": {
            "ffn": {"kind": "moe", "intermediate_size": 28, "num_experts": 5, "top_k": 2, "renormalize": True}
        },
        "blocks": {
            "lightning": {
                "mixer": {"kind": "lightning", "num_heads": 6, "head_dim": 10, "slopes": "geometric"},
                "residual": factors | {"mixer_alpha": 1.3, "mixer_beta": 0.7},
            },
            "softmax": {
                "mixer": {
                    "kind": "attention",
                    "num_heads": 6,
                    "num_kv_heads": 2,
                    "head_dim": 10,
                    "rope": {"type": "default", "theta": 500.0},
                },
                "residual": factors | {"mixer_alpha": 1.1, "mixer_beta": 0.9},
            },
        },
        "pattern": "(lightning softmax)*2",
    }
    layers = [mixer | LLAMA_NORMS | moe("mlp", "gate") for mixer in (LIGHTNING, ATTENTION)] * 2
    return theirs, ours, weights(layers, "model.embed_tokens.weight", "model.norm.weight", "model.layers", tied)


def jamba(tied):
    theirs = JambaForCausalLM(
        JambaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=5,
            num_attention_heads=3,
            num_key_value_heads=1,
            rms_norm_eps=1e-2,
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=4,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=6,
            mamba_d_conv=3,
            mamba_expand=3,
            mamba_dt_rank=5,
            pad_token_id=None,  # else the gradient of that embedding is dropped
            tie_word_embeddings=tied,
        )
    )
    mixture = {"kind": "moe", "intermediate_size": 40, "num_experts": 4, "top_k": 2, "renormalize": False}
    inner = {"intermediate_size": 72, "state_size": 6, "conv_kernel": 3, "dt_rank": 5, "inner_norms": True}
    ours = {
        "hidden_size": 24,
        "norm": {"eps": 1e-2},
        "defaults": {"mixer": {"kind": "mamba"} | inner, "ffn": {"kind": "mlp", "intermediate_size": 40}},
        "blocks": {
            "mamba": {},
            "mixture": {"ffn": mixture},
            "softmax": {"mixer": {"kind": "attention", "num_heads": 3, "num_kv_heads": 1, "rope": None}},
        },
        "pattern": "mamba mixture softmax mixture mamba",
    }
    plain, mixed = (JAMBA_NORMS | ffn for ffn in (dense("feed_forward"), moe("feed_forward", "router")))
    layers = [MAMBA | plain, MAMBA | mixed, ATTENTION | plain, MAMBA | mixed, MAMBA | plain]
    mapping = weights(layers, "model.embed_tokens.weight", "model.final_layernorm.weight", "model.layers", tied)
    return theirs, ours, mapping


def mamba2(tied):
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=20,
            num_hidden_layers=3,
            num_heads=6,
            head_dim=10,
            expand=3,
            state_size=7,
            n_groups=2,
            conv_kernel=3,
            chunk_size=8,
            layer_norm_epsilon=1e-2,
            tie_word_embeddings=tied,
        )
    )
    mixer = {"num_heads": 6, "head_dim": 10, "state_size": 7, "num_groups": 2, "conv_kernel": 3}
    ours = {
        "hidden_size": 20,
        "norm": {"eps": 1e-2},
        "blocks": {"b": {"mixer": {"kind": "mamba2"} | mixer}},
        "pattern": "b*3",
    }
    mapping = weights([MAMBA2] * 3, "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers", tied)
    return theirs, ours, mapping


def llama_like(config_class, model_class, ffn, ffn_weights, tied, **fields):
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=36,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        rms_norm_eps=1e-2,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        tie_word_embeddings=tied,
        **fields,
    )
    mixer = {"kind": "attention", "num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "rope": {"theta": 700.0}}
    ours = {"hidden_size": 36, "norm": {"eps": 1e-2}, "blocks": {"b": {"mixer": mixer, "ffn": ffn}}, "pattern": "b*3"}
    layers = [ATTENTION | LLAMA_NORMS | ffn_weights] * 3
    mapping = weights(layers, "model.embed_tokens.weight", "model.norm.weight", "model.layers", tied)
    return model_class(config), ours, mapping


def llama(tied):
    ffn = {"kind": "mlp", "intermediate_size": 28}
    return llama_like(LlamaConfig, LlamaForCausalLM, ffn, dense("mlp"), tied)


def mixtral(tied):
    ffn = {"kind": "moe", "intermediate_size": 28, "num_experts": 4, "top_k": 3}
    fields = {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": None}
    return llama_like(MixtralConfig, MixtralForCausalLM, ffn, moe("mlp", "gate"), tied, **fields)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [minimax, jamba, mamba2, llama, mixtral])
def test_logits_and_gradients_equal_transformers(family, tied):
    theirs, fields, mapping = family(tied)
    perturb(theirs.eval())
    ours = build({"vocab_size": VOCAB, "tie_word_embeddings": tied, **fields})
    copy_weights(ours, theirs, mapping)
    tokens = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(0))
    logits, expected = ours.eval()(tokens).logits, theirs(tokens).logits
    assert_close(logits, expected)
    for each in (logits, expected):
        nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name in ("model.embed_tokens.weight", "model.layers.0.mixer_norm.weight"):
        gradient, expected = ours.get_parameter(name).grad, theirs.get_parameter(mapping[name]).grad
        assert_close(gradient, expected, f"gradient of {name}", tolerance=1e-4)


@pytest.mark.parametrize("family", [minimax, jamba, llama])
def test_padded_batches_equal_transformers(family):
    """Left padding, as generate() makes it, at the real tokens."""
    theirs, fields, mapping = family(True)
    perturb(theirs.eval())
    ours = build({"vocab_size": VOCAB, "tie_word_embeddings": True, **fields}).eval()
    copy_weights(ours, theirs, mapping)
    tokens = torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(21) >= torch.tensor([0, 5, 13])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits, expected = ours(tokens, mask).logits, theirs(tokens, mask, position_ids=positions).logits
    assert_close(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_router_gradients_equal_mixtral(padded):
    """Cross entropy and auxiliary loss together, as Mixtral trains."""
    theirs, fields, mapping = mixtral(True)
    theirs.router_aux_loss_coef = 0.5
    fields["blocks"]["b"]["ffn"]["router"] = {"aux_loss_coef": 0.5}
    perturb(theirs)
    ours = build({"vocab_size": VOCAB, "tie_word_embeddings": True, **fields})
    copy_weights(ours, theirs, mapping)
    tokens = torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(21) < torch.tensor([21, 12, 5 if padded else 21])[:, None]).long() if padded else None
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    out = ours(tokens, mask, labels=labels)
    expected = theirs(tokens, attention_mask=mask, labels=labels, output_router_logits=True)
    assert_close(out.aux_loss, 0.5 * expected.aux_loss)
    assert_close(out.loss, expected.loss)
    for each in (out.aux_loss, 0.5 * expected.aux_loss):
        each.backward()
    for i in range(3):
        name = f"model.layers.{i}.ffn.router.weight"
        gradient = theirs.get_parameter(mapping[name]).grad
        assert_close(ours.get_parameter(name).grad, gradient, name, tolerance=1e-4)
