"""interval_attention for some queries at a time: memory is linear in the length.

Nothing is kept but the inputs; the backward computes the probabilities again, as softmax_attention/chunked.py does.

Legend: b batch, T queries, L keys, H heads, K kv heads, G = H/K query heads per kv head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import implements

MAX_LOGITS = 2**19  # held at once
MAX_QUERIES = 128  # in a chunk: a longer one computes more logits that are masked


@implements("interval_attention", "torch")
def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    return _forward(q, k, v, first, stop, scale)


class Chunk(NamedTuple):
    """Some queries, the keys that any of them sees, and the logits `[b, K, n, G, keys]` of those, -inf where hidden."""

    queries: slice
    keys: slice
    logits: Tensor


def chunks(q: Tensor, k: Tensor, first: Tensor, stop: Tensor, scale: float) -> Iterator[Chunk]:
    """All queries of q `[b, T, H, D]`, some at a time, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    longest = max(1, int((stop - first).max()))
    size = min(MAX_QUERIES, max(1, MAX_LOGITS // (batch * heads * longest)))
    is_empty = stop <= first
    lows = torch.where(is_empty, k.shape[1], first).amin(0)
    highs = torch.where(is_empty, 0, stop).amax(0)
    low_high = torch.stack(
        [torch.stack([a.min(), b.max()]) for a, b in zip(lows.split(size), highs.split(size), strict=True)]
    )
    for i, (low, high) in enumerate(low_high.tolist()):
        queries, keys = slice(i * size, min((i + 1) * size, length)), slice(min(low, high), high)
        rows = _grouped(q[:, queries].to(wide) * scale, kv_heads)
        logits = (rows @ k[:, keys].to(wide).permute(0, 2, 3, 1)).unflatten(2, (-1, heads // kv_heads))
        index = torch.arange(keys.start, keys.stop, device=q.device)
        hidden = (index < first[:, queries, None]) | (index >= stop[:, queries, None])
        yield Chunk(queries, keys, logits.masked_fill_(hidden[:, None, :, None], -torch.inf))


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last dimension, and its log-sum-exp; a row that sees nothing has zeros and -inf."""
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_(), lse


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[b, n, H, D]` to `[b, K, n*G, D]`."""
    return x.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def _ungrouped(x: Tensor, queries: int) -> Tensor:
    """The inverse."""
    return x.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3)


# Opaque operators: torch.compile would otherwise unroll the loop over queries into its graph.


@torch.library.custom_op("zoo::interval_attention_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for chunk in chunks(q, k, first, stop, scale):
        p, lse_chunk = softmax(chunk.logits)
        lse[:, chunk.queries] = lse_chunk.transpose(1, 2).flatten(2)
        values = v[:, chunk.keys].to(wide).transpose(1, 2)
        out[:, chunk.queries] = _ungrouped(p.flatten(2, 3) @ values, p.shape[2])
    return out, lse


@torch.library.custom_op("zoo::interval_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    wide, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for chunk in chunks(q, k, first, stop, scale):
        p, lse = softmax(chunk.logits)
        grad_logits = torch.zeros_like(p)
        if grad_out is not None:
            grad = _grouped(grad_out[:, chunk.queries].to(wide), kv_heads)
            grad_v[:, chunk.keys] += (p.flatten(2, 3).mT @ grad).transpose(1, 2)
            grad_p = (grad @ v[:, chunk.keys].to(wide).permute(0, 2, 3, 1)).view(p.shape)
            grad_logits = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        if grad_lse is not None:
            grad = grad_lse[:, chunk.queries].unflatten(2, (kv_heads, -1)).transpose(1, 2)
            grad_logits += p * grad.masked_fill(lse == -torch.inf, 0)[..., None]
        rows = grad_logits.flatten(2, 3)
        grad_k[:, chunk.keys] += (rows.mT @ _grouped(q[:, chunk.queries].to(wide) * scale, kv_heads)).transpose(1, 2)
        grad_q[:, chunk.queries] = _ungrouped(rows @ k[:, chunk.keys].to(wide).transpose(1, 2) * scale, p.shape[2])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    return *_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
