"""softmax_attention on a GPU: intervals.py says what a query sees, interval_attention/kernels.py computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.interval_attention.kernels import attend, refuses, tile_rows
from zoo.ops.softmax_attention.intervals import Intervals, as_they_stand, laid_out
from zoo.ops.softmax_attention.pattern import Pattern


@implements("softmax_attention", "triton", refuses=refuses)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    num_sinks: int,
    scale: float,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    pattern: Pattern | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them; lse is always there."""
    layout = intervals(q, k, v, causal, window, num_sinks, cu_seqlens, key_mask, pattern)
    if layout.queries is not None:
        q = _take(q, layout.queries)
    if layout.keys is not None:
        k, v = _take(k, layout.keys), _take(v, layout.keys)
    out, lse = attend(
        q,
        k,
        v,
        layout.first,
        layout.stop,
        scale=scale,
        softcap=softcap,
        is_real=layout.is_real,
        near=layout.near,
        far=layout.far,
        in_order=layout.in_order,
    )
    if layout.outputs is not None:
        out, lse = _take(out, layout.outputs), _take(lse, layout.outputs)
    return out, lse


def intervals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    pattern: Pattern | None,
) -> Intervals:
    """Of what the call's queries see."""
    length, key_length = q.shape[1], k.shape[1]
    if pattern is None:
        if window is None or window + num_sinks >= key_length:
            window, num_sinks = None, 0
        if not num_sinks or (cu_seqlens is None and key_mask is None):
            return as_they_stand(length, key_length, causal, window, num_sinks, cu_seqlens, key_mask, q.device)
        pattern = Pattern(window, num_sinks)
    rows, shared = tile_rows(q, k, v), q.shape[2] // k.shape[2]
    tokens = rows // math.gcd(rows, shared)
    return laid_out(length, key_length, pattern, cu_seqlens, key_mask, tokens, q.device)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index` `[b, n]`, or `[1, n]` for all rows, of x `[b, T, ...]`."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x[torch.arange(len(x), device=x.device)[:, None], index]
