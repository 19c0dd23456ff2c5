"""Softmax attention in blocks of queries, each against the keys it may see: memory is linear in the length.

The forward keeps nothing but its inputs and its output. The backward computes the probabilities again (FlashAttention,
arXiv:2205.14135, appendix B.4):

    P = softmax(S),   dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T) + dlse),   dQ = dS K,   dK = dS^T Q

With a soft cap c the logits are c tanh(S / c), and dS is multiplied by 1 - tanh(S / c)^2.

In bfloat16 the logits are multiplied in float32 and the rest in bfloat16, as dO and V are rounded to bfloat16 already.
On a GPU, and for a single query, torch's own kernels do what they can.

Legend: b batch, T queries, S keys, H heads, K kv heads, G = H/K query heads per kv head, D head_dim. "Rows" are the
queries of one kv head, `[b*K, T*G, D]`, the G queries of a token side by side: a block of tokens is then one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zoo.ops.dispatch import implements, outside_autocast
from zoo.ops.matmul import bmm
from zoo.ops.softmax_attention import patterned
from zoo.ops.softmax_attention.pattern import Pattern
from zoo.ops.varlen import document_ids

# The most logits held at once: 1 MB. Measured with AVX-512 and 1 MB of L2 a core; half or double is 10% slower.
MAX_LOGITS = 2**18
NATIVE_LENGTH = 256  # up to which torch's attention is faster on a CPU in float32; it never is in bfloat16
MAX_QUERIES = 128  # tokens in a block: a longer one computes more logits that are masked


@implements("softmax_attention", "torch")
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
) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)` as the public function documents them; lse may be None where it is not asked for."""
    length = q.shape[1]
    if window is not None and window + num_sinks >= k.shape[1]:
        window = None
    kind = kind_of(
        q,
        k,
        v,
        causal=causal,
        window=window,
        num_sinks=num_sinks,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
        key_mask=key_mask,
        pattern=pattern,
        return_lse=return_lse,
    )
    slower = q.device.type == "cpu" and (length > NATIVE_LENGTH or q.dtype == torch.bfloat16)
    if kind is None and (length == 1 or not slower):
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if key_mask is None else (key_mask & key_mask[:, -1:])[:, None, None],
            is_causal=False if length == 1 else causal,  # `and` would make a symbol of it under torch.compile
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None
    # Multiplied in bfloat16, or at least float32: float16 is slow on a CPU.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
    inputs = (x.to(dtype) for x in (q, k, v))
    if pattern is not None:
        out, lse = patterned.forward(*inputs, scale, softcap, pattern.numbers(), cu_seqlens, key_mask)
        return out.to(q.dtype), lse
    out, lse = _forward(*inputs, scale, softcap, causal, window, num_sinks, cu_seqlens, key_mask, return_lse)
    return out.to(q.dtype), lse


def kind_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    num_sinks: int,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    pattern: Pattern | None,
    return_lse: bool,
    **_: Any,
) -> str | None:
    """What limits the call beyond causality; None for one that torch's own kernels serve."""
    if pattern is not None:
        return "strided+random" if pattern.stride is not None or pattern.random_blocks else "dilated"
    if window is not None and window + num_sinks < k.shape[1]:
        return "sinks" if num_sinks else "window"
    if softcap is not None:
        return "softcap"
    if cu_seqlens is not None:
        return "documents"
    # With another head_dim for v, torch falls back to an implementation that stores all logits.
    dense = key_mask is None and (not causal or q.shape[1] == k.shape[1])
    if return_lse or q.shape[3] != v.shape[3] or not (dense or q.shape[1] == 1):
        return "other"
    return None


# Opaque operators: torch.compile would otherwise unroll the loop over blocks into its graph.


@torch.library.custom_op("zoo::softmax_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; lse is empty unless `return_lse`."""
    blocks = _Blocks(q, k, scale, softcap, causal, window, num_sinks, cu_seqlens, key_mask)
    v_rows = _rows(v)
    out = q.new_empty(*blocks.q.shape[:2], v.shape[3])
    lse = blocks.q.new_empty(blocks.q.shape[:2] if return_lse else 0)
    for block in blocks:
        logits = blocks.logits(block)
        if return_lse:
            lse[block.pairs, block.rows] = logits.logsumexp(-1)
        p = _softmax(logits, block).to(v.dtype)
        _set(out[block.pairs, block.rows], p, block.keys_of(v_rows))
    return _unrows(out, q), _unrows(lse[..., None], q)[..., 0] if return_lse else lse


@torch.library.custom_op("zoo::softmax_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    blocks = _Blocks(q, k, scale, softcap, causal, window, num_sinks, cu_seqlens, key_mask)
    wide = blocks.q.dtype
    v_rows, q_rows, k_rows = _rows(v), blocks.q.to(q.dtype), blocks.k.to(k.dtype)
    grad_rows = _rows(q.new_zeros(*q.shape[:3], v.shape[3]) if grad_out is None else grad_out, k.shape[2])
    lse_rows = None if grad_lse is None else _rows(grad_lse[..., None].to(wide), k.shape[2])
    grad_q = torch.empty_like(q_rows)
    # Transposed: multiplying and adding up the other way round would transpose the probabilities instead.
    grad_k, grad_v = (
        torch.zeros_like(x.mT, dtype=wide, memory_format=torch.contiguous_format) for x in (k_rows, v_rows)
    )
    buffer = _Buffer(q)
    slopes = None if softcap is None else _Buffer(blocks.q)
    for block in blocks:
        grad_block = grad_rows[block.pairs, block.rows]
        logits = blocks.logits(block, slope=slopes)
        p = _softmax(logits, block)
        _add(grad_v, block, grad_block, p.to(v.dtype))
        grad_p = bmm(grad_block, block.keys_of(v_rows).mT, out=buffer.of(*p.shape)).to(wide)
        grad_logits = torch._softmax_backward_data(grad_p, p, -1, wide, grad_input=grad_p)
        if lse_rows is not None:
            grad_lse_block = lse_rows[block.pairs, block.rows]
            if block.empty:  # merging two empty rows gives a NaN gradient for their -inf
                grad_lse_block = grad_lse_block.masked_fill(p.amax(-1, keepdim=True) == 0, 0)
            grad_logits.addcmul_(p, grad_lse_block)
        if slopes is not None:
            grad_logits.mul_(slopes.of(*p.shape))
        grad_logits = grad_logits.to(q.dtype)
        _add(grad_k, block, q_rows[block.pairs, block.rows], grad_logits)
        _set(grad_q[block.pairs, block.rows], grad_logits, block.keys_of(k_rows))
    grad_q *= scale
    return _unrows(grad_q, q), _unrows(grad_k.mT, k).to(k.dtype), _unrows(grad_v.mT, v).to(v.dtype)


class _Block(NamedTuple):
    """A block of queries of some pairs of batch row and kv head, and the keys it is compared with.

    pairs    of the `b*K`
    rows     of the `T*G`
    keys     one range, or the sinks and one range
    hidden   `[queries, keys]`, for the last keys: -inf where a query does not see one, 0 elsewhere; None for all 0
    empty    whether a query may see nothing at all
    """

    pairs: slice
    rows: slice
    keys: list[slice]
    hidden: Tensor | None
    empty: bool

    def keys_of(self, x: Tensor) -> Tensor:
        """The block's keys of x `[b*K, S, D]`."""
        parts = [x[self.pairs, part] for part in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Blocks:
    """The blocks to go through, and their logits; q (scaled) and k are its rows, in at least float32."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        softcap: float | None,
        causal: bool,
        window: int | None,
        num_sinks: int,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        batch, length, heads, _ = q.shape
        key_length, self.kv_heads = k.shape[1:3]
        self.shared = heads // self.kv_heads
        self.softcap = softcap
        self.q, self.k = _rows(q.to(wide) * scale, self.kv_heads), _rows(k.to(wide))
        self.plain = causal and window is None and cu_seqlens is None and key_mask is None
        # Each row of a padded batch sees its own keys; otherwise all rows see alike.
        masks = [None] if key_mask is None else key_mask.unbind()
        self.pairs = batch * self.kv_heads // len(masks)
        self.visible = [
            _Visible(length, key_length, causal, window, num_sinks, cu_seqlens, mask, q.device) for mask in masks
        ]
        self.empty = key_mask is not None
        self.buffer = _Buffer(self.q)
        self.triangle = self.q.new_full((MAX_QUERIES, MAX_QUERIES), -torch.inf).triu_(1)

    def __iter__(self) -> Iterator[_Block]:
        for i, visible in enumerate(self.visible):
            span = max(1, visible.span) * self.shared
            queries = max(16, min(MAX_QUERIES, 4 * MAX_LOGITS // span))
            at_once = max(1, MAX_LOGITS // (span * queries))
            for tokens, keys in visible.blocks(queries):
                size = tokens.stop - tokens.start
                if self.plain:
                    hidden: Tensor | None = self.triangle[:size, :size]
                else:
                    hidden = visible.hidden(tokens, keys, self.q.dtype)
                rows = slice(tokens.start * self.shared, tokens.stop * self.shared)
                end = (i + 1) * self.pairs
                for start in range(i * self.pairs, end, at_once):
                    yield _Block(slice(start, min(start + at_once, end)), rows, keys, hidden, self.empty)

    def logits(self, block: _Block, slope: _Buffer | None = None) -> Tensor:
        """`[pairs, queries*G, keys]`, -inf where a key is hidden; valid until the next block's. `slope` takes the soft
        cap's derivative."""
        q, k = self.q[block.pairs, block.rows], block.keys_of(self.k)
        logits = bmm(q, k.mT, out=self.buffer.of(q.shape[0], q.shape[1], k.shape[1]))
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            if slope is not None:
                square = torch.mul(logits, logits, out=slope.of(*logits.shape))
                square.neg_().add_(1)
            logits.mul_(self.softcap)
        if block.hidden is not None:
            queries, keys = block.hidden.shape
            logits.unflatten(1, (queries, self.shared))[..., logits.shape[-1] - keys :].add_(block.hidden[:, None])
        return logits


class _Buffer:
    """Memory that one block after another uses: fresh memory costs a CPU more than the arithmetic in it."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def of(self, *shape: int) -> Tensor:
        """A contiguous tensor of this shape, of whatever values."""
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(max(size, MAX_LOGITS))
        return self.memory[:size].view(shape)


class _Visible:
    """Which keys each query of one row sees. Query i sees key j of its own document if j is not after it (causal) and
    is within its window or among the sinks.

    position      `[S]` of a key within its document, or among the real keys of its row
    key_document  `[S]`, query_document `[T]`; a masked key has a document that no query has, and the other way round
    span          the most keys a query sees
    """

    def __init__(
        self,
        length: int,
        key_length: int,
        causal: bool,
        window: int | None,
        num_sinks: int,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
        device: torch.device,
    ) -> None:
        self.causal, self.window, self.num_sinks = causal, window, num_sinks
        self.offset, self.key_length = key_length - length, key_length
        index = torch.arange(key_length, device=device)
        start, stop = torch.zeros_like(index), torch.full_like(index, key_length)
        self.position = index
        self.key_document = query_document = torch.zeros_like(index)
        if cu_seqlens is not None:
            self.key_document = query_document = document_ids(cu_seqlens, key_length)
            start, stop = cu_seqlens[query_document].long(), cu_seqlens[query_document + 1].long()
            self.position = index - start
        if key_mask is not None:
            self.position = key_mask.long().cumsum(0) - 1
            self.key_document = key_mask.long()
            query_document = torch.where(key_mask, 1, 2)
        self.query_document = query_document[self.offset :]

        # For each query: the first key of its document and window, and the end of the keys it may see. Sinks come
        # before the first key, from `start` on.
        first, end, sink_end = start, (index + 1 if causal else stop), start
        if window is not None:
            oldest = (self.position - window + 1).clamp_min(0)
            first, sink_end = start + oldest, start + num_sinks
            if key_mask is not None:
                first = torch.minimum(torch.searchsorted(self.position, oldest), index)
                sink_end = torch.searchsorted(self.position, torch.full_like(index, num_sinks))
        sink_end = torch.minimum(sink_end, first)
        self.bounds = torch.stack([start, sink_end, first, end])
        self.span = int((end - first + sink_end - start).max())

    def blocks(self, size: int) -> Iterator[tuple[slice, list[slice]]]:
        """`(queries, keys)`, `size` queries at a time; keys are one range, or the sinks and one range."""
        begins = torch.arange(self.offset, self.key_length, size, device=self.bounds.device)
        lasts = (begins + size - 1).clamp_max(self.key_length - 1)
        # A block's first query sees furthest back, its last one furthest ahead.
        bounds = [begins, lasts + 1, *self.bounds[:3, begins], self.bounds[3, lasts]]
        for begin, end, sink, sink_end, first, last in torch.stack(bounds, 1).tolist():
            keys = [slice(sink, sink_end), slice(first, last)]
            yield slice(begin - self.offset, end - self.offset), keys[sink == sink_end :]

    def hidden(self, queries: slice, keys: list[slice], dtype: torch.dtype) -> Tensor | None:
        """`[queries, keys]`, -inf where a query does not see a key and 0 elsewhere; None where all see all."""
        own = self.position[queries.start + self.offset : queries.stop + self.offset, None]
        position = torch.cat([self.position[part] for part in keys])
        document = torch.cat([self.key_document[part] for part in keys])
        hidden = self.query_document[queries, None] != document
        if self.causal:
            hidden |= position > own
        if self.window is not None:
            hidden |= (own - position >= self.window) & (position >= self.num_sinks)
        if not hidden.any():
            return None
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _softmax(logits: Tensor, block: _Block) -> Tensor:
    """In place; a row that sees nothing has zeros."""
    p = torch._softmax(logits, -1, False, out=logits)
    return p.nan_to_num_(0.0) if block.empty else p


def _rows(x: Tensor, kv_heads: int | None = None) -> Tensor:
    """`[b, T, H, D]` to `[b*K, T*G, D]`; without `kv_heads`, K is H."""
    grouped = x.unflatten(2, (kv_heads or x.shape[2], -1))
    return grouped.transpose(1, 2).reshape(-1, x.shape[1] * grouped.shape[3], x.shape[3])


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`: `[b, T, H, D]` with the first three of `like`, contiguous."""
    batch, length, heads, _ = like.shape
    grouped = rows.view(batch, -1, length, rows.shape[1] // length, rows.shape[2])
    return grouped.transpose(1, 2).reshape(batch, length, heads, rows.shape[2]).contiguous()


def _set(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, without a copy where the product can be put there."""
    product = bmm(a, b, out=out)
    if product is not out:
        out.copy_(product)


def _add(total: Tensor, block: _Block, a: Tensor, b: Tensor) -> None:
    """total += a^T @ b at the block's keys, of total `[b*K, D, S]`."""
    parts = [part.stop - part.start for part in block.keys]
    for part, piece in zip(block.keys, b.split(parts, 2), strict=True):
        total[block.pairs, :, part] += bmm(a.mT, piece)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, cu_seqlens, key_mask, return_lse = inputs
    if not return_lse:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, key_mask = ctx.saved_tensors
    grads = _backward(grad_out, grad_lse, q, k, v, *ctx.options, cu_seqlens, key_mask)
    return *grads, None, None, None, None, None, None, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
