"""The models that are measured, as data: ours, and the same of transformers with the same number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedModel

VOCAB, LAYERS = 512, 8
ALL_BLOCKS = "landmark, all blocks"
MINIMAX_125M = Path(__file__).parents[1] / "configs/models/minimax-125m.yaml"


class Family(NamedTuple):
    """`ours` for zoo.build, and how to build the family's own transformers class; both with random weights."""

    ours: dict[str, Any]
    theirs: Callable[[], PreTrainedModel]


def families(hidden: int = 256) -> dict[str, Family]:
    """The four families of 8 layers, four heads, untied embeddings; everything else in proportion to `hidden`.

    At 256: jamba 11.4M, mamba2 3.7M, minimax 15.3M, llama 6.6M parameters.
    """
    return {
        "jamba": Family(_jamba(hidden), lambda: _theirs("Jamba", **_attention(hidden), **_jamba_fields(hidden))),
        "mamba2": Family(_mamba2(hidden), lambda: _theirs("Mamba2", hidden_size=hidden, **_mamba2_fields(hidden))),
        "minimax": Family(
            _minimax(hidden), lambda: _theirs("MiniMax", **_attention(hidden), **_minimax_fields(hidden))
        ),
        "llama": Family(_llama(hidden), lambda: _theirs("Llama", **_attention(hidden), intermediate_size=3 * hidden)),
    }


def _theirs(family: str, **fields: Any) -> PreTrainedModel:
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, num_hidden_layers=LAYERS, tie_word_embeddings=False, pad_token_id=None, **fields
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def _ours(hidden: int, **fields: Any) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "hidden_size": hidden, "tie_word_embeddings": False, **fields}


def _attention(hidden: int) -> dict[str, int]:
    return {"hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2}


def _softmax(rope: dict[str, Any] | None) -> dict[str, Any]:
    return {"mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope": rope}}


def _llama(hidden: int) -> dict[str, Any]:
    block = _softmax({"theta": 1e4}) | {"ffn": {"kind": "mlp", "intermediate_size": 3 * hidden}}
    return _ours(hidden, blocks={"softmax": block}, pattern=f"softmax*{LAYERS}")


def _minimax(hidden: int) -> dict[str, Any]:
    return _ours(
        hidden,
        norm={"eps": 1e-5},
        defaults={"ffn": _experts(hidden, renormalize=True)},
        blocks={"lightning": {"mixer": {"kind": "lightning", "num_heads": 4}}, "softmax": _softmax({"theta": 1e6})},
        residual={"kind": "normalized"},
        pattern=f"lightning*{LAYERS - 1} softmax",
    )


def _minimax_fields(hidden: int) -> dict[str, Any]:
    return {
        "head_dim": hidden // 4,
        "intermediate_size": 2 * hidden,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
    }


def _experts(hidden: int, renormalize: bool) -> dict[str, Any]:
    return {"kind": "moe", "intermediate_size": 2 * hidden, "num_experts": 4, "top_k": 2, "renormalize": renormalize}


def _jamba(hidden: int) -> dict[str, Any]:
    return _ours(
        hidden,
        defaults={
            "mixer": {"kind": "mamba", "inner_norms": True},
            "ffn": {"kind": "mlp", "intermediate_size": 2 * hidden},
        },
        blocks={"mamba": {}, "mixture": {"ffn": _experts(hidden, renormalize=False)}, "softmax": _softmax(None)},
        pattern="(mamba mixture)*2 softmax mixture mamba mixture",
    )


def _jamba_fields(hidden: int) -> dict[str, Any]:
    return {
        "intermediate_size": 2 * hidden,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }


def _mamba2(hidden: int) -> dict[str, Any]:
    mixer = {"kind": "mamba2", "head_dim": hidden // 4, "state_size": hidden // 4}
    return _ours(hidden, norm={"eps": 1e-5}, blocks={"mamba2": {"mixer": mixer}}, pattern=f"mamba2*{LAYERS}")


def _mamba2_fields(hidden: int) -> dict[str, Any]:
    return {"num_heads": 8, "head_dim": hidden // 4, "state_size": hidden // 4, "n_groups": 1, "expand": 2}


def stacks(hidden: int = 256) -> dict[str, dict[str, Any]]:
    """Recurrence alone, a few layers of one mixer: what must cost the same per token at every length."""
    ffn = {"kind": "mlp", "intermediate_size": 3 * hidden}
    lightning = {"mixer": {"kind": "lightning", "num_heads": 4}, "ffn": ffn}
    mamba2 = {"mixer": {"kind": "mamba2", "head_dim": hidden // 4, "state_size": hidden // 4}}
    return {
        "lightning": _ours(hidden, blocks={"b": lightning}, pattern="b*4", residual={"kind": "normalized"}),
        "mamba2": _ours(hidden, blocks={"b": mamba2}, pattern="b*4"),
        "mamba": _ours(hidden, blocks={"b": {"mixer": {"kind": "mamba"}}}, pattern="b*4"),
        **attending(hidden),
    }


def attending(hidden: int = 256) -> dict[str, dict[str, Any]]:
    """Two layers of one way to attend to a long text: all of it, or less. `landmark` reads 16 blocks per head."""
    heads = {"num_heads": 4, "num_kv_heads": 2}
    landmark = {"kind": "landmark", **heads, "block_size": 63}
    mixers = {
        "attention": {"kind": "attention", **heads},
        "window": {"kind": "attention", **heads, "window": 512, "num_sinks": 4},
        "infini": {"kind": "infini", **heads, "segment": 512},
        "hierarchical": {"kind": "hierarchical", **heads},
        "landmark": landmark | {"top_k": 16, "train_top_k": 16},
        ALL_BLOCKS: landmark,
    }
    ffn = {"kind": "mlp", "intermediate_size": 3 * hidden}
    return {
        name: _ours(hidden, blocks={"b": {"mixer": mixer, "ffn": ffn}}, pattern="b*2") for name, mixer in mixers.items()
    }


def parameters(model: nn.Module) -> int:
    """A tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
