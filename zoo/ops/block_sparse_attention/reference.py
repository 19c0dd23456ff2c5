"""block_sparse_attention one query at a time. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("block_sparse_attention", "reference")
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, _ = q.shape
    key_length, kv_heads = k.shape[1:3]
    bounds = [0, key_length] if cu_seqlens is None else cu_seqlens.tolist()
    document = [i for i in range(len(bounds) - 1) for _ in range(bounds[i], bounds[i + 1])]
    is_real = torch.ones(batch, key_length, dtype=torch.bool) if key_mask is None else key_mask
    grouped = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for row, (real, choices) in enumerate(zip(is_real.tolist(), block_indices.tolist(), strict=True)):
        for query in range(length):
            own = key_length - length + query
            keys = [j for j in range(bounds[document[own]], own + 1) if real[j] and real[own]]
            for head in range(kv_heads):
                chosen = [j for p, j in enumerate(keys) if p // block_size in choices[query][head]]
                logits = scale * grouped[row, query, head] @ k[row, chosen, head].T
                outs.append(torch.softmax(logits, -1) @ v[row, chosen, head])
                lses.append(torch.logsumexp(logits, -1))
    out = torch.stack(outs).view(batch, length, heads, v.shape[3])
    return out.to(q.dtype), torch.stack(lses).view(batch, length, heads)
