"""select_blocks: which blocks of keys each query attends to, by its attention to compressed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.select_blocks import chunked, reference  # noqa: F401  (they register themselves)

dispatch.lazily("select_blocks", "triton", "zoo.ops.select_blocks.kernels", requires="triton")


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    top_n: int,
    first_blocks: int = 1,
    local_blocks: int = 2,
    recent_blocks: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The blocks of NSA's third tier (Yuan et al. 2025, arXiv:2502.11089, equations 8 to 12).

    Compressed key i of a document stands for its tokens i d ... i d + l - 1 (l compress_block, d compress_stride); a
    query at position t sees it once i d + l - 1 <= t. With p_i the softmax of the visible ones' logits scale q k_i,

        score_j = sum over the heads of a group and over i of p_i |compressed block i in selected block j| / d

    where selected block j is the tokens j l' ... (j + 1) l' - 1 (l' select_block). With l'/d = 4 and l/d = 2 these
    are compressed blocks 4j-1 ... 4j+3 with weights 1, 2, 2, 2, 1. The document's first `first_blocks` blocks and the
    last `local_blocks` up to the query's own are always chosen, the rest by score, of equal ones the latest. There is
    no gradient.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: compressed keys `[batch, compressed, kv_heads, head_dim]`; kv_heads divides heads, and consecutive query
            heads share one, and choose together.
        first: int64 `[batch, length]`, the first compressed key of the query's document.
        position: int64 `[batch, length]` of the query in its document; -1 where there is no query.
        compress_block: tokens in a compressed block, a multiple of compress_stride.
        compress_stride: tokens from one to the next.
        select_block: tokens in a block to choose, a multiple of compress_stride and at least compress_block: blocks
            within one compressed block could not be told apart.
        top_n: how many blocks are chosen, at least first_blocks + local_blocks; all where there are not so many.
        first_blocks: of the document, always chosen.
        local_blocks: up to the query's own, always chosen.
        recent_blocks: up to the query's own, beyond which none is chosen but the first_blocks; None for no such limit.
        scale: of the logits; None is head_dim^-0.5.
        lse: `[batch, length, heads]`, the log-sum-exp of each query's logits where that is known, as from
            interval_attention to the same keys; None computes it.

    Returns:
        int64 `[batch, length, kv_heads, top_n]` in no order, counted from the document's start, -1 for none: the
        `block_indices` of block_sparse_attention.

    Raises:
        ValueError: a shape or a number does not fit.
    """
    batch, length, heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k must be [{batch}, compressed, kv_heads, {head_dim}] to go with q, got {list(k.shape)}")
    for name, given in (("first", first), ("position", position)):
        if given.shape != (batch, length) or given.is_floating_point():
            raise ValueError(f"{name} must be whole numbers {[batch, length]}, got {given.dtype} {list(given.shape)}")
    for name, size in (("compress_block", compress_block), ("select_block", select_block)):
        if compress_stride < 1 or size < 1 or size % compress_stride:
            raise ValueError(f"{name} must be a multiple of compress_stride ({compress_stride}), got {size}")
    if select_block < compress_block:
        raise ValueError(f"select_block must be at least compress_block ({compress_block}), got {select_block}")
    if local_blocks < 1 or first_blocks < 0 or top_n < first_blocks + local_blocks:
        raise ValueError(
            f"top_n must be at least first_blocks + local_blocks ({first_blocks} + {local_blocks}, of these at least "
            f"1), got {top_n}"
        )
    if recent_blocks is not None and recent_blocks < local_blocks:
        raise ValueError(f"recent_blocks must be at least local_blocks ({local_blocks}), got {recent_blocks}")
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be [batch, length, heads] = {list(q.shape[:3])}, got {list(lse.shape)}")
    scale = head_dim**-0.5 if scale is None else scale
    rule = (compress_block, compress_stride, select_block, top_n, first_blocks, local_blocks, recent_blocks)
    return dispatch.run("select_blocks", q.device, q, k, first.long(), position.long(), lse, *rule, scale)
