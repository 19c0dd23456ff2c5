"""interval_attention for some queries at a time: memory is linear in the length.

The backward computes the probabilities again, from lse, as softmax_attention/chunked.py does:

    P = exp(S - lse),   dV = P^T dO,   dS = P * (dO V^T - delta),   delta = rowsum(dO * O) - dlse
    dQ = dS K,   dK = dS^T Q

Legend: b batch, T queries, L keys, H heads, K kv heads, G = H/K query heads per kv head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast

MAX_LOGITS = 2**19  # held at once
MAX_QUERIES = 128  # in a chunk: a longer one computes more logits that are masked
MAX_WASTE = 4  # times the logits that its queries would compute one at a time: their keys may lie far apart
MIN_LOGITS = 2**15  # which take no longer than to start one more chunk


@implements("interval_attention", "torch")
def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    return _forward(q, k, v, first, stop, scale)


class Chunk(NamedTuple):
    """Some queries, the keys that any of them sees, and the logits `[b*K, n, G, keys]` of those, -inf where hidden.

    aligned   whether all the queries that see a key see the first of these
    """

    queries: slice
    keys: slice
    logits: Tensor
    aligned: bool


def chunks(rows: Tensor, keys: Tensor, first: Tensor, stop: Tensor) -> Iterator[Chunk]:
    """All queries `[b*K, T, G, D]`, scaled, some at a time, with keys `[b*K, L, D]`."""
    groups, length, group, _ = rows.shape
    is_empty = stop <= first
    low, high = torch.where(is_empty, keys.shape[1], first), torch.where(is_empty, 0, stop)
    last_low, first_high = torch.where(is_empty, 0, first), torch.where(is_empty, 0, stop)
    bounds = torch.stack([low.amin(0), high.amax(0), last_low.amax(0), first_high.amin(0)]).tolist()
    lows, highs, last_lows, first_highs = bounds
    own = [0, *accumulate(max(0, high - low) for low, high in zip(lows, highs, strict=True))]
    end = 0
    while end < length:
        begin, end = end, min(end + MAX_QUERIES, length)
        while True:
            now = slice(begin, end)
            low, high = min(lows[now]), max(highs[now])
            count, spanned = end - begin, groups * group * (end - begin) * max(0, high - low)
            wasteful = MAX_WASTE * groups * group * (own[end] - own[begin])
            if count == 1 or spanned <= min(MAX_LOGITS, max(MIN_LOGITS, wasteful)):
                break
            end = begin + count // 2
        low, last_low, first_high = min(low, high), max(last_lows[now]), min(first_highs[now])
        logits = rows[:, now].flatten(1, 2) @ keys[:, low:high].mT
        logits = logits.unflatten(1, (-1, group))
        # Only at either end is anything hidden that another of these queries sees.
        for start, until in ((low, min(last_low, high)), (max(first_high, low), high)):
            if start < until:
                index = torch.arange(start, until, device=rows.device)
                hidden = (index < first[:, now, None]) | (index >= stop[:, now, None])
                hidden = hidden.repeat_interleave(groups // len(first), 0)[:, :, None]
                logits[..., start - low : until - low].masked_fill_(hidden, -torch.inf)
        yield Chunk(now, slice(low, high), logits, last_low == low)


def by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[b, T, H, ...]` to `[b*K, T, G, ...]` in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(2, (kv_heads, -1))
    return x.movedim(2, 1).flatten(0, 1).contiguous()


def keys_by_head(x: Tensor, queries: int) -> Tensor:
    """`[b, L, K, D]` to `[b*K, L, D]` in at least float32. A few queries read those of one row where they lie."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(2, 1).flatten(0, 1)
    return x if queries <= MAX_QUERIES else x.contiguous()


def _by_token(x: Tensor, batch: int) -> Tensor:
    """The inverse."""
    return x.unflatten(0, (batch, -1)).movedim(1, 2).flatten(2, 3)


# Opaque operators: torch.compile would otherwise unroll the loop over queries into its graph.


@torch.library.custom_op("zoo::interval_attention_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kv_heads = k.shape[2]
    rows, (keys, values) = by_head(q, kv_heads) * scale, (keys_by_head(x, q.shape[1]) for x in (k, v))
    out, lse = rows.new_zeros(*rows.shape[:3], v.shape[3]), rows.new_full(rows.shape[:3], -torch.inf)
    for chunk in chunks(rows, keys, first, stop):
        if not chunk.logits.numel():
            continue
        p, lse[:, chunk.queries], sums = exponentials(chunk.logits)
        found = (p.flatten(1, 2) @ values[:, chunk.keys]).unflatten(1, p.shape[1:3])
        torch.div(found, sums, out=out[:, chunk.queries])
    out, lse = (_by_token(x, len(q)).contiguous() for x in (out, lse))
    return out.to(q.dtype), lse


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place, exp(logits - their maximum); and lse, and their sums `[..., 1]` (1 where there is nothing)."""
    highest = logits.amax(-1, keepdim=True)
    highest.masked_fill_(highest == -torch.inf, 0)
    p = logits.sub_(highest).exp_()
    sums = p.sum(-1, keepdim=True)
    return p, (highest + sums.log()).squeeze(-1), sums.masked_fill(sums == 0, 1)


@torch.library.custom_op("zoo::interval_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    kv_heads = k.shape[2]
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.masked_fill(lse == -torch.inf, 0)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    rows, grads, delta, lse = (by_head(x, kv_heads) for x in (q, grad_out, delta, lse))
    keys, values = (keys_by_head(x, q.shape[1]) for x in (k, v))
    rows = rows * scale
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (rows, keys, values))
    for chunk in chunks(rows, keys, first, stop):
        now, seen = chunk.queries, chunk.keys
        p = chunk.logits.sub_(lse[:, now, :, None]).exp_()
        own, grad = rows[:, now].flatten(1, 2), grads[:, now].flatten(1, 2)
        grad_v[:, seen].baddbmm_(p.flatten(1, 2).mT, grad)
        grad_p = (grad @ values[:, seen].mT).view(p.shape)
        grad_logits = grad_p.sub_(delta[:, now, :, None]).mul_(p).flatten(1, 2)
        grad_k[:, seen].baddbmm_(grad_logits.mT, own)
        grad_q[:, now] = (grad_logits @ keys[:, seen]).unflatten(1, p.shape[1:3])
    grad_q *= scale
    by_token = (_by_token(x, len(q)) for x in (grad_q, grad_k[:, :, None], grad_v[:, :, None]))
    grad_q, grad_k, grad_v = (x.to(like.dtype).contiguous() for x, like in zip(by_token, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    grad_out = torch.zeros_like(ctx.saved_tensors[5]) if grad_out is None else grad_out
    return *_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
