"""select_blocks for some queries at a time: memory is linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.interval_attention.chunked import chunks, softmax


@torch.library.custom_op("zoo::select_blocks", mutates_args=())
def _select_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    top_n: int,
    first_blocks: int,
    local_blocks: int,
    recent_blocks: int | None,
    scale: float,
) -> Tensor:
    batch, length = q.shape[:2]
    chosen = torch.full((batch, length, k.shape[2], top_n), -1, device=q.device)
    visible = ((position + 1 - compress_block + compress_stride) // compress_stride).clamp(min=0)
    per_block, reach = select_block // compress_stride, compress_block // compress_stride
    # How many strides compressed block i has in selected block j, for i from per_block * j - (reach - 1) on.
    strides = torch.ones(1, 1, per_block), torch.ones(1, 1, reach)
    weights = F.conv1d(F.pad(strides[0], (reach - 1, reach - 1)), strides[1])[0, 0]
    for chunk in chunks(q, k, first, first + visible, scale):
        now = chunk.queries
        p = softmax(chunk.logits)[0].sum(3)  # over the heads of a group: [b, K, n, keys]
        own = position[:, now] // select_block  # of no query -1
        count = int(own.max()) + 1
        if count == 0:
            continue
        # Counted from the document's start instead of the chunk's first key.
        ranks = torch.arange(count * per_block, device=q.device)
        columns = (first[:, now, None] - chunk.keys.start + ranks)[:, None].expand(-1, p.shape[1], -1, -1)
        hidden = ranks >= visible[:, None, now, None]
        if p.shape[-1]:
            p = p.gather(-1, columns.clamp(0, p.shape[-1] - 1)).masked_fill(hidden, 0)
        else:
            p = p.new_zeros(hidden.shape).expand_as(columns)
        windows = F.pad(p, (reach - 1, 0)).unfold(-1, per_block + reach - 1, per_block)
        scores = (windows * weights.to(p)).sum(-1)
        blocks, own = torch.arange(count, device=q.device), own[:, None, :, None]
        # Of blocks without any score the latest is the best.
        scores = torch.where(scores > 0, scores, (blocks - count).to(scores))
        forced = (blocks < first_blocks) | (blocks > own - local_blocks)
        hidden = blocks > own
        if recent_blocks is not None:
            hidden = hidden | ((blocks <= own - recent_blocks) & ~forced)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(hidden, -torch.inf)
        best = scores.topk(min(top_n, count), sorted=False)
        found = best.indices.masked_fill(best.values == -torch.inf, -1)
        chosen[:, now, :, : found.shape[-1]] = found.transpose(1, 2)
    return chosen


@_select_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
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
