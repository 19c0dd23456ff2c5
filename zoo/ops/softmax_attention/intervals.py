"""What a query sees as a few intervals of keys, which is all that the kernels know (zoo/ops/interval_attention).

A window, or everything up to the query, is one interval of the keys as they stand; in a padded row some of these are
not real. The rest of a Pattern becomes intervals once the keys are laid out for it:

    dilation       documents are sorted by rank % dilation, so that what a query's window holds stands side by side
    sinks, stride  those of all documents stand side by side behind the other keys: the "far" keys
    random blocks  one interval each; queries are laid out in whole tiles for each block of them, since those of a tile
                   should see the same blocks

Intervals of a query share no key: the window leaves the sinks out, the stride both, and the random blocks all three.

Legend: B rows of the batch, T queries, S keys, N documents of a row (1 unless packed), R slots, the intervals of a
query. Every tensor may have 1 row for all B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.softmax_attention.pattern import Pattern
from zoo.ops.varlen import document_ids, real_first


class Intervals(NamedTuple):
    """The intervals of queries and keys, and how these are laid out for them.

    first, stop  int32 `[R, B, T']`, the bounds
    is_real      bool `[B, S']`, False for a key that nobody sees; None where all are real
    queries      int64 `[B, T']`, the query that stands there; one that sees nothing there may be any. None as they are
    outputs      int64 `[B, T]`, where each query stands
    keys         int64 `[B, S']`, the key that stands there; None as they are
    near         how many slots come before the far ones
    far          `(start, stop)`, where the keys of the far slots stand
    in_order     that in every near slot the intervals move on with the queries
    """

    first: Tensor
    stop: Tensor
    is_real: Tensor | None = None
    queries: Tensor | None = None
    outputs: Tensor | None = None
    keys: Tensor | None = None
    near: int = 1
    far: tuple[int, int] = (0, 0)
    in_order: bool = True


def as_they_stand(
    length: int,
    key_length: int,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
) -> Intervals:
    """Everything (up to the query, if causal), or a window. Sinks need one document and no mask."""
    index = torch.arange(key_length, device=device, dtype=torch.int32)[None]
    start, end = torch.zeros_like(index), torch.full_like(index, key_length)
    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, key_length)
        start, end = cu_seqlens[document][None], cu_seqlens[document + 1][None]
    first = start if window is None else torch.maximum(start, index - (window - 1))
    stop = index + 1 if causal else end
    if key_mask is not None:
        rank = key_mask.cumsum(1, dtype=torch.int32) - 1
        oldest = torch.zeros_like(rank) if window is None else (rank - (window - 1)).clamp_min(0)
        first = torch.searchsorted(rank, oldest, out_int32=True)
        last = torch.searchsorted(rank, rank[:, -1:].contiguous(), out_int32=True)
        stop = torch.where(key_mask, stop if causal else last + 1, 0)
    first, stop = first[None, :, -length:], stop[None, :, -length:]
    if not num_sinks:
        return Intervals(first, stop, key_mask)
    sinks = torch.zeros_like(first), first.clamp_max(num_sinks)
    return Intervals(torch.cat([first, sinks[0]]), torch.cat([stop, sinks[1]]), far=(0, num_sinks))


def laid_out(
    length: int,
    key_length: int,
    pattern: Pattern,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    tokens: int,
    device: torch.device,
) -> Intervals:
    """Any pattern. `tokens` is a multiple of the queries that a tile holds."""
    documents = _Documents.of_rows(key_length, pattern.dilation, cu_seqlens, key_mask, device)
    own, rank, start, of, real = (x[:, -length:] for x in documents[:5])
    # How many sinks are in a query's class, which they begin; they are left to their own slot.
    sinks = ((pattern.num_sinks - rank % pattern.dilation - 1) // pattern.dilation + 1).clamp_min(0)
    first = start + sinks
    if pattern.window is not None:
        first = torch.maximum(first, own - (pattern.window - 1))
    oldest = first - start  # the rank, where there is no dilation
    bounds, parts, is_real = [(first, own + 1)], [documents.order], None
    if pattern.random_blocks:
        origin = start
        if pattern.stride is not None:  # then they have a copy of the keys, where those on the stride are not real
            parts, origin = 2 * parts, start + key_length
            is_real = (documents.rank.gather(1, documents.order) + 1) % pattern.stride != 0
        for block in pattern.chosen(rank // pattern.block_size):
            begin = (block * pattern.block_size).clamp_min(pattern.num_sinks)
            end = torch.minimum((block + 1) * pattern.block_size, oldest)
            bounds.append((origin + begin, torch.where(block < 0, 0, origin + end)))
    near, size = len(bounds), len(parts) * key_length
    far = size
    if pattern.num_sinks:
        base = size + of * pattern.num_sinks
        bounds.append((base, base + (rank + 1).clamp_max(pattern.num_sinks)))
        counts = torch.full_like(documents.lengths, pattern.num_sinks)
        parts.append(documents.keys(counts, counts.shape[1] * pattern.num_sinks, 0, 1))
        size += parts[-1].shape[1]
    if pattern.stride is not None:
        counts = documents.lengths // pattern.stride
        base = size + (counts.cumsum(1) - counts).gather(1, of)
        bounds.append((base + pattern.num_sinks // pattern.stride, base + oldest // pattern.stride))
        parts.append(documents.keys(counts, key_length // pattern.stride, pattern.stride - 1, pattern.stride))
        size += parts[-1].shape[1]
    if is_real is not None:
        others = is_real.new_ones(len(is_real), size - far)
        is_real = torch.cat([torch.ones_like(is_real), is_real, others], 1)
    first, stop = (torch.stack(x) for x in zip(*bounds, strict=True))
    stop = torch.where(real, stop, 0)
    keys = None if len(parts) == 1 and documents.is_sorted else torch.cat(parts, 1)
    layout = Intervals(first.int(), stop.int(), is_real, keys=keys, near=near, far=(far, size), in_order=near == 1)
    if pattern.random_blocks:
        return _by_blocks(layout, documents, length, pattern.block_size, tokens)
    if pattern.dilation > 1:
        queries = own.argsort(1)
        slots = queries.expand(len(first), -1, -1)
        return layout._replace(
            first=layout.first.gather(2, slots),
            stop=layout.stop.gather(2, slots),
            queries=queries,
            outputs=queries.argsort(1),
        )
    return layout


class _Documents(NamedTuple):
    """The tokens sorted by document, by rank % dilation, and by rank; those that are not real come last.

    place      `[B, S]`, where a token stands
    rank       `[B, S]`, its number in its document
    start      `[B, S]`, where those of its document and its rank % dilation begin
    of         `[B, S]`, its document
    is_real    `[B, S]`
    order      `[B, S]`, the token that stands at each place
    by_rank    `[B, S]`, the same without the dilation
    lengths    `[B, N]`
    is_sorted  whether they stand like this anyway
    """

    place: Tensor
    rank: Tensor
    start: Tensor
    of: Tensor
    is_real: Tensor
    order: Tensor
    by_rank: Tensor
    lengths: Tensor
    is_sorted: bool

    @classmethod
    def of_rows(
        cls, key_length: int, dilation: int, cu_seqlens: Tensor | None, key_mask: Tensor | None, device: torch.device
    ) -> _Documents:
        index = torch.arange(key_length, device=device)[None]
        of, rank, is_real, by_rank = torch.zeros_like(index), index, torch.ones_like(index, dtype=torch.bool), index
        lengths = torch.full_like(index[:, :1], key_length)
        if cu_seqlens is not None:
            of, lengths = document_ids(cu_seqlens, key_length)[None], cu_seqlens.diff().long()[None]
            rank = index - cu_seqlens.long()[of]
        if key_mask is not None:
            of, is_real, rank = of.expand(key_mask.shape), key_mask, (key_mask.cumsum(1) - 1).clamp_min(0)
            lengths, by_rank = key_mask.sum(1, keepdim=True), real_first(key_mask)
        group = torch.where(is_real, of * dilation + rank % dilation, lengths.shape[1] * dilation)
        if dilation == 1:
            order = by_rank
        else:
            order = group.argsort(dim=1, stable=True)
        is_sorted = order is index
        place = index if is_sorted else order.argsort(1)
        start = torch.searchsorted(group.gather(1, order), group)
        return cls(place, rank, start, of, is_real, order, by_rank, lengths, is_sorted)

    def keys(self, counts: Tensor, size: int, first: int, step: int) -> Tensor:
        """int64 `[B, size]`: of each document in turn the tokens of rank first, first + step, ..., `counts` of them,
        `[B, N]`. A rank that the document does not have, or a place that is left over, may have any token."""
        at = torch.arange(size, device=counts.device).expand(len(counts), -1).contiguous()
        ends = counts.cumsum(1)
        document = torch.searchsorted(ends, at, right=True).clamp_max(counts.shape[1] - 1)
        number = at - (ends - counts).gather(1, document)
        begins = (self.lengths.cumsum(1) - self.lengths).gather(1, document)
        return self.by_rank.gather(1, (begins + first + step * number).clamp_max(self.by_rank.shape[1] - 1))


def _by_blocks(layout: Intervals, documents: _Documents, length: int, block_size: int, tokens: int) -> Intervals:
    """Each block of queries in as many whole tiles as hold it; those that are not real in one of their own."""
    rank, of, is_real = (x[:, -length:] for x in (documents.rank, documents.of, documents.is_real))
    counts = (documents.lengths + block_size - 1) // block_size
    block = rank // block_size
    earliest = torch.where(is_real, block, documents.rank.shape[1]).amin(1, keepdim=True)
    number = (counts.cumsum(1) - counts).gather(1, of) + block - earliest
    most = length // block_size + counts.shape[1] + 1  # a bound, whatever the documents' lengths
    width = -(-block_size // tokens) * tokens
    outputs = torch.where(is_real, number * width + rank % block_size, most * width)
    empty = outputs.new_zeros(len(outputs), (most + 1) * width)
    queries = empty.scatter(1, outputs, torch.arange(length, device=outputs.device).expand_as(outputs))
    is_query = empty.bool().scatter(1, outputs, is_real)
    slots = queries.expand(len(layout.first), -1, -1)
    return layout._replace(
        first=layout.first.gather(2, slots),
        stop=torch.where(is_query, layout.stop.gather(2, slots), 0),
        queries=queries,
        outputs=outputs,
    )
