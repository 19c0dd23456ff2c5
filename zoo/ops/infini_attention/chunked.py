"""Infini-attention a segment at a time: attention within segments is softmax_attention of as many rows, and the memory
goes through the segments in order, in batched matrix products. Memory is linear in the length.

B batch, T queries, S keys, H heads, N memories (each read by H/N heads), K key_dim, V value_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.softmax_attention import softmax_attention
from zoo.ops.varlen import real_first


@implements("infini_attention", "torch")
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
    """`(out, memory, normaliser)`; `new` promises an empty memory, and without `write_last` the one returned may lack
    what no query reads."""
    memories = _Memories(memory, normaliser, gate, delta, empty=new)
    if cu_seqlens is not None:
        return _documents(q, k, v, q_mem, k_mem, memories, segment, cu_seqlens.tolist(), write_last)
    if key_mask is not None and key_mask.shape[1] > segment and q.shape[1] > 1:
        return _padded(q, k, v, q_mem, k_mem, memories, segment, key_mask, write_last)
    if key_mask is None:
        local = within_segments(q, k, v, segment)
        out = memories.run(local, q_mem, k_mem, v, segment, write_last)
        return out.to(q.dtype), memories.m, memories.z
    # No row has more than a segment of real keys.
    local, keys = softmax_attention(q, k, v, key_mask=key_mask), key_mask[..., None, None]
    real = keys[:, -q.shape[1] :]
    q_mem, k_mem, v = (torch.where(mask, x, 0) for mask, x in ((real, q_mem), (keys, k_mem), (keys, v)))
    out = memories.read(local, q_mem)
    full = key_mask.sum(1) == segment
    if write_last and bool(full.any()):  # much work for a single token, and for most of them in vain
        memories.write(k_mem, v, full, key_mask)
    return torch.where(real, out, 0).to(q.dtype), memories.m, memories.z


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1, which is e^x below 0: not 1 + (e^x - 1), which rounds to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class _Memories:
    """The memories of a batch, `m` `[B,N,K,V]` and `z` `[B,N,K]`, as far as they are written."""

    def __init__(self, m: Tensor, z: Tensor, gate: Tensor, delta: bool, empty: bool) -> None:
        self.m, self.z, self.gate, self.delta = m, z, gate, delta
        self.empty = empty  # all of them are; a memory by itself is where its z is 0

    def documents(self) -> list[_Memories]:
        """Of each document its own."""
        pairs = zip(self.m.split(1), self.z.split(1), strict=True)
        return [_Memories(m, z, self.gate, self.delta, self.empty) for m, z in pairs]

    def run(
        self,
        local: Tensor,
        q_mem: Tensor,
        k_mem: Tensor,
        v: Tensor,
        segment: int,
        write_last: bool,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Read and write segment by segment. `tokens` `[B]` says how many keys of each row are real, its first ones;
        the others are zeros."""
        key_length = k_mem.shape[1]
        past = key_length - q_mem.shape[1]
        ends = [*range(segment, key_length, segment), key_length]
        # Not slices, whose gradients are as long as the whole: each would cost what all segments do.
        keys, values = (_split(x, ends) for x in (k_mem, v))
        queries, locals_ = (_split(x, [end - past for end in ends]) for x in (q_mem, local))
        outs = []
        for end, own_local, own_q, own_k, own_v in zip(ends, locals_, queries, keys, values, strict=True):
            outs.append(self.read(own_local, own_q))
            if own_k.shape[1] == segment and (end < key_length or write_last):
                self.write(own_k, own_v, None if tokens is None else tokens >= end)
        return torch.cat(outs, 1)

    def read(self, local: Tensor, q_mem: Tensor) -> Tensor:
        """`[B,t,H,V]`, the `local` attention of queries `q_mem` `[B,t,H,K]` and what they read."""
        local = local.to(self.m.dtype)
        if self.empty:
            # A text of one segment has its gates in the graph, too: data parallel training waits for every gradient.
            return local + 0 * self.gate.sigmoid().sum() if self.gate.requires_grad else local
        memories = self.m.shape[1]
        read = self._read(_by_head(elu_plus_one(q_mem.to(self.m.dtype)), memories))
        read = read.unflatten(2, (local.shape[1], -1)).transpose(1, 2).flatten(2, 3)
        share = torch.where(self._filled(), self.gate.sigmoid().unflatten(0, (memories, -1)), 0)
        return torch.lerp(local, read, share.flatten(1)[:, None, :, None])

    def write(self, k_mem: Tensor, v: Tensor, rows: Tensor | None, real: Tensor | None = None) -> None:
        """Add a segment `[B,t,kv_heads,...]` to the `rows` (bool `[B]`; None is all); `real` `[B,t]` says of which
        tokens it consists."""
        memories, shared = self.m.shape[1], self.m.shape[1] // v.shape[2]
        features, v = elu_plus_one(k_mem.to(self.m.dtype)), v.to(self.m.dtype)
        features, v = (_by_head(x.repeat_interleave(shared, 2), memories) for x in (features, v))
        if self.delta and not self.empty:
            v = v - torch.where(self._filled()[..., None], self._read(features), 0)
        if real is not None:
            features = torch.where(real[:, None, :, None], features, 0)
        m, z = self.m + features.mT @ v, self.z + features.sum(2)
        if rows is not None:
            m, z = torch.where(rows[:, None, None, None], m, self.m), torch.where(rows[:, None, None], z, self.z)
        self.m, self.z, self.empty = m, z, False

    def _filled(self) -> Tensor:
        """`[B,N,1]`"""
        return self.z.any(-1, keepdim=True)

    def _read(self, features: Tensor) -> Tensor:
        """`[B,N,t,V]` of `features` `[B,N,t,K]`; of an empty memory, anything finite."""
        norm = features @ self.z[..., None]
        return features @ self.m / torch.where(self._filled()[..., None], norm, 1)


def _split(x: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    """x `[B,t,...]` cut at `ends`."""
    return x.split([end - start for start, end in pairwise([0, *ends])], 1)


def _by_head(x: Tensor, memories: int) -> Tensor:
    """`[B,t,H,D]` as `[B,N,t*H/N,D]`, the heads of a token side by side."""
    return x.unflatten(2, (memories, -1)).transpose(1, 2).flatten(2, 3)


def within_segments(q: Tensor, k: Tensor, v: Tensor, segment: int) -> Tensor:
    """Attention of each query to the keys of its segment that are not after it."""
    past, key_length, outs = k.shape[1] - q.shape[1], k.shape[1], []
    first = min(segment, key_length) if past or key_length <= segment else 0
    last = key_length - (key_length - first) % segment
    if first:
        outs.append(softmax_attention(q[:, : first - past], k[:, :first], v[:, :first]))
    if last > first:
        whole = (x[:, first - y : last - y] for x, y in ((q, past), (k, 0), (v, 0)))
        out = softmax_attention(*(x.unflatten(1, (-1, segment)).flatten(0, 1) for x in whole))
        outs.append(out.unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    if last < key_length:
        outs.append(softmax_attention(q[:, last - past :], k[:, last:], v[:, last:]))
    return torch.cat(outs, 1)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    memories: _Memories,
    segment: int,
    bounds: list[int],
    write_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    starts = [start for pair in pairwise(bounds) for start in range(*pair, segment)]
    local = softmax_attention(
        q, k, v, cu_seqlens=torch.tensor([*starts, bounds[-1]], dtype=torch.int32, device=q.device)
    )
    outs, ends = [], memories.documents()
    parts = zip(*(_split(x, bounds[1:]) for x in (local, q_mem, k_mem, v)), strict=True)
    for (own_local, own_q, own_k, own_v), own in zip(parts, ends, strict=True):
        if own_q.shape[1]:
            outs.append(own.run(own_local, own_q, own_k, own_v, segment, write_last))
    out = torch.cat(outs, 1).to(q.dtype)
    return out, torch.cat([own.m for own in ends]), torch.cat([own.z for own in ends])


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    memories: _Memories,
    segment: int,
    key_mask: Tensor,
    write_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's real tokens brought together at its beginning, each query beside its own key."""
    past = key_mask.shape[1] - q.shape[1]
    order = real_first(key_mask)
    tokens = key_mask.sum(1)
    columns = torch.arange(key_mask.shape[1], device=q.device)
    real = (columns < tokens[:, None])[..., None, None]

    def gathered(x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, places[..., None, None].expand(-1, -1, *x.shape[2:]))

    q, q_mem = (
        torch.where((order >= past)[..., None, None], gathered(x, (order - past).clamp(min=0)), 0) for x in (q, q_mem)
    )
    q, q_mem, k, v, k_mem = (torch.where(real, x, 0) for x in (q, q_mem, *(gathered(x, order) for x in (k, v, k_mem))))
    out = memories.run(within_segments(q, k, v, segment), q_mem, k_mem, v, segment, write_last, tokens)
    place = (key_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    out = torch.where(key_mask[:, past:, None, None], gathered(out, place), 0)
    return out.to(q.dtype), memories.m, memories.z
