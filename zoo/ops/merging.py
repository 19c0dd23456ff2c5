"""Attention over one set of keys from attentions over parts of it."""

from __future__ import annotations

import torch
from torch import Tensor


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over two sets of keys, of the attentions over each (FlashAttention, arXiv:2205.14135,
    section 3.1; Ring Attention merges so).

    Args:
        out, other: `[..., head_dim]`.
        lse, other_lse: `[...]`, the natural log-sum-exps of their logits, -inf where nothing was seen.

    Returns:
        `(out, lse)` in the dtype of lse, which should be float32 at least: rounded partial results add up.
    """
    # Between two that saw nothing, whose difference would be NaN, any finite number will do.
    nothing = (lse == -torch.inf) & (other_lse == -torch.inf)
    difference = other_lse.masked_fill(nothing, 0) - lse.masked_fill(nothing, 0)
    both = torch.lerp(out.to(lse.dtype), other.to(lse.dtype), difference.sigmoid()[..., None])
    return both, torch.logaddexp(lse, other_lse)
