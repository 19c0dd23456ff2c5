"""Landmark attention to the top_k earlier blocks of each query: a block at a time, against the queries that chose it.

The landmarks' scores decide; they alone grow with the length squared, by the size of a block less. An entry is a head
of a query with a block it reads, one of those chosen or its own. In the names of chunked.py, with o_b what it reads,

    out = sum_b pi_b o_b,   o_b = sum_{j in b} a_j v_j,   c_b = dO . o_b of a chosen block, D = dO . out of the own
    dv_j = sum P_j dO,   ds_j = P_j (dO . v_j - c_b),   ds_landmark(b) = pi_b (c_b - D)

and all sums over j are over one block. The entries of a block are cut into lists of equal length, the last one with
empty places, so that batches of matrices serve them all. Blocks of up to 1, 2, 4, 8 ... keys are taken together:
whatever their sizes, memory is linear.

Legend: N queries, K kv heads, G query heads per kv head, R chosen blocks, D head_dim; in a part, n lists of C entries
and w keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import outside_autocast
from zoo.ops.landmark_attention.choice import best_blocks
from zoo.ops.varlen import document_ids

MAX_LOGITS = 2**20  # the most logits of landmarks held at once
MAX_READ = 2**24  # the most numbers that the entries of some heads read
MAX_PART = 2**21  # the most numbers of a part, its keys, queries and logits
MAX_LIST = 256  # entries
MAX_LISTS = 256  # of a part
FEW = 64  # landmarks: so many products in vain for each query cost less than another tile


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    top_k: int,
    fused: bool = False,
) -> Tensor:
    """`fused`: the lists by the kernels of kernels.py."""
    out: Tensor = _forward(q, k, v, is_landmark, scale, cu_seqlens, key_mask, top_k, fused)[0]
    return out


# Opaque operators: torch.compile would otherwise unroll the loops into its graph.


@torch.library.custom_op("zoo::landmark_attention_chosen_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    top_k: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and `[b, T, H, R + 1]` of each query: the blocks it reads, its own last, -1 for none; their pi; their L."""
    blocks = _Blocks(q, is_landmark, cu_seqlens, key_mask)
    queries, keys, values = blocks.queries(q, k.shape[2]) * scale, blocks.keys(k), blocks.keys(v)
    chosen, logits = blocks.choose(queries, keys, _slots(k, top_k))
    out = queries.new_zeros(*queries.shape[:3], v.shape[3])
    pi, lse = torch.zeros_like(logits), torch.zeros_like(logits)
    for heads in _heads(chosen, v.shape[3]):
        lists = _Lists(blocks, chosen[:, heads])
        q_rows = queries[:, heads].flatten(0, 2).contiguous()
        sums, read = q_rows.new_full((lists.entries + 1,), -torch.inf), q_rows.new_zeros(lists.entries + 1, v.shape[3])
        for size in lists.sizes:
            _lists_by(fused, size, q_rows, keys, values).read(size, heads, q_rows, keys, values, sums, read, scale)
        shape = chosen[:, heads].shape
        each = logits[:, heads]
        each[..., -1] = sums[:-1].view(shape)[..., -1]
        pi[:, heads] = each.softmax(-1).nan_to_num_(0.0)  # of a query that sees nothing
        lse[:, heads] = sums[:-1].view(shape)
        out[:, heads] = (pi[:, heads, :, None] @ read[:-1].view(*shape, v.shape[3]))[..., 0, :]
    return (
        blocks.of_queries(out, q.shape).to(q.dtype),
        blocks.of_queries(chosen, q.shape, -1),
        blocks.of_queries(pi, q.shape),
        blocks.of_queries(lse, q.shape),
    )


@torch.library.custom_op("zoo::landmark_attention_chosen_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    out: Tensor,
    chosen: Tensor,
    pi: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    blocks = _Blocks(q, is_landmark, cu_seqlens, key_mask)
    keys, values = blocks.keys(k), blocks.keys(v)
    queries, grads, outs, chosen, pi, lse = (blocks.queries(x, k.shape[2]) for x in (q, grad_out, out, chosen, pi, lse))
    queries = queries * scale
    totals = (grads * outs).sum(-1)
    grad_q, grad_k, grad_v = torch.zeros_like(queries), *(queries.new_zeros(x.shape) for x in (keys, values))
    for heads in _heads(chosen, k.shape[3]):
        lists = _Lists(blocks, chosen[:, heads])
        q_rows, g_rows, total = (x[:, heads].flatten(0, 2).contiguous() for x in (queries, grads, totals))
        # An empty place has no share, and its logits are far below.
        shares = torch.cat([pi[:, heads].flatten(), pi.new_zeros(1)])
        sums = torch.cat([lse[:, heads].flatten(), lse.new_full((1,), torch.inf)])
        read = q_rows.new_zeros(lists.entries + 1, q.shape[3])
        for size in lists.sizes:
            by_group = [
                q_rows.new_zeros(len(size.group), n)
                for n in (size.width * q.shape[3], size.width * v.shape[3], q.shape[3])
            ]
            _lists_by(fused, size, q_rows, keys, values).differentiate(
                size, heads, q_rows, g_rows, keys, values, shares, sums, total, read, by_group, scale
            )
            size.hand_out(by_group[0], grad_k[:, heads])
            size.hand_out(by_group[1], grad_v[:, heads])
            if not size.own:
                size.hand_out_to_landmarks(by_group[2], grad_k[:, heads])
        grad_q[:, heads] = read[:-1].view(*chosen[:, heads].shape, q.shape[3]).sum(-2)
    return (
        blocks.of_queries(grad_q * scale, q.shape).to(q.dtype),
        blocks.of_keys(grad_k, k).to(k.dtype),
        blocks.of_keys(grad_v, v).to(v.dtype),
    )


def _lists_by(fused: bool, size: _Size, q_rows: Tensor, keys: Tensor, values: Tensor) -> Any:
    """Who reads lists and differentiates that."""
    if fused:
        from zoo.ops.landmark_attention import kernels

        if kernels.Lists.fit(size, keys, values):
            return kernels.Lists
    return _InTorch


class _InTorch:
    @staticmethod
    def read(
        size: _Size, heads: slice, q_rows: Tensor, keys: Tensor, values: Tensor, sums: Tensor, read: Tensor, _: float
    ) -> None:
        """Of each entry the log-sum-exp into `sums`, and what it reads into `read`."""
        for part in size.parts(keys.shape[2] + values.shape[2]):
            a = part.logits(part.rows_of(q_rows), part.of(keys, heads))
            largest = a.logsumexp(-1, keepdim=True)
            sums[part.entries] = largest[..., 0]
            read[part.entries] = a.sub_(largest).exp_() @ part.of(values, heads)

    @staticmethod
    def differentiate(
        size: _Size,
        heads: slice,
        q_rows: Tensor,
        g_rows: Tensor,
        keys: Tensor,
        values: Tensor,
        shares: Tensor,
        sums: Tensor,
        total: Tensor,
        read: Tensor,
        by_group: list[Tensor],
        _: float,
    ) -> None:
        """Of each entry its part of dq into `read`, of each group its of dk, dv and dk of the landmark into zeros."""
        for part in size.parts(2 * (keys.shape[2] + values.shape[2])):
            q_part, k_part = part.rows_of(q_rows), part.of(keys, heads)
            share = shares[part.entries][..., None]
            grads_part = part.rows_of(g_rows).mul_(share)
            of_out = total[part.rows][..., None] * share
            a = part.logits(q_part, k_part).sub_(sums[part.entries][..., None]).exp_()
            products = (grads_part @ part.of(values, heads).mT).mul_(a)
            if size.own:
                grad_logits = products.addcmul_(a, of_out, value=-1)
                grad_landmark = torch.zeros_like(of_out)
            else:
                of_read = products.sum(-1, keepdim=True)
                grad_logits = products.addcmul_(a, of_read, value=-1)
                grad_landmark = of_read - of_out
            read_part = grad_logits @ k_part
            if not size.own:
                read_part.addcmul_(grad_landmark, part.landmarks(keys, heads))
            read[part.entries] = read_part
            gradients = grad_logits.mT @ q_part, a.mT @ grads_part, grad_landmark.mT @ q_part
            for to, each in zip(by_group, gradients, strict=True):
                part.add(to, each)


def _slots(k: Tensor, top_k: int) -> int:
    """R: a block that can be chosen has a key and a landmark at least."""
    return min(top_k, k.shape[1] // 2)


def _heads(chosen: Tensor, dim: int) -> Iterator[slice]:
    """So many kv heads at once that what their entries read is not too much."""
    kv_heads = chosen.shape[1]
    size = max(1, MAX_READ * kv_heads // max(1, chosen.numel() * dim))
    return (slice(start, min(start + size, kv_heads)) for start in range(0, kv_heads, size))


class _Blocks:
    """Where blocks lie among the real keys of all rows; a block's ordinary ones are side by side.

    start, count  `[blocks]`, its first key, and how many ordinary ones
    landmark      `[blocks]`, -1 where there is none that stands for a key
    own           `[N]`, the query's block, ascending
    first_block   `[N]`, the first one of its sequence
    place         `[N]`, its own key
    """

    def __init__(self, q: Tensor, is_landmark: Tensor, cu_seqlens: Tensor | None, key_mask: Tensor | None) -> None:
        batch, key_length = is_landmark.shape
        length, device = q.shape[1], q.device
        real = torch.ones_like(is_landmark) if key_mask is None else key_mask
        sequence = torch.arange(batch, device=device)[:, None].expand_as(real)
        if cu_seqlens is not None:
            sequence = document_ids(cu_seqlens, key_length)[None]
        self.key_row = None if key_mask is None else real.flatten().nonzero()[:, 0]
        self.query_row = None if key_mask is None else real[:, key_length - length :].flatten().nonzero()[:, 0]
        rank = real.flatten().cumsum(0).sub_(1).view_as(real)
        self.place = self.of(rank[:, key_length - length :].reshape(-1), self.query_row)
        ends, sequence = self.of(is_landmark.flatten(), self.key_row), self.of(sequence.flatten(), self.key_row)
        begins = torch.ones_like(ends)
        begins[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
        block = begins.long().cumsum(0) - 1
        self.own = block[self.place]
        self.start = begins.nonzero()[:, 0]
        last = torch.cat([self.start[1:], self.start.new_full((1,), len(ends))])[: len(self.start)] - 1
        self.count = last - self.start + 1 - ends[last].long()
        self.landmark = torch.where(ends[last] & (self.count > 0), last, -1)
        # Those that can be chosen, and the range of them that a query sees.
        self.candidates = (self.landmark >= 0).nonzero()[:, 0]
        self.first_block = torch.searchsorted(sequence[self.start], sequence[self.start])[self.own]
        self.first, self.stop = (torch.searchsorted(self.candidates, x) for x in (self.first_block, self.own))

    @staticmethod
    def of(x: Tensor, index: Tensor | None) -> Tensor:
        return x if index is None else x[index]

    def queries(self, x: Tensor, kv_heads: int) -> Tensor:
        """`[b, T, H, ...]` to `[N, K, G, ...]`, floating numbers in at least float32."""
        x = self.of(x.flatten(0, 1), self.query_row).unflatten(1, (kv_heads, -1))
        return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x

    def of_queries(self, x: Tensor, shape: torch.Size, fill: float = 0) -> Tensor:
        """`[N, K, G, ...]` to `[b, T, H, ...]`, of a q of that shape."""
        x = x.flatten(1, 2)
        if self.query_row is not None:
            x = x.new_full((shape[0] * shape[1], *x.shape[1:]), fill).index_copy_(0, self.query_row, x)
        return x.unflatten(0, shape[:2])

    def keys(self, x: Tensor) -> Tensor:
        """`[b, S, K, D]` to the real ones."""
        return self.of(x.flatten(0, 1), self.key_row)

    def of_keys(self, x: Tensor, like: Tensor) -> Tensor:
        if self.key_row is not None:
            x = x.new_zeros(like.shape).flatten(0, 1).index_copy_(0, self.key_row, x)
        return x.view(like.shape)

    def _tiles(self, heads: int) -> tuple[int, list[list[int]]]:
        """How many queries to take together, and of each such tile the candidates `(first, stop)` that any sees."""
        own = self.stop - self.first
        longest, seen = torch.stack([own.max(), own.sum()]).tolist()
        size = max(1, min(MAX_LOGITS // max(1, 2 * longest * heads), math.isqrt(MAX_LOGITS // heads)))
        while True:
            firsts, stops = self.first.split(size), self.stop.split(size)
            spans = torch.stack([torch.stack([x.min(), y.max()]) for x, y in zip(firsts, stops, strict=True)]).tolist()
            # A tile that lies across sequences compares each query with the candidates of all.
            compared = size * sum(stop - first for first, stop in spans)
            if size == 1 or compared <= 4 * seen + FEW * len(own):
                return size, spans
            size //= 2

    def choose(self, queries: Tensor, keys: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """`[N, K, G, R + 1]`: the blocks a query reads, its own last, -1 for none; the logits of the chosen ones'
        landmarks, -inf for none and the own."""
        count, kv_heads, shared, _ = queries.shape
        chosen = self.own.new_full((count, kv_heads, shared, slots + 1), -1, dtype=torch.int32)
        logits = queries.new_full(chosen.shape, -torch.inf)
        chosen[..., -1] = torch.where(self.count > 0, torch.arange(len(self.count), device=chosen.device), -1)[
            self.own, None, None
        ]
        if slots == 0 or count == 0 or len(self.candidates) == 0:
            return chosen, logits
        landmarks = keys[self.landmark[self.candidates]].to(queries.dtype).permute(1, 2, 0)
        heads = kv_heads * shared
        size, spans = self._tiles(heads)
        for i, (first, stop) in enumerate(spans):
            now = slice(i * size, (i + 1) * size)
            index = torch.arange(first, stop, device=chosen.device)
            hidden = (index < self.first[now, None]) | (index >= self.stop[now, None])
            q_rows = queries[now].transpose(0, 1).flatten(1, 2)
            scores = (q_rows @ landmarks[..., first:stop]).unflatten(1, (-1, shared))
            scores.masked_fill_(hidden[:, None], -torch.inf)
            values, indices = best_blocks(scores, min(slots, stop - first))
            found = torch.where(values == -torch.inf, -1, self.candidates[first + indices])
            chosen[now, ..., : found.shape[-1]] = found.transpose(0, 1).int()
            logits[now, ..., : found.shape[-1]] = values.transpose(0, 1)
        return chosen, logits


class _Lists:
    """The entries `[N, K, G, R + 1]` of some heads, `entries` of them, by their blocks; `rows` are `[N, K, G]`."""

    def __init__(self, blocks: _Blocks, chosen: Tensor) -> None:
        self.blocks, self.entries = blocks, chosen.numel()
        self.kv_heads, self.shared, self.slots = chosen.shape[1:]
        self.sizes: list[_Size] = []
        block = chosen.flatten().long()
        if not self.entries:
            return
        is_own = (torch.arange(self.entries, device=chosen.device) + 1) % self.slots == 0
        # Up to 1, 2, 4, 8 ... keys.
        size = torch.where(block >= 0, torch.ceil(torch.log2(blocks.count.double()))[block].long() * 2 + is_own, -1)
        for each in size.unique().tolist():
            if each >= 0:
                self.sizes.append(_Size(self, block, (size == each).nonzero()[:, 0], each % 2 == 1))


class _Part(NamedTuple):
    """Some lists.

    entries   `[n, C]` of the heads', the last index (one too many) in an empty place
    rows      `[n, C]`, the query and head
    hidden    `[n, 1 or C, w]`, the keys that are not read; None where all are
    keys      `[n, w]` of all kv heads
    landmark  `[n]`
    kv_head   `[n]`
    group     `[n]`, which of its size's pairs of a block and a kv head it is
    """

    entries: Tensor
    rows: Tensor
    hidden: Tensor | None
    keys: Tensor
    landmark: Tensor
    kv_head: Tensor
    group: Tensor

    def rows_of(self, x: Tensor) -> Tensor:
        """`[n, C, D]` of `[rows, D]`."""
        return x.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)

    def of(self, x: Tensor, heads: slice) -> Tensor:
        """`[n, w, D]` of `[S, K, D]`."""
        index = self.keys * x.shape[1] + (heads.start + self.kv_head)[:, None]
        chosen = x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
        return chosen.to(torch.promote_types(x.dtype, torch.float32))

    def landmarks(self, x: Tensor, heads: slice) -> Tensor:
        """`[n, 1, D]` of `[S, K, D]`."""
        return x[self.landmark, heads.start + self.kv_head][:, None].to(torch.promote_types(x.dtype, torch.float32))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """`[n, C, w]`, -inf where a key is not read."""
        logits = q @ k.mT
        return logits if self.hidden is None else logits.masked_fill_(self.hidden, -torch.inf)

    def add(self, to: Tensor, x: Tensor) -> None:
        """`x` `[n, ...]` to the sums of its groups, `[groups, ...]`. Lists are sorted by group."""
        first, last = int(self.group[0]), int(self.group[-1]) + 1
        is_of = torch.arange(first, last, device=x.device)[:, None] == self.group
        to[first:last] += is_of.to(x.dtype) @ x.flatten(1)


class _Size:
    """The entries with blocks of about one size, which are all the own ones or all chosen ones. group `[groups]` is a
    block and a kv head, `block * K + head`."""

    def __init__(self, lists: _Lists, block: Tensor, entries: Tensor, own: bool) -> None:
        self.lists, self.own, kv_heads = lists, own, lists.kv_heads
        head = entries // (lists.shared * lists.slots) % kv_heads
        group, order = (block[entries] * kv_heads + head).sort(stable=True)
        self.group, number, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
        self.block, self.kv_head = self.group // kv_heads, self.group % kv_heads
        self.start, self.count = lists.blocks.start[self.block], lists.blocks.count[self.block]
        self.width = int(self.count.max())
        self.is_full = bool((self.count == self.width).all())
        # At most half as long as the entries of a group, so that few places are empty.
        mean = max(2, len(entries) // len(self.group))
        self.length = min(MAX_LIST, 1 << (mean.bit_length() - 2))
        number_of_lists = (counts + self.length - 1) // self.length
        first = number_of_lists.cumsum(0) - number_of_lists
        self.lists_of_group = torch.stack([first, number_of_lists])
        place = torch.arange(len(entries), device=entries.device) - (counts.cumsum(0) - counts)[number]
        self.list = torch.arange(len(self.group), device=entries.device).repeat_interleave(number_of_lists)
        filled = entries.new_full((len(self.list) * self.length,), lists.entries)
        filled[first[number] * self.length + place] = entries[order]
        self.filled = filled.view(-1, self.length)

    def parts(self, dims: int) -> Iterator[_Part]:
        """`dims` numbers of a key and of an entry are held."""
        lists, blocks = self.lists, self.lists.blocks
        each = self.length * self.width + (self.length + self.width) * dims
        inside = torch.arange(self.width, device=self.group.device)
        at_once = max(1, min(MAX_PART // each, MAX_LISTS))
        for entries, group in zip(self.filled.split(at_once), self.list.split(at_once), strict=True):
            rows = (entries // lists.slots).clamp_(max=lists.entries // lists.slots - 1)
            start, stop = self.start[group, None], (self.start + self.count)[group, None]
            index, hidden = start + inside, None
            if self.own:
                place = blocks.place[rows // (lists.kv_heads * lists.shared)]
                hidden = index[:, None] > torch.minimum(place, stop - 1)[..., None]
            elif not self.is_full:
                hidden = (index >= stop)[:, None]
            block = self.block[group]
            keys = torch.minimum(index, stop - 1)
            yield _Part(entries, rows, hidden, keys, blocks.landmark[block], self.kv_head[group], group)

    def hand_out(self, sums: Tensor, to: Tensor) -> None:
        """Add `sums` `[groups, w * D]` to their keys' of `[S, K, D]`."""
        inside = torch.arange(self.width, device=sums.device)
        group, place = (inside < self.count[:, None]).nonzero(as_tuple=True)
        to[self.start[group] + place, self.kv_head[group]] += sums.unflatten(1, (self.width, -1))[group, place]

    def hand_out_to_landmarks(self, sums: Tensor, to: Tensor) -> None:
        """Add `sums` `[groups, D]` to the keys of the blocks' landmarks."""
        to[self.lists.blocks.landmark[self.block], self.kv_head] += sums


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    top_k: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*q.shape[:3], _slots(k, top_k) + 1)
    wide = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(shape, dtype=torch.int32), wide, torch.empty_like(wide)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, is_landmark, ctx.scale, cu_seqlens, key_mask, _, ctx.fused = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, is_landmark, *output, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Any, ...]:
    *tensors, cu_seqlens, key_mask = ctx.saved_tensors
    grads = _backward(grad_out, *tensors, ctx.scale, cu_seqlens, key_mask, ctx.fused)
    return *grads, None, None, None, None, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
