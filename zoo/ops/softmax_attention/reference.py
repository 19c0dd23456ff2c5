"""Softmax attention, one query at a time over the keys it may see. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("softmax_attention", "reference")
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    num_sinks: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them; lse is always there."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, head_dim = q.shape
    key_length, kv_heads = k.shape[1:3]
    bounds = [0, key_length] if cu_seqlens is None else cu_seqlens.tolist()
    grouped = q.to(dtype).view(batch, length, kv_heads, heads // kv_heads, head_dim)
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for row in range(batch):
        for query in range(length):
            own = key_length - length + query
            start, stop = next((a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a <= own < b)
            keys = [j for j in range(start, stop) if key_mask is None or key_mask[row, j]]
            if own in keys:
                position = keys.index(own)
                keys = [
                    j
                    for p, j in enumerate(keys)
                    if (p <= position or not causal) and (window is None or position - p < window or p < num_sinks)
                ]
            else:
                keys = []
            logits = scale * grouped[row, query] @ k[row, keys].permute(1, 2, 0)
            outs.append(torch.softmax(logits, -1) @ v[row, keys].transpose(0, 1))
            lses.append(torch.logsumexp(logits, -1))
    out = torch.stack(outs).view(batch, length, heads, v.shape[3])
    return out.to(q.dtype), torch.stack(lses).view(batch, length, heads)
