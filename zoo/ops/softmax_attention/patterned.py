"""Softmax attention under a Pattern that is more than a window: blocks of queries, each against the keys that any of
them sees, which are gathered. Keys that nobody sees are never touched, and memory is linear in the length.

The mathematics is that of chunked.py. With a dilation d the queries of one block stand d apart, so that they see the
same keys but for the ends. Legend as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import outside_autocast
from zoo.ops.matmul import bmm
from zoo.ops.softmax_attention.pattern import Pattern

MAX_LOGITS = 2**20  # held at once, where 16 queries allow it
MAX_QUERIES = 128


class _Block(NamedTuple):
    """Some queries of one document, in some rows of the batch, and all the keys they see.

    rows     of the batch
    queries  `[n]` int64, among the queries
    keys     `[m]` int64, among the keys
    hidden   `[n, m]` bool
    """

    rows: slice
    queries: Tensor
    keys: Tensor
    hidden: Tensor


def _blocks(q: Tensor, k: Tensor, pattern: Pattern, cu_seqlens: Tensor | None, mask: Tensor | None) -> Iterator[_Block]:
    batch, length, heads, _ = q.shape
    offset = k.shape[1] - length
    index = torch.arange(k.shape[1], device=q.device)
    documents = [(slice(0, batch), index)]
    if cu_seqlens is not None:
        documents = [(slice(0, 1), part) for part in index.tensor_split(cu_seqlens[1:-1].long().cpu())]
    if mask is not None:
        documents = [(slice(row, row + 1), index[real]) for row, real in enumerate(mask)]
    for rows, tokens in documents:
        # Only tokens from `offset` on have queries.
        new = int((tokens >= offset).sum())
        first = len(tokens) - new
        size = _queries_at_once(pattern, len(tokens), heads * (rows.stop - rows.start))
        for start in range(first, min(first + pattern.dilation, len(tokens))):
            for own in index[start : len(tokens) : pattern.dilation].split(size):
                keys = pattern.keys(own)
                hidden = ~pattern.visible(own[:, None], keys)
                yield _Block(rows, tokens[own] - offset, tokens[keys], hidden)


def _queries_at_once(pattern: Pattern, length: int, heads: int) -> int:
    most = length if pattern.window is None else pattern.window + MAX_QUERIES + pattern.num_sinks
    most += 0 if pattern.stride is None else length // pattern.stride
    most += 2 * pattern.random_blocks * pattern.block_size
    return max(16, min(MAX_QUERIES, MAX_LOGITS // (heads * max(1, min(most, length)))))


def _gather(x: Tensor, rows: slice, tokens: Tensor, kv_heads: int, wide: torch.dtype) -> Tensor:
    """`[b, T, H, D]` to `[b*K, n*G, D]`, the G heads of a token side by side."""
    part = x[rows].index_select(1, tokens).to(wide)
    return part.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _scatter(x: Tensor, block: _Block, tokens: Tensor, part: Tensor) -> None:
    """Adds to x `[b, T, H, D]` what belongs to its tokens, of `part` `[b*K, n*G, D]`."""
    rows = x[block.rows]
    part = part.unflatten(0, (rows.shape[0], -1)).unflatten(2, (len(tokens), -1)).transpose(1, 2).flatten(2, 3)
    rows.index_add_(1, tokens, part.to(x.dtype))


class _Logits:
    """The logits of a block and what they were made of."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, softcap: float | None, block: _Block) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q = _gather(q, block.rows, block.queries, k.shape[2], wide) * scale
        self.k = _gather(k, block.rows, block.keys, k.shape[2], wide)
        logits = bmm(self.q, self.k.mT)
        self.slope = None
        if softcap is not None:
            capped = torch.tanh(logits / softcap)
            self.slope, logits = 1 - capped * capped, softcap * capped
        by_token = logits.unflatten(1, (len(block.queries), -1))
        self.value = by_token.masked_fill_(block.hidden[:, None], -torch.inf).flatten(1, 2)


@torch.library.custom_op("zoo::patterned_attention_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    pattern: list[int],
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `pattern` as `Pattern.numbers` gives it. A padding query has 0 and -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    # Added up from 0: each query stands in one block.
    lse = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
    for block in _blocks(q, k, Pattern.of(pattern), cu_seqlens, key_mask):
        logits = _Logits(q, k, scale, softcap, block).value
        values = _gather(v, block.rows, block.keys, v.shape[2], v.dtype)
        _scatter(out, block, block.queries, bmm(torch.softmax(logits, -1).to(v.dtype), values))
        _scatter(lse[..., None], block, block.queries, logits.logsumexp(-1, keepdim=True))
    if key_mask is not None:
        lse.masked_fill_(~key_mask[:, -q.shape[1] :, None], -torch.inf)
    return out, lse


@torch.library.custom_op("zoo::patterned_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    pattern: list[int],
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    if grad_out is None:
        grad_out = q.new_zeros(*q.shape[:3], v.shape[3])
    for block in _blocks(q, k, Pattern.of(pattern), cu_seqlens, key_mask):
        logits = _Logits(q, k, scale, softcap, block)
        p = torch.softmax(logits.value, -1)
        grad_block = _gather(grad_out, block.rows, block.queries, kv_heads, v.dtype)
        _scatter(grad_v, block, block.keys, bmm(p.to(v.dtype).mT, grad_block))
        grad_p = bmm(grad_block, _gather(v, block.rows, block.keys, kv_heads, v.dtype).mT).to(wide)
        grad_logits = torch._softmax_backward_data(grad_p, p, -1, wide)
        if grad_lse is not None:
            grad_logits += p * _gather(grad_lse[..., None], block.rows, block.queries, kv_heads, wide)
        if logits.slope is not None:
            grad_logits *= logits.slope
        _scatter(grad_k, block, block.keys, bmm(grad_logits.mT, logits.q))
        _scatter(grad_q, block, block.queries, bmm(grad_logits, logits.k) * scale)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@backward.register_fake
def _(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, cu_seqlens, key_mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, key_mask = ctx.saved_tensors
    grads = backward(grad_out, grad_lse, q, k, v, *ctx.options, cu_seqlens, key_mask)
    return *grads, None, None, None, None, None


forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
