"""interval_attention one query at a time. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("interval_attention", "reference")
def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, _ = q.shape
    grouped = q.to(dtype).unflatten(2, (k.shape[2], heads // k.shape[2]))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for row, (firsts, stops) in enumerate(zip(first.tolist(), stop.tolist(), strict=True)):
        for query, (begin, end) in enumerate(zip(firsts, stops, strict=True)):
            keys, values = (x[row, begin : max(begin, end)].transpose(0, 1) for x in (k, v))
            logits = scale * grouped[row, query] @ keys.mT
            outs.append(torch.softmax(logits, -1) @ values)
            lses.append(torch.logsumexp(logits, -1))
    out = torch.stack(outs).view(batch, length, heads, v.shape[3])
    return out.to(q.dtype), torch.stack(lses).view(batch, length, heads)
