"""select_blocks one query at a time. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("select_blocks", "reference")
def select_blocks(
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
    """The blocks as the public function documents them."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped, k = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads)), k.to(dtype)
    chosen = torch.full((batch, length, kv_heads, top_n), -1, device=q.device)
    for row in range(batch):
        for query in range(length):
            t, begin = int(position[row, query]), int(first[row, query])
            if t < 0:
                continue
            visible = [i for i in range(t + 1) if i * compress_stride + compress_block - 1 <= t]
            logits = scale * grouped[row, query] @ k[row, begin : begin + len(visible)].permute(1, 2, 0)
            p = logits.softmax(-1).sum(1).tolist()
            own = t // select_block
            for head in range(kv_heads):
                scores = {}
                oldest = 0 if recent_blocks is None else own + 1 - recent_blocks
                for j in range(own + 1):
                    if first_blocks <= j < oldest:
                        continue
                    tokens = range(j * select_block, (j + 1) * select_block)
                    score = sum(
                        p[head][i] * len(_overlap(tokens, i * compress_stride, compress_block)) / compress_stride
                        for i in visible
                    )
                    is_forced = j < first_blocks or j > own - local_blocks
                    # Of blocks without any score the latest is the best.
                    scores[j] = (is_forced, score, j)
                best = sorted(scores, key=lambda j: scores[j], reverse=True)[:top_n]
                chosen[row, query, head, : len(best)] = torch.tensor(best, device=q.device)
    return chosen


def _overlap(tokens: range, start: int, length: int) -> range:
    return range(max(tokens.start, start), min(tokens.stop, start + length))
