"""block_sparse_attention some blocks of keys at a time, each for all the queries that chose it: memory is linear in the
length.

Queries are gathered and outputs added up: with as many of either as there are choices, S G D numbers for a query where
copying the blocks would take S C D. Blocks at the same place, of other rows, documents or heads, go together where
about as many queries chose them; no query chose two of those, so outputs are added up in the same order on any device.
The forward goes twice over the blocks, for lse and for out. The backward computes the probabilities again, from lse:

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
from torch.nn.functional import pad

from zoo.ops.block_sparse_attention.autograd import register
from zoo.ops.block_sparse_attention.places import Places
from zoo.ops.dispatch import implements

MAX_LOGITS = 2**19  # of blocks that go together


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
        whole, flat = list(_batches(places, blocks, rows.shape[2])), _with_zero(rows)
        k, v = (_keys_with_zero(x) for x in (k, v))
        parts = flat.new_full((blocks.numel() + 1, rows.shape[2]), -torch.inf)
        for batch in whole:
            parts[batch.choices] = batch.logits(flat, k).logsumexp(-1)
        lse = parts[:-1].view(queries, kv_heads, chosen, -1).logsumexp(2).transpose(0, 1)
        out, levels = flat.new_zeros(*flat.shape[:2], v.shape[1]), _with_zero(lse[..., None])
        for batch in whole:
            p = batch.probabilities(flat, k, levels).flatten(1, 2)
            out.index_add_(0, batch.rows.flatten(), (p @ _take(v, batch.keys)).view(-1, *out.shape[1:]))
        out = out[:-1].view(*rows.shape[:3], -1)
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
    rows, d_rows, delta, lse = (_by_head(x, k.shape[2]) for x in (q, d_out, delta[..., None], lse[..., None]))
    flat, d_flat, delta, lse = (_with_zero(x) for x in (rows * scale, d_rows, delta, lse))
    keys, values = (_keys_with_zero(x) for x in (k, v))
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (flat, keys, values))
    for batch in _batches(places, blocks, rows.shape[2]):
        p = batch.probabilities(flat, keys, lse)
        d_own = _take(d_flat, batch.rows).flatten(1, 2)
        d_v[batch.keys] = p.flatten(1, 2).mT @ d_own
        d_p = (d_own @ _take(values, batch.keys).mT).view(p.shape)
        d_logits = (d_p - _take(delta, batch.rows)).mul_(p).flatten(1, 2)
        d_k[batch.keys] = d_logits.mT @ _take(flat, batch.rows).flatten(1, 2)
        d_q.index_add_(0, batch.rows.flatten(), (d_logits @ _take(keys, batch.keys)).view(-1, *flat.shape[1:]))
    d_q = _by_token(d_q[:-1].view(rows.shape) * scale, *q.shape[:3]).to(q.dtype)
    return d_q, d_k[:-1].view(k.shape).to(k.dtype), d_v[:-1].view(v.shape).to(v.dtype)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, T, H, ...]` to `[K, N, G, ...]` in at least float32."""
    x = x.flatten(0, 1).unflatten(1, (kv_heads, -1)).transpose(0, 1)
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _by_token(x: Tensor, batch: int, length: int, heads: int) -> Tensor:
    """The inverse."""
    return x.transpose(0, 1).reshape(batch, length, heads, *x.shape[3:]).contiguous()  # one of G = 1 would be a view


def _with_zero(x: Tensor) -> Tensor:
    """`[K*N + 1, G, D]` of `[K, N, G, D]`: the last is 0, for what is not there."""
    return pad(x.flatten(0, 1), (0, 0, 0, 0, 0, 1))


def _keys_with_zero(x: Tensor) -> Tensor:
    """`[B*L*K + 1, D]` of `[B, L, K, D]`, in at least float32."""
    return pad(x.flatten(0, 2).to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, 1))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, in half the time."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


class _Batch(NamedTuple):
    """n blocks, each of one kv head, and the m queries or fewer that chose each.

    rows     `[n, m]`, among `[K*N + 1]`
    choices  `[n, m]`, among `[N*K*S + 1]`
    keys     `[n, C]`, among `[B*L*K + 1]`
    hidden   `[n, first, C]`, True where the first queries come before a key; the others see them all. A block that its
             document does not fill has no others.
    """

    rows: Tensor
    choices: Tensor
    keys: Tensor
    hidden: Tensor

    def logits(self, rows: Tensor, k: Tensor) -> Tensor:
        """`[n, m, G, C]`."""
        own = _take(rows, self.rows)
        logits = (own.flatten(1, 2) @ _take(k, self.keys).mT).view(*own.shape[:3], -1)
        logits[:, : self.hidden.shape[1]].masked_fill_(self.hidden[:, :, None], -torch.inf)
        return logits

    def probabilities(self, rows: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return self.logits(rows, k).sub_(_take(lse, self.rows)).exp_()


def _batches(places: Places, blocks: Tensor, group: int) -> Iterator[_Batch]:
    """All that anybody chose."""
    size, (total, kv_heads, chosen) = places.block_size, blocks.shape
    choices, bounds = places.lists(blocks)
    counts = bounds.diff()
    lists = counts.nonzero().squeeze(1)
    place = blocks.flatten()[choices[bounds[lists]]].long()
    order = (place * (total + 1) - counts[lists]).argsort()  # by place, the longest first
    lists, place = lists[order], place[order]
    first, counts, heads = bounds[lists], counts[lists], lists % kv_heads
    # What all queries of a list have in common is said by its first one.
    query = choices[first] // (kv_heads * chosen)
    rows = query // places.length
    columns = places.key_length - places.length + query % places.length
    begins = torch.zeros_like(rows) if places.start is None else places.start[columns]
    ends = torch.full_like(begins, places.key_length)
    if places.cu_seqlens is not None:
        ends = places.cu_seqlens[1:].long()[places.document[columns]]
    if places.position is not None:  # what is masked is never multiplied: it may be NaN
        ends = places.position.amax(1)[rows] + 1
    inside = torch.arange(size, device=places.device)
    columns = (begins + place * size)[:, None] + inside
    absent = columns >= ends[:, None]
    columns = columns.clamp(max=places.key_length - 1)
    if places.order is not None:
        columns = places.order[rows[:, None], columns]
    keys = (rows[:, None] * places.key_length + columns) * kv_heads + heads[:, None]
    keys = keys.masked_fill_(absent, places.batch * places.key_length * kv_heads)
    position = places.of_queries(places.per_key())
    for now, longest in _alike(place.tolist(), counts.tolist(), MAX_LOGITS // (group * size)):
        index = torch.arange(longest, device=places.device)
        absent = index >= counts[now, None]
        own = choices[(first[now, None] + index).clamp(max=len(choices) - 1)]
        query = own // (kv_heads * chosen)
        seen = position[query[:, :size]] - place[now, None] * size
        yield _Batch(
            (heads[now, None] * total + query).masked_fill_(absent, kv_heads * total),
            own.masked_fill_(absent, blocks.numel()),
            keys[now],
            inside > seen[..., None],
        )


def _alike(places: list[int], counts: list[int], most: int) -> Iterator[tuple[slice, int]]:
    """Of lists in order, which to take together, and the longest of them: of one place, none below half the longest,
    with `most` queries at most unless it is one list."""
    begin = 0
    for i in range(1, len(places) + 1):
        longest = counts[begin]
        if (
            i == len(places)
            or places[i] != places[begin]
            or 2 * counts[i] < longest
            or (i + 1 - begin) * longest > most
        ):
            yield slice(begin, i), longest
            begin = i


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
