"""Tiny models: every layer kind, attention alone, recurrence alone."""

from __future__ import annotations

import torch

from tests.blocks.helpers import perturb
from zoo import ZooForCausalLM, build

VOCAB = 41

ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2}
LIGHTNING = {"kind": "lightning", "num_heads": 2, "head_dim": 8}
MAMBA = {"kind": "mamba", "state_size": 4, "inner_norms": True}
MAMBA2 = {"kind": "mamba2", "head_dim": 8, "state_size": 6, "num_groups": 2}
MLP = {"kind": "mlp", "intermediate_size": 24}
MOE = {"kind": "moe", "intermediate_size": 16, "num_experts": 4, "top_k": 2, "router": {"z_loss_coef": 0.01}}

BLOCKS = {
    "attention": {"mixer": ATTENTION, "ffn": MLP},
    "window": {"mixer": {**ATTENTION, "window": 5, "num_sinks": 1, "rope": None}, "ffn": MOE},
    "lightning": {"mixer": LIGHTNING, "ffn": MOE},
    "mamba": {"mixer": MAMBA, "ffn": MLP},
    "mamba2": {"mixer": MAMBA2},
    "dense": {"ffn": MLP},
}
PATTERNS = {
    "hybrid": "lightning mamba window mamba2 dense attention",
    "attention": "attention window",
    "recurrent": "mamba lightning mamba2",
}


def config(pattern: str = "hybrid", **fields) -> dict:
    used = PATTERNS[pattern].split()
    blocks = {name: block for name, block in BLOCKS.items() if name in used}
    return {"vocab_size": VOCAB, "hidden_size": 16, "blocks": blocks, "pattern": PATTERNS[pattern]} | fields


def model(pattern: str = "hybrid", seed: int = 0, **fields) -> ZooForCausalLM:
    """In eval mode, every weight random, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return perturb(build(config(pattern, **fields)), seed).eval()


def tokens(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def realigned(net):
    """`net` with its weights copied to where torch allocates. Read from a file they may lie at any address, on which
    MKL's rounding of a product with a single row depends."""
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    return net
