"""select_blocks for some queries at a time: memory is linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.interval_attention.chunked import by_head, chunks, exponentials, keys_by_head


@torch.library.custom_op("zoo::select_blocks", mutates_args=())
def _select_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
    lse: Tensor | None,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    top_n: int,
    first_blocks: int,
    local_blocks: int,
    recent_blocks: int | None,
    scale: float,
) -> Tensor:
    (batch, length), kv_heads = q.shape[:2], k.shape[2]
    chosen = torch.full((batch, length, kv_heads, top_n), -1, device=q.device)
    visible = ((position + 1 - compress_block + compress_stride) // compress_stride).clamp(min=0)
    per_block, reach = select_block // compress_stride, compress_block // compress_stride
    # How many strides each compressed block of a selected one has in it, and each of the selected block before.
    index = torch.arange(per_block, device=q.device)
    weights = torch.stack([(index + reach).clamp(max=per_block) - index, (index - per_block + reach).clamp(min=0)], 1)
    rows, short = by_head(q, kv_heads) * scale, keys_by_head(k, length)
    weights = weights.to(rows)
    if lse is not None:
        lse = by_head(lse.masked_fill(lse == -torch.inf, 0), kv_heads)[..., None].to(rows)
    for chunk in chunks(rows, short, first, first + visible):
        now = chunk.queries
        own = position[:, now] // select_block  # of no query -1
        count = int(own.max()) + 1
        if count == 0:
            continue
        p = _summed(chunk.logits, None if lse is None else lse[:, now]).unflatten(0, (batch, kv_heads))
        if not chunk.aligned:  # counted from the document's start instead of the chunk's first key
            ranks = torch.arange(count * per_block, device=q.device)
            columns = (first[:, now, None] - chunk.keys.start + ranks).clamp(0, p.shape[-1] - 1)[:, None]
            hidden = ranks >= visible[:, None, now, None]
            p = p.gather(-1, columns.expand(-1, kv_heads, -1, -1)).masked_fill_(hidden, 0)
        blocks_of = F.pad(p, (0, count * per_block - p.shape[-1])).unflatten(-1, (count, per_block))
        scores, before = (blocks_of @ weights).unbind(-1)
        scores[..., 1:] += before[..., :-1]
        blocks, own = torch.arange(count, device=q.device), own[:, None, :, None]
        forced = (blocks < first_blocks) | (blocks > own - local_blocks)
        hidden = blocks > own
        if recent_blocks is not None:
            hidden = hidden | ((blocks <= own - recent_blocks) & ~forced)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(hidden, -torch.inf)
        found = _best(scores, min(top_n, count))
        chosen[:, now, :, : found.shape[-1]] = found.transpose(1, 2)
    return chosen


def _summed(logits: Tensor, lse: Tensor | None) -> Tensor:
    """`[b*K, n, keys]`: the softmax of logits `[b*K, n, G, keys]`, summed over the heads of a group."""
    if not logits.shape[-1]:
        return logits.sum(2)
    if lse is not None:
        return logits.sub_(lse).exp_().sum(2)
    p, _, sums = exponentials(logits)
    return p.div_(sums).sum(2)


def _best(scores: Tensor, top_n: int) -> Tensor:
    """`[..., top_n]`: where scores `[..., count]` are highest, of equal ones the latest; -1 for negative ones."""
    count = scores.shape[-1]
    if scores.dtype == torch.float64:
        values, order = (x[..., :top_n] for x in scores.flip(-1).sort(stable=True, descending=True))
        return (count - 1 - order).masked_fill_(values < 0, -1)
    # Whole numbers that hold the score, then the block: floats from 0 on are in the order of their bits.
    keys = (scores.view(torch.int32).long() << 31) + torch.arange(count, device=scores.device)
    best = keys.topk(top_n, sorted=False).values
    return (best & (2**31 - 1)).masked_fill_(best < 0, -1)


@_select_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
    lse: Tensor | None,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    top_n: int,
    first_blocks: int,
    local_blocks: int,
    recent_blocks: int | None,
    scale: float,
) -> Tensor:
    return position.new_empty(*q.shape[:2], k.shape[2], top_n)


implements("select_blocks", "torch")(_select_blocks)
