"""block_sparse_attention a block of keys at a time, for all the queries that chose it: memory is linear in the length.

The keys of a block are multiplied where they stand, only queries are gathered and outputs added up: with as many of
either as there are choices, S G D numbers for a query where copying the blocks would take S C D. The forward goes twice
over the blocks, for lse and for out. The backward computes the probabilities again, from lse:

    P = exp(S - lse),   dV = P^T dO,   dS = P * (dO V^T - delta),   delta = rowsum(dO * O) - dlse
    dQ = dS K,   dK = dS^T Q

Queries so few that most blocks have no list, as one that is decoded, gather their keys instead.

Legend: N queries of all rows, K kv heads, G query heads per kv head, S blocks per query, C keys per block, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.block_sparse_attention.autograd import register
from zoo.ops.block_sparse_attention.places import Places
from zoo.ops.dispatch import implements


@implements("block_sparse_attention", "torch")
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
    out, lse, _ = _operator(q, k, v, block_indices, block_size, scale, cu_seqlens, key_mask)
    return out, lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    places = Places(q, k, block_size, cu_seqlens, key_mask)
    blocks = places.blocks(block_indices)
    rows, (queries, kv_heads, chosen) = _by_head(q, k.shape[2]), blocks.shape
    rows = rows * scale
    if queries * chosen < places.base()[1]:
        out, lse = _gathered(rows, k, v, blocks, places)
    else:
        whole = list(_blocks(places, blocks))
        parts = rows.new_full((queries * kv_heads * chosen, rows.shape[2]), -torch.inf)
        for block in whole:
            parts[block.choices] = block.logits(rows, k).logsumexp(-1)
        lse = parts.view(queries, kv_heads, chosen, -1).logsumexp(2).transpose(0, 1)
        out = rows.new_zeros(*rows.shape[:3], v.shape[3])
        for block in whole:
            p = block.probabilities(rows, k, lse)
            out[block.head].index_add_(0, block.queries, (p.flatten(0, 1) @ block.of(v)).view(*p.shape[:2], -1))
    out, lse = (_by_token(x, *q.shape[:3]) for x in (out, lse))
    return out.to(q.dtype), lse, blocks


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    places = Places(q, k, block_size, cu_seqlens, key_mask)
    delta = (d_out.to(lse.dtype) * out).sum(-1)
    if d_lse is not None:
        delta -= d_lse.masked_fill(lse == -torch.inf, 0)
    rows, d_rows, delta, lse = (_by_head(x, k.shape[2]) for x in (q, d_out, delta, lse))
    rows = rows * scale
    d_q, d_k, d_v = torch.zeros_like(rows), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for block in _blocks(places, blocks):
        p = block.probabilities(rows, k, lse)
        d_own = d_rows[block.head].index_select(0, block.queries).flatten(0, 1)
        block.put(d_v, p.flatten(0, 1).mT @ d_own)
        d_p = (d_own @ block.of(v).mT).view(p.shape)
        d_logits = (d_p - delta[block.head].index_select(0, block.queries)[..., None]).mul_(p).flatten(0, 1)
        block.put(d_k, d_logits.mT @ rows[block.head].index_select(0, block.queries).flatten(0, 1))
        d_q[block.head].index_add_(0, block.queries, (d_logits @ block.of(k)).view(*p.shape[:2], -1))
    return _by_token(d_q * scale, *q.shape[:3]).to(q.dtype), d_k, d_v


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, T, H, ...]` to `[K, N, G, ...]` in at least float32."""
    x = x.flatten(0, 1).unflatten(1, (kv_heads, -1)).transpose(0, 1)
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _by_token(x: Tensor, batch: int, length: int, heads: int) -> Tensor:
    """The inverse."""
    return x.transpose(0, 1).reshape(batch, length, heads, *x.shape[3:]).contiguous()  # one of G = 1 would be a view


class _Block(NamedTuple):
    """A block of keys for one kv head, and the m queries that chose it.

    row, keys  where it stands: columns, at most C
    queries    `[m]` of the N, ascending
    choices    `[m]`, their places among all N*K*S
    hidden     `[n, keys]`, True where the n first queries come before a key; the others see them all
    """

    row: int
    head: int
    keys: slice | Tensor
    queries: Tensor
    choices: Tensor
    hidden: Tensor

    def of(self, x: Tensor) -> Tensor:
        """`[keys, D]` of x `[B, L, K, D]`, in at least float32."""
        return x[self.row, self.keys, self.head].to(torch.promote_types(x.dtype, torch.float32))

    def put(self, x: Tensor, values: Tensor) -> None:
        x[self.row, self.keys, self.head] = values.to(x.dtype)

    def logits(self, rows: Tensor, k: Tensor) -> Tensor:
        """`[m, G, keys]` of rows `[K, N, G, D]`."""
        own = rows[self.head].index_select(0, self.queries)
        logits = (own.flatten(0, 1) @ self.of(k).mT).view(*own.shape[:2], -1)
        logits[: len(self.hidden)].masked_fill_(self.hidden[:, None], -torch.inf)
        return logits

    def probabilities(self, rows: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return self.logits(rows, k).sub_(lse[self.head].index_select(0, self.queries)[..., None]).exp_()


def _blocks(places: Places, blocks: Tensor) -> Iterator[_Block]:
    """All that anybody chose."""
    size, (_, kv_heads, chosen) = places.block_size, blocks.shape
    choices, bounds = places.lists(blocks)
    counts = bounds.diff()
    some = counts.nonzero().squeeze(1)
    heads = some.remainder(kv_heads).tolist()
    queries = choices // (kv_heads * chosen)
    # What all queries of a list have in common is said by its first one.
    first = bounds[some]
    rows = queries[first] // places.length
    columns = places.key_length - places.length + queries[first] % places.length
    begins = torch.zeros_like(rows) if places.start is None else places.start[columns]
    begins = begins + blocks.flatten()[choices[first]].long() * size
    ends = torch.full_like(begins, places.key_length)
    if places.cu_seqlens is not None:
        ends = places.cu_seqlens[1:].long()[places.document[columns]]
    if places.position is not None:  # what is masked is never multiplied: it may be NaN
        ends = places.position.amax(1)[rows] + 1
    seen = places.of_queries(places.per_key())[queries] + 1 - blocks.flatten()[choices].long() * size
    inside = torch.arange(size, device=places.device)
    spans = zip(first.tolist(), counts[some].tolist(), strict=True)
    where = zip(rows.tolist(), heads, begins.tolist(), ends.tolist(), strict=True)
    for (row, head, begin, end), (start, count) in zip(where, spans, strict=True):
        end = min(end, begin + size)
        hidden = inside[: end - begin] >= seen[start : start + min(count, size), None]
        keys = slice(begin, end) if places.order is None else places.order[row, begin:end]
        yield _Block(row, head, keys, queries[start : start + count], choices[start : start + count], hidden)


def _gathered(rows: Tensor, k: Tensor, v: Tensor, blocks: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """`(out, lse)` `[K, N, G, ...]` of queries that copy their keys and values."""
    size, device, wide = places.block_size, places.device, rows.dtype
    place = (blocks.long()[..., None] * size + torch.arange(size, device=device)).flatten(-2)
    own = places.of_queries(places.per_key())[:, None, None]
    hidden = (place < 0) | (place > own)
    row = torch.arange(len(blocks), device=device)[:, None, None] // places.length
    if places.start is not None:
        place = place + places.of_queries(places.start[None])[:, None, None]
    place = place.masked_fill(hidden, 0)
    if places.order is not None:
        place = places.order[row, place]
    heads = torch.arange(k.shape[2], device=device)[:, None]
    logits = rows @ k[row, place, heads].to(wide).permute(1, 0, 3, 2)
    logits.masked_fill_(hidden.transpose(0, 1)[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
    return p @ v[row, place, heads].to(wide).transpose(0, 1), lse


_operator, _backward_operator = register("block_sparse_attention", _forward, _backward)
