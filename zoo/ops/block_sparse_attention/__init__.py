"""block_sparse_attention: every query attends to the blocks of keys that are named for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.block_sparse_attention import chunked, reference  # noqa: F401  (they register themselves)
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("block_sparse_attention", "triton", "zoo.ops.block_sparse_attention.kernels", requires="triton")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention to chosen blocks (NSA, Yuan et al. 2025, arXiv:2502.11089, section 3.3.2; MoBA,
    arXiv:2502.13189, section 2.1).

        out_t = sum_j exp(s_tj - lse_t) v_j,    lse_t = log sum_j exp(s_tj),    s_tj = scale q_t k_j

    over the keys j <= t of query t's own document whose block, floor(position_j / block_size), is among
    block_indices_t. Query t stands where key `key_length - length + t` stands (its own key), so with fewer queries than
    keys the last ones align. A query that may see nothing gives 0 and an lse of -inf. Gradients reach q, k and v, also
    through lse.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, key_length, kv_heads, head_dim]`; kv_heads divides heads, and consecutive query heads share one.
        v: `[batch, key_length, kv_heads, v_head_dim]`.
        block_indices: int64 or int32 `[batch, length, kv_heads, blocks]`, counted from the start of the query's
            document; -1 is none, a block named twice counts once, and of a block after the query nothing is seen.
        block_size: keys in a block.
        scale: of the logits; None is head_dim^-0.5.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1, key_length == length).
            A document may be empty.
        key_mask: bool `[batch, key_length]`, True where a key is real, for padded batches. Positions are then counted
            among the row's real keys. A query whose own key is masked sees nothing.
        return_lse: also return the log-sum-exp of the logits s (natural logarithm).

    Returns:
        out `[batch, length, heads, v_head_dim]` in q's dtype, or `(out, lse)` with lse `[batch, length, heads]` in
        float32 (float64 for float64 inputs). The softmax is computed in that dtype.

    Raises:
        ValueError: a shape or a number does not fit, or the arguments exclude each other.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be [batch, length, heads, head_dim], got {shapes}")
    batch, length, heads, head_dim = q.shape
    key_length, kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must have q's batch {batch} and head_dim {head_dim}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's [batch, key_length, kv_heads] {list(k.shape[:3])}, got {list(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's kv_heads, got {kv_heads}")
    if not 1 <= length <= key_length:
        raise ValueError(f"q must have 1 to {key_length} tokens, as many as k at most, got {list(q.shape)}")
    wanted = (batch, length, kv_heads)
    if block_indices.dim() != 4 or block_indices.shape[:3] != wanted or block_indices.is_floating_point():
        got = f"{block_indices.dtype} {list(block_indices.shape)}"
        raise ValueError(f"block_indices must be whole numbers {[*wanted, 'blocks']}, got {got}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if cu_seqlens is not None:
        if key_mask is not None:
            raise ValueError(
                "cu_seqlens and key_mask exclude each other: packed rows have no padding, give one of them"
            )
        if length != key_length:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {length} and {key_length}")
        check_cu_seqlens(cu_seqlens, batch, length)
    if key_mask is not None and (key_mask.shape != (batch, key_length) or key_mask.dtype != torch.bool):
        got = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(f"key_mask must be bool [batch, key_length] = {[batch, key_length]}, got {got}")
    out, lse = dispatch.run(
        "block_sparse_attention",
        q.device,
        q,
        k,
        v,
        block_indices.long(),
        block_size,
        head_dim**-0.5 if scale is None else scale,
        cu_seqlens,
        key_mask,
    )
    return (out, lse) if return_lse else out
