"""Infini-attention one query at a time, and a segment written when its last token has come."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("infini_attention", "reference")
def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    *,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    new: bool,
    write_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, memory, normaliser)`; memory `[n,N,K,V]` and normaliser `[n,N,K]` have N heads, each for H/N queries'."""
    wide, (batch, length, heads, key_dim), (key_length, kv_heads) = memory.dtype, q.shape, k.shape[1:3]
    queries, keys, values = (x.to(wide) for x in (q, k, v))
    reading, writing = sigma(q_mem.to(wide)), sigma(k_mem.to(wide))
    own = memory.shape[1] // kv_heads  # memories that each kv head writes
    if cu_seqlens is not None:
        rows = [(0, list(range(start, end))) for start, end in pairwise(cu_seqlens.tolist())]
    elif key_mask is not None:
        rows = [(row, [j for j in range(key_length) if key_mask[row, j]]) for row in range(batch)]
    else:
        rows = [(row, list(range(key_length))) for row in range(batch)]
    outs = [[values.new_zeros(heads, v.shape[3])] * length for _ in range(batch)]
    memories, normalisers = [], []
    for (row, columns), m, z in zip(rows, memory, normaliser, strict=True):
        for position, column in enumerate(columns):
            seen = columns[position - position % segment : position + 1]
            query = column - (key_length - length)
            if query >= 0:
                grouped = queries[row, query].unflatten(0, (kv_heads, -1))
                logits = key_dim**-0.5 * grouped @ keys[row, seen].permute(1, 2, 0)
                local = (torch.softmax(logits, -1) @ values[row, seen].transpose(0, 1)).flatten(0, 1)
                outs[row][query] = mixed(local, reading[row, query], m, z, gate)
            if len(seen) == segment:
                features = writing[row, seen].repeat_interleave(own, 1).transpose(0, 1)
                written = values[row, seen].repeat_interleave(own, 1).transpose(0, 1)
                if delta and z.any():
                    known = features @ m / denominator(features, z)[..., None]
                    written = torch.where(z.any(-1)[:, None, None], written - known, written)
                m, z = m + features.mT @ written, z + features.sum(1)
        memories.append(m)
        normalisers.append(z)
    out = torch.stack([torch.stack(row) for row in outs])
    return out.to(q.dtype), torch.stack(memories), torch.stack(normalisers)


def sigma(x: Tensor) -> Tensor:
    """ELU(x) + 1, which is e^x below 0: not 1 + (e^x - 1), which rounds to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def denominator(features: Tensor, z: Tensor) -> Tensor:
    """`features` `[N,t,K]` times `z` `[N,K]`, and 1 where that is empty."""
    return torch.where(z.any(-1, keepdim=True), (features * z[:, None]).sum(-1), 1)


def mixed(local: Tensor, reading: Tensor, m: Tensor, z: Tensor, gate: Tensor) -> Tensor:
    """What a token gets `[H,V]`, of what it reads with `[H,K]`."""
    if not z.any():
        return local
    features = reading.unflatten(0, (m.shape[0], -1))
    read = (features @ m / denominator(features, z)[..., None]).flatten(0, 1)
    share = gate.sigmoid()[:, None]
    filled = z.any(-1).repeat_interleave(features.shape[1])[:, None]
    return torch.where(filled, share * read + (1 - share) * local, local)
