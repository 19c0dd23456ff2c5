"""block_sparse_attention for some queries at a time, whose blocks are gathered: memory is linear in the length.

Nothing is kept but the inputs; the backward computes the probabilities again:

    P = softmax(S),   dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T) + dlse),   dQ = dS K,   dK = dS^T Q

Legend: N queries of all rows, K kv heads, G query heads per kv head, S blocks per query, C keys per block, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.varlen import document_ids

MAX_GATHERED = 2**21  # numbers of gathered keys at once


@implements("block_sparse_attention", "torch")
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    return _forward(q, k, v, block_indices, block_size, scale, cu_seqlens, key_mask)


# Opaque operators: torch.compile would otherwise unroll the loop over queries into its graph.


@torch.library.custom_op("zoo::block_sparse_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chunks = _Chunks(q, k, block_indices, block_size, scale, cu_seqlens, key_mask)
    keys, values = _Source(chunks, k), _Source(chunks, v)
    out = chunks.q.new_empty(*chunks.q.shape[:3], v.shape[3])
    lse = chunks.q.new_empty(chunks.q.shape[:3])
    for chunk in chunks:
        p, lse[chunk.queries] = chunks.probabilities(chunk, keys.of(chunk))
        out[chunk.queries] = p @ values.of(chunk)
    batch, length, heads, _ = q.shape
    return out.view(batch, length, heads, v.shape[3]).to(q.dtype), lse.view(batch, length, heads)


@torch.library.custom_op("zoo::block_sparse_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    chunks = _Chunks(q, k, block_indices, block_size, scale, cu_seqlens, key_mask)
    keys, values, rows = _Source(chunks, k), _Source(chunks, v), chunks.q.shape[:3]
    grad_q = torch.empty_like(chunks.q)
    sums_k, sums_v = (_BlockSums(chunks, x.shape[3]) for x in (k, v))
    for chunk in chunks:
        own_keys = keys.of(chunk)
        p, lse = chunks.probabilities(chunk, own_keys)
        grad_logits = torch.zeros_like(p)
        if grad_out is not None:
            grad = grad_out.reshape(*rows, -1)[chunk.queries].to(p.dtype)
            sums_v.add(chunk, p.mT @ grad)
            grad_p = grad @ values.of(chunk).mT
            grad_logits = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        if grad_lse is not None:
            grad = grad_lse.reshape(rows)[chunk.queries].masked_fill(lse == -torch.inf, 0)
            grad_logits += p * grad[..., None]
        sums_k.add(chunk, grad_logits.mT @ chunks.q[chunk.queries])
        grad_q[chunk.queries] = grad_logits @ own_keys
    grad_q *= scale
    return grad_q.view(q.shape).to(q.dtype), sums_k.by_key(k), sums_v.by_key(v)


class _Chunk(NamedTuple):
    """Some queries, and the blocks they see.

    queries  of the N
    blocks   `[n, K, S]`, counted from the document's start
    hidden   `[n, K, S*C]`, True where there is no such key, or it is not to be seen
    rows     `[n*K*S]`, the blocks of each kv head numbered over all documents and rows
    """

    queries: slice
    blocks: Tensor
    hidden: Tensor
    rows: Tensor


class _Chunks:
    """q `[N, K, G, D]` is scaled, in at least float32.

    position  `[B, L]` of a key in its document, or among its row's real keys; -1 where it is masked
    start     `[B, L]`, where its document begins
    base      `[B, L]`, the number of its document's first block among all
    order     `[B, L]`, the columns of the real keys, then of the others; None where they are all real
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        block_indices: Tensor,
        block_size: int,
        scale: float,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> None:
        batch, length, heads, head_dim = q.shape
        self.key_length, kv_heads = k.shape[1:3]
        self.block_size, self.length = block_size, length
        self.q = (q.to(torch.promote_types(q.dtype, torch.float32)) * scale).reshape(
            batch * length, kv_heads, heads // kv_heads, head_dim
        )
        self.indices = block_indices.flatten(0, 1)
        index = torch.arange(self.key_length, device=q.device)
        self.order = None
        if cu_seqlens is not None:
            bounds, document = cu_seqlens.long(), document_ids(cu_seqlens, self.key_length)
            counts = (bounds.diff() + block_size - 1) // block_size
            self.start = bounds[document][None]
            self.position, self.base = index - self.start, (counts.cumsum(0) - counts)[document][None]
            self.blocks = int(counts.sum())
        else:
            per_row = -(-self.key_length // block_size)
            self.start = torch.zeros_like(index).expand(batch, -1)
            self.position = index.expand(batch, -1)
            self.base = (torch.arange(batch, device=q.device) * per_row)[:, None].expand(batch, self.key_length)
            self.blocks = batch * per_row
        if key_mask is not None:
            self.position = (key_mask.long().cumsum(1) - 1).masked_fill(~key_mask, -1)
            self.order = (~key_mask).long().argsort(dim=1, stable=True)

    def __iter__(self) -> Iterator[_Chunk]:
        queries, kv_heads, chosen = self.indices.shape
        size = max(1, MAX_GATHERED // max(1, kv_heads * chosen * self.block_size * self.q.shape[3]))
        position, base = (self.of_queries(x) for x in (self.position, self.base))
        inside = torch.arange(self.block_size, device=self.indices.device)
        heads = torch.arange(kv_heads, device=self.indices.device)[:, None]
        for begin in range(0, queries, size):
            now = slice(begin, min(begin + size, queries))
            own = position[now, None, None]
            blocks = self.indices[now].sort(-1).values
            unwanted = (blocks < 0) | (blocks * self.block_size > own)
            unwanted[..., 1:] |= blocks[..., 1:] == blocks[..., :-1]
            blocks = blocks.masked_fill(unwanted, 0)
            seen = (own + 1 - blocks * self.block_size).masked_fill(unwanted, 0)
            hidden = (inside >= seen[..., None]).flatten(-2)
            rows = (base[now, None, None] + blocks) * kv_heads + heads
            yield _Chunk(now, blocks, hidden, rows.flatten())

    def of_queries(self, x: Tensor) -> Tensor:
        """`[N]`: what x `[B, L]` says of the queries' own keys."""
        return x[:, self.key_length - self.length :].flatten()

    def probabilities(self, chunk: _Chunk, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, K, G, S*C]` and their lse `[n, K, G]`; a query that sees nothing has zeros."""
        logits = self.q[chunk.queries] @ keys.mT
        logits.masked_fill_(chunk.hidden[:, :, None], -torch.inf)
        lse = logits.logsumexp(-1)
        return (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_(), lse


class _Source:
    """Keys (or values) of which chunks take their blocks: many queries from a copy that is laid out in blocks, few, as
    one that is decoded, key by key where they are."""

    def __init__(self, chunks: _Chunks, x: Tensor) -> None:
        self.chunks, self.x, self.laid_out = chunks, x, None
        if chunks.indices.shape[0] * chunks.indices.shape[2] >= chunks.blocks:
            wide = torch.promote_types(x.dtype, torch.float32)
            blocks = x.new_zeros(chunks.blocks, x.shape[2], chunks.block_size, x.shape[3], dtype=wide)
            real = chunks.position >= 0
            position = chunks.position[real]
            block = chunks.base[real] + position // chunks.block_size
            blocks[block, :, position % chunks.block_size] = x[real].to(wide)
            self.laid_out = blocks.flatten(2).flatten(0, 1)

    def of(self, chunk: _Chunk) -> Tensor:
        """`[n, K, S*C, D]`."""
        shape = (*chunk.hidden.shape, self.x.shape[3])
        if self.laid_out is not None:
            return self.laid_out.index_select(0, chunk.rows).view(shape)
        chunks, device = self.chunks, self.x.device
        inside = torch.arange(chunks.block_size, device=device)
        keys = (chunk.blocks[..., None] * chunks.block_size + inside).flatten(-2)
        columns = chunks.of_queries(chunks.start)[chunk.queries, None, None] + keys
        columns = columns.masked_fill(chunk.hidden, 0)
        row = torch.arange(chunk.queries.start, chunk.queries.stop, device=device)[:, None, None] // chunks.length
        if chunks.order is not None:
            columns = chunks.order[row, columns]
        heads = torch.arange(shape[1], device=device)[:, None]
        return self.x[row, columns, heads].to(torch.promote_types(self.x.dtype, torch.float32))


class _BlockSums:
    """Gradients of keys, added up a block at a time: adding whole blocks is faster than their keys one by one."""

    def __init__(self, chunks: _Chunks, dim: int) -> None:
        self.chunks, self.kv_heads = chunks, chunks.indices.shape[1]
        self.sums = chunks.q.new_zeros(chunks.blocks * self.kv_heads, chunks.block_size * dim)

    def add(self, chunk: _Chunk, gradients: Tensor) -> None:
        """`gradients` `[n, K, S*C, D]`."""
        self.sums.index_add_(0, chunk.rows, gradients.reshape(len(chunk.rows), -1))

    def by_key(self, like: Tensor) -> Tensor:
        """`[B, L, K, D]`, zeros at masked keys."""
        sums = self.sums.view(self.chunks.blocks, self.kv_heads, self.chunks.block_size, -1)
        position, heads = self.chunks.position[..., None], torch.arange(self.kv_heads, device=like.device)
        block = self.chunks.base[..., None] + position // self.chunks.block_size
        grads = sums[block.clamp(min=0), heads, position % self.chunks.block_size]
        return grads.masked_fill(position[..., None] < 0, 0).to(like.dtype)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, ctx.block_size, ctx.scale, cu_seqlens, key_mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, block_indices, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, cu_seqlens, key_mask = ctx.saved_tensors
    grads = _backward(grad_out, grad_lse, *tensors, ctx.block_size, ctx.scale, cu_seqlens, key_mask)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
