"""Softmax attention in blocks of queries, each against the keys it may see: memory is linear in the length.

Plain causal and full attention is torch's own. Windows, sinks, documents, padding, fewer queries than keys, the
log-sum-exp and its gradient are done here, with the backward of FlashAttention (arXiv:2205.14135, appendix B.4):

    P = exp(S - lse),   dV = P^T dO,   dS = P * (dO V^T - (rowsum(dO * O) - dlse)),   dQ = dS K,   dK = dS^T Q

Legend: b batch, T queries, S keys, H heads, G query heads per kv head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zoo.ops.dispatch import implements
from zoo.ops.varlen import document_ids

# The most logits held at once, per head and row together. A block of queries is as long as this allows: measured on
# AVX-512 with 2 MB of L2, 2^19 to 2^21 are within 10% of each other.
MAX_LOGITS = 2**20


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
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)` as the public function documents them; lse may be None where it is not asked for."""
    length, key_length = q.shape[1], k.shape[1]
    unlimited = window is None or window >= key_length
    aligned = not causal or length in (1, key_length)
    # With another head_dim for v, torch falls back to an implementation that stores all logits.
    if (
        unlimited
        and aligned
        and cu_seqlens is None
        and key_mask is None
        and not return_lse
        and q.shape[3] == v.shape[3]
    ):
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal and length > 1,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = _forward(
        q.to(dtype) * scale,
        k.to(dtype),
        v.to(dtype),
        causal,
        None if unlimited else window,
        num_sinks,
        cu_seqlens,
        key_mask,
    )
    return out.to(q.dtype), lse


# Opaque operators: torch.compile would otherwise unroll the loop over blocks into its graph.


@torch.library.custom_op("zoo::softmax_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of queries that are scaled already."""
    visible = _Visible(q, k, causal, window, num_sinks, cu_seqlens, key_mask)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    kv_heads = k.shape[2]
    k, v = (_heads_first(x) for x in (k, v))
    for queries, keys in visible.blocks():
        logits = _logits(_group(q, queries, kv_heads), _take(k, keys), visible.mask(queries, keys))
        # The largest logit adds exp(0) = 1, so a sum below 1 is that of a row that sees nothing.
        largest = _finite(logits.amax(-1, keepdim=True))
        p = logits.sub_(largest).exp_()
        total = p.sum(-1, keepdim=True)
        out[:, queries] = _ungroup(p @ _take(v, keys) / total.clamp_min(1), queries)
        lse[:, queries] = _ungroup(largest + total.log(), queries).squeeze(-1)
    return out, lse


@torch.library.custom_op("zoo::softmax_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, of k and of v."""
    visible = _Visible(q, k, causal, window, num_sinks, cu_seqlens, key_mask)
    kv_heads = k.shape[2]
    k, v = (_heads_first(x) for x in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    shift = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        # Merging two empty rows gives a NaN gradient for their -inf; such a row has no gradient.
        shift -= grad_lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)
    lse = _finite(lse).unsqueeze(-1)
    for queries, keys in visible.blocks():
        q_block, grad_block = _group(q, queries, kv_heads), _group(grad_out, queries, kv_heads)
        k_block, v_block = _take(k, keys), _take(v, keys)
        p = _logits(q_block, k_block, visible.mask(queries, keys)).sub_(_group(lse, queries, kv_heads)).exp_()
        _add(grad_v, keys, p.transpose(-1, -2) @ grad_block)
        grad_logits = (grad_block @ v_block.transpose(-1, -2)).sub_(_group(shift, queries, kv_heads)).mul_(p)
        _add(grad_k, keys, grad_logits.transpose(-1, -2) @ q_block)
        grad_q[:, queries] = _ungroup(grad_logits @ k_block, queries)
    return grad_q, *(x.transpose(1, 2).contiguous() for x in (grad_k, grad_v))  # type: ignore[return-value]


class _Visible:
    """Which keys each query sees. Query i sees key j of its own document if j is not after it (causal) and is within
    its window or among the sinks.

    position      `[rows, S]` of a key within its document, or among the real keys of its row
    key_document  `[rows, S]`, query_document `[rows, T]`; a masked key has a document that no query has, and the
                  other way round
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool,
        window: int | None,
        num_sinks: int,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> None:
        batch, length, heads, _ = q.shape
        key_length = k.shape[1]
        self.causal, self.window, self.num_sinks = causal, window, num_sinks
        self.offset = key_length - length
        index = torch.arange(key_length, device=q.device)
        start, stop = torch.zeros_like(index), torch.full_like(index, key_length)
        self.position = index[None]
        self.key_document = torch.zeros_like(self.position)
        query_document = self.key_document
        if cu_seqlens is not None:
            document = document_ids(cu_seqlens, key_length)
            start, stop = cu_seqlens[document].long(), cu_seqlens[document + 1].long()
            self.position = (index - start)[None]
            self.key_document = query_document = document[None]
        if key_mask is not None:
            self.position = key_mask.long().cumsum(1) - 1
            self.key_document = key_mask.long()
            query_document = torch.where(key_mask, 1, 2)
        self.query_document = query_document[:, self.offset :]

        # For each query: the first key of its document and window, and the end of the keys it may see. Sinks come
        # before the first key, from `start` on.
        first, end = start, (index + 1 if causal else stop)
        sink_end = start
        if window is not None:
            oldest = (self.position - window + 1).clamp_min(0)
            first, sink_end = start + oldest[0], start + num_sinks
            if key_mask is not None:
                first = torch.minimum(torch.searchsorted(self.position, oldest).amin(0), index)
                sinks = torch.full_like(self.position[:, :1], num_sinks)
                sink_end = start + torch.searchsorted(self.position, sinks).amax()
        sink_end = torch.minimum(sink_end, first)
        span = int((end - first + sink_end - start).max())
        size = max(16, min(256, MAX_LOGITS // (batch * heads * span)))
        # A block's first query sees furthest back, its last one furthest ahead.
        begins = torch.arange(self.offset, key_length, size, device=q.device)
        lasts = (begins + size - 1).clamp_max(key_length - 1)
        bounds = [begins, lasts + 1, start[begins], sink_end[begins], first[begins], end[lasts]]
        self._blocks = torch.stack(bounds, 1).tolist()

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """`(queries, keys)`, where keys are one range, or the sinks and one range."""
        for begin, end, sink, sink_end, first, last in self._blocks:
            keys = [slice(sink, sink_end), slice(first, last)]
            yield slice(begin - self.offset, end - self.offset), keys[sink == sink_end :]

    def mask(self, queries: slice, keys: list[slice]) -> Tensor:
        """bool `[rows, 1, 1, queries, keys]`."""
        own = self.position[:, queries.start + self.offset : queries.stop + self.offset, None]
        position = torch.cat([self.position[:, x] for x in keys], 1)[:, None]
        document = torch.cat([self.key_document[:, x] for x in keys], 1)[:, None]
        mask = self.query_document[:, queries, None] == document
        if self.causal:
            mask &= position <= own
        if self.window is not None:
            mask &= (own - position < self.window) | (position < self.num_sinks)
        return mask[:, None, None]


def _logits(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """`[b, kv_heads, G*queries, keys]`, -inf where the mask is False."""
    logits = q @ k.transpose(-1, -2)
    logits.unflatten(2, (-1, mask.shape[3])).masked_fill_(~mask, -torch.inf)
    return logits


def _finite(x: Tensor) -> Tensor:
    """A row that sees nothing has -inf, which would give NaN when subtracted from itself."""
    return x.masked_fill(x.isneginf(), 0)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _group(x: Tensor, queries: slice, kv_heads: int) -> Tensor:
    """`[b, T, H, D]` to `[b, kv_heads, G*queries, D]`, for one matmul per kv head."""
    return x[:, queries].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungroup(x: Tensor, queries: slice) -> Tensor:
    """The inverse of `_group`."""
    return x.unflatten(2, (-1, queries.stop - queries.start)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _take(x: Tensor, keys: list[slice]) -> Tensor:
    return torch.cat([x[:, :, part] for part in keys], 2) if len(keys) > 1 else x[:, :, keys[0]]


def _add(total: Tensor, keys: list[slice], x: Tensor) -> None:
    for part, piece in zip(keys, x.split([part.stop - part.start for part in keys], 2), strict=True):
        total[:, :, part] += piece


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    num_sinks: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Strides as the real one gives them: q's own, k and v contiguous.
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.window, ctx.num_sinks, cu_seqlens, key_mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, cu_seqlens, key_mask = ctx.saved_tensors
    grads = _backward(grad_out, grad_lse, *tensors, ctx.causal, ctx.window, ctx.num_sinks, cu_seqlens, key_mask)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
