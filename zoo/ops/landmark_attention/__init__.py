"""landmark_attention: attention to blocks of keys through a landmark behind each block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.landmark_attention import chunked as chunked
from zoo.ops.landmark_attention import reference as reference
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("landmark_attention", "triton", "zoo.ops.landmark_attention.kernels", requires="triton")
dispatch.tell_apart("landmark_attention", lambda *arguments: None if arguments[-1] is None else "top_k", {})


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    top_k: int | None = None,
) -> Any:
    """Attention with the grouped softmax of landmark tokens, causal (Mohtashami and Jaggi 2023, arXiv:2305.16300,
    section 3.1).

    A landmark ends a block; the keys before it, back to the landmark before, are the block's ordinary ones. Query t,
    with the logits s_j = scale q_t k_j, has one softmax over its own block's ordinary keys up to t and the landmarks of
    earlier blocks, and shares what a landmark gets among that block's keys:

        p = softmax(s_j : j <= t ordinary in t's block, or j the landmark of an earlier block)
        out_t = sum_{j in t's block} p_j v_j + sum_{earlier blocks b} p_landmark(b) sum_{j in b} softmax_b(s)_j v_j

    A landmark's value counts nowhere, and a landmark's own query leaves its key out. A landmark without an ordinary
    key before it stands for nothing: no query sees it. The weights of the v_j sum to 1, but for a query that sees
    nothing at all, which gives 0.

    With top_k, the first softmax of a query and head has of the landmarks only the top_k largest: no other block is
    read, and the work grows with the length squared only by a product per landmark. Logits that agree to 1/64 are
    equal there, and of equal ones the latest block is taken. The choice is not differentiated.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, key_length, kv_heads, head_dim]`; kv_heads divides heads, and consecutive query heads share one.
            With fewer queries than keys the last ones align.
        v: `[batch, key_length, kv_heads, v_head_dim]`.
        is_landmark: bool `[batch, key_length]`. Blocks may have any sizes, and the last one need not be complete.
        scale: of the logits; None is head_dim^-0.5.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1, key_length == length);
            each is as if alone. A document may be empty.
        key_mask: bool `[batch, key_length]`, True where a key is real, for padded batches: the others are as if they
            were not there, and their queries give 0.
        top_k: how many earlier blocks each head of a query reads, at least 1; None is all of them.

    Returns:
        out `[batch, length, heads, v_head_dim]` in q's dtype; computed in at least float32.

    Raises:
        ValueError: a shape does not fit, or the arguments exclude each other.
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
    for name, mask in (("is_landmark", is_landmark), ("key_mask", key_mask)):
        if mask is not None and (mask.shape != (batch, key_length) or mask.dtype != torch.bool):
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"{name} must be bool [batch, key_length] = {[batch, key_length]}, got {got}")
    if cu_seqlens is not None:
        if key_mask is not None:
            raise ValueError(
                "cu_seqlens and key_mask exclude each other: packed rows have no padding, give one of them"
            )
        if length != key_length:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {length} and {key_length}")
        check_cu_seqlens(cu_seqlens, batch, length)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all blocks, got {top_k}")
    if scale is None:
        scale = head_dim**-0.5
    return dispatch.run("landmark_attention", q.device, q, k, v, is_landmark, scale, cu_seqlens, key_mask, top_k)
