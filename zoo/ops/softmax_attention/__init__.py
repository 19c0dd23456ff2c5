"""Softmax attention: causal or full, grouped heads, sliding window, sinks, packed or padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.softmax_attention import chunked, reference  # noqa: F401  (they register themselves)
from zoo.ops.softmax_attention.pattern import Pattern as Pattern
from zoo.ops.varlen import check_cu_seqlens

# What torch's own kernels serve stays with them until ours are measured to be faster.
dispatch.tell_apart("softmax_attention", chunked.kind_of, first={None: "torch"})
dispatch.lazily("softmax_attention", "triton", "zoo.ops.softmax_attention.kernels", requires="triton")
dispatch.lazily("softmax_attention", "library", "zoo.ops.softmax_attention.library", requires="torch")


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    num_sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    pattern: Pattern | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention (Vaswani et al., arXiv:1706.03762, section 3.2.1).

        out_i = sum_j exp(s_ij - lse_i) v_j,    lse_i = log sum_j exp(s_ij),    s_ij = scale q_i k_j

    over the keys j that query i may see; with `softcap` c, s_ij = c tanh(scale q_i k_j / c) (Gemma 2, arXiv:2408.00118,
    section 2). Query i stands where key `key_length - length + i` stands (its own key), so
    with fewer queries than keys the last ones align. A query that may see nothing gives 0 and an lse of -inf.
    Gradients reach q, k and v, also through lse.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, key_length, kv_heads, head_dim]`; kv_heads divides heads, and consecutive query heads share one
            (grouped-query attention, arXiv:2305.13245).
        v: `[batch, key_length, kv_heads, v_head_dim]`.
        causal: a query sees no key after its own.
        window: how many keys a query sees, its own included; None is no limit. Needs `causal`.
        num_sinks: the first keys of each document stay visible beyond the window (StreamingLLM, arXiv:2309.17453).
        scale: of the logits; None is head_dim^-0.5.
        softcap: the logits stay between -softcap and softcap; None does not bound them.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1, key_length == length);
            a query sees its own document only. A document may be empty.
        key_mask: bool `[batch, key_length]`, True where a key is real, for padded batches. Positions (for causal,
            window and sinks) are then counted among the row's real keys. A query whose own key is masked sees nothing.
        pattern: which keys a query sees beyond a window and sinks (dilation, stride, random blocks); it holds its own
            window and num_sinks, which must not be given beside it. Needs `causal`.
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
    if pattern is not None:
        if window is not None or num_sinks or not causal:
            raise ValueError("pattern holds window and num_sinks and needs causal=True; give them inside it")
        if pattern.is_plain:
            window, num_sinks, pattern = pattern.window, pattern.num_sinks, None
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True, got window {window}, causal={causal}")
    if num_sinks < 0:
        raise ValueError(f"num_sinks must be 0 or more, got {num_sinks}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
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
    if scale is None:
        scale = head_dim**-0.5
    out, lse = dispatch.run(
        "softmax_attention",
        q.device,
        q,
        k,
        v,
        causal=causal,
        window=window,
        num_sinks=num_sinks,
        scale=scale,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
        key_mask=key_mask,
        pattern=pattern,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out
