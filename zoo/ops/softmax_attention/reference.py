"""Softmax attention, one query at a time over the keys it may see. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.softmax_attention.pattern import Pattern


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
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    pattern: Pattern | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them; lse is always there."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, _ = q.shape
    key_length, kv_heads = k.shape[1:3]
    bounds = [0, key_length] if cu_seqlens is None else cu_seqlens.tolist()
    document = [i for i in range(len(bounds) - 1) for _ in range(bounds[i], bounds[i + 1])]
    is_real = torch.ones(batch, key_length, dtype=torch.bool) if key_mask is None else key_mask
    grouped = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for row, real in enumerate(is_real.tolist()):
        for query in range(length):
            own = key_length - length + query
            keys = [j for j in range(bounds[document[own]], bounds[document[own] + 1]) if real[j] and real[own]]
            position = keys.index(own) if keys else 0
            if causal:
                keys = keys[: position + 1]
            if window is not None:
                keys = [j for p, j in enumerate(keys) if position - p < window or p < num_sinks]
            if pattern is not None:
                seen = pattern.visible(torch.tensor(position), torch.arange(len(keys)))
                keys = [j for j, visible in zip(keys, seen.tolist(), strict=True) if visible]
            logits = scale * grouped[row, query] @ k[row, keys].permute(1, 2, 0)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            outs.append(torch.softmax(logits, -1) @ v[row, keys].transpose(0, 1))
            lses.append(torch.logsumexp(logits, -1))
    out = torch.stack(outs).view(batch, length, heads, v.shape[3])
    return out.to(q.dtype), torch.stack(lses).view(batch, length, heads)
