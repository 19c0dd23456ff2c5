"""What a query sees as a few intervals of keys, which is all that the kernels know (zoo/ops/interval_attention).

A window, or everything up to the query, is one interval of the keys as they stand, in a padded row with keys in it that
are not real. The rest of a Pattern becomes intervals once the keys are laid out for it:

    dilation       documents are sorted by rank % dilation, so that what a query's window holds stands side by side
    sinks, stride  of each document, they stand side by side behind the keys: a "far" interval
    random blocks  one interval of the keys each; queries are laid out in whole tiles for each block of them, as
                   those of a tile should see the same blocks

Intervals of a query share no key: the window leaves out the sinks where those have their own, the stride what the sinks
and the window have, and the random blocks all these.

Legend: B rows of the batch, T queries, S keys, N documents of a row (1 unless packed), R slots, the intervals of a query.
Every tensor may have 1 row for all B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.ops.softmax_attention.pattern import Pattern
from zoo.ops.varlen import document_ids


class Intervals(NamedTuple):
    """The intervals of queries and keys that are laid out in a certain way.

    first, stop  int32 `[R, B, T']`, the bounds
    is_real      bool `[B, S']`, False for a key that nobody sees; None where all are real
    queries      int64 `[B, T']`, the query that stands there, or any one where none does; None as they are
    outputs      int64 `[B, T]`, where each query stands
    keys         int64 `[B, S']`, the key that stands there; None as they are
    near         how many slots come before the far ones
    far          `(start, stop)`, where the keys of the far slots stand
    is_monotone  that in every slot the intervals move on with the queries
    """

    first: Tensor
    stop: Tensor
    is_real: Tensor | None = None
    queries: Tensor | None = None
    outputs: Tensor | None = None
    keys: Tensor | None = None
    near: int = 1
    far: tuple[int, int] = (0, 0)
    is_monotone: bool = True


def plain(
    length: int,
    key_length: int,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
) -> Intervals:
    """Of keys as they stand: everything (up to the query, if causal), or a window."""
    index = torch.arange(key_length, device=device, dtype=torch.int32)[None]
    start, end = torch.zeros_like(index), torch.full_like(index, key_length)
    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, key_length)[None]
        start, end = cu_seqlens[document], cu_seqlens[document + 1]
    if key_mask is None:
        first = start if window is None else torch.maximum(start, index - (window - 1))
        stop = index + 1 if causal else end
    else:
        rank = key_mask.cumsum(1, dtype=torch.int32) - 1
        oldest = torch.zeros_like(rank) if window is None else (rank - (window - 1)).clamp_min(0)
        first = torch.searchsorted(rank, oldest, out_int32=True)
        last = torch.searchsorted(rank, rank[:, -1:].contiguous(), out_int32=True)
        stop = torch.where(key_mask, index + 1 if causal else last + 1, 0)
    return Intervals(first[None, :, -length:], stop[None, :, -length:], key_mask)


def patterned(
    length: int,
    key_length: int,
    pattern: Pattern,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    rows: int,
    device: torch.device,
) -> Intervals:
    """Of any pattern.

    rows  a tile of queries holds a divisor of this many
    """
    documents = _Documents(key_length, pattern.dilation, cu_seqlens, key_mask, device)
    own, rank, start = (x[:, -length:] for x in (documents.place, documents.rank, documents.start))
    document, is_query = documents.of[:, -length:], documents.is_real[:, -length:]
    # Sinks first, so that they are in no window.
    sinks = (pattern.num_sinks - rank % pattern.dilation + pattern.dilation - 1) // pattern.dilation
    first = start + sinks.clamp_min(0)
    if pattern.window is not None:
        first = torch.maximum(first, own - (pattern.window - 1))
    bounds = [(first, own + 1)]
    oldest = first - start  # in ranks, where there is no dilation
    parts = [documents.order]
    holes = None
    if pattern.random_blocks:
        origin = start
        if pattern.stride is not None:  # a copy of the keys without those of the stride
            parts.append(documents.order)
            origin = start + key_length
            held = documents.rank % pattern.stride == pattern.stride - 1
            holes = torch.zeros_like(held).scatter_(1, documents.place, held)
        for block in pattern.chosen(rank // pattern.block_size):
            begin = (block * pattern.block_size).clamp_min(pattern.num_sinks)
            end = torch.minimum((block + 1) * pattern.block_size, oldest)
            bounds.append((origin + begin, torch.where(block < 0, 0, origin + end)))
    near, far = len(bounds), sum(part.shape[1] for part in parts)
    if pattern.num_sinks:
        base = far + document * pattern.num_sinks
        bounds.append((base, base + (rank + 1).clamp_max(pattern.num_sinks)))
        parts.append(documents.keys(torch.full_like(documents.lengths, pattern.num_sinks), 0, 1))
    if pattern.stride is not None:
        counts = documents.lengths // pattern.stride
        base = sum(part.shape[1] for part in parts) + (counts.cumsum(1) - counts).gather(1, document)
        bounds.append((base + pattern.num_sinks // pattern.stride, base + oldest // pattern.stride))
        parts.append(documents.keys(counts, pattern.stride - 1, pattern.stride, key_length // pattern.stride))
    keys = torch.cat(parts, 1)
    first, stop = (torch.stack(x) for x in zip(*bounds, strict=True))
    stop = torch.where(is_query, stop, 0)
    is_real = None if holes is None else pad(pad(~holes, (key_length, 0), value=True), (0, keys.shape[1] - far), value=True)

    if pattern.random_blocks:
        # A block of queries gets whole tiles.
        size = triton_free_lcm(rows, pattern.block_size)
    return Intervals(first.int(), stop.int(), is_real, None, None, keys, near, (far, keys.shape[1]))
