"""interval_attention: every query attends to the keys of an interval of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.interval_attention import chunked, reference  # noqa: F401  (they register themselves)

dispatch.lazily("interval_attention", "triton", "zoo.ops.interval_attention.kernels", requires="triton")


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of query t to the keys j with first_t <= j < stop_t.

        out_t = sum_j exp(s_tj - lse_t) v_j,    lse_t = log sum_j exp(s_tj),    s_tj = scale q_t k_j

    For keys that are not the queries' own tokens, as the compressed blocks of NSA (arXiv:2502.11089, equation 7), of
    which a query sees those that end before it. A query whose interval is empty gives 0 and an lse of -inf. Gradients
    reach q, k and v, also through lse.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, key_length, kv_heads, head_dim]`; kv_heads divides heads, and consecutive query heads share one.
            There may be no key at all.
        v: `[batch, key_length, kv_heads, v_head_dim]`.
        first: int64 `[batch, length]`, the first key a query sees.
        stop: int64 `[batch, length]`, the end of the keys it sees. There are no keys before 0 and after the last.
        scale: of the logits; None is head_dim^-0.5.
        return_lse: also return the log-sum-exp of the logits s (natural logarithm).

    Returns:
        out `[batch, length, heads, v_head_dim]` in q's dtype, or `(out, lse)` with lse `[batch, length, heads]` in
        float32 (float64 for float64 inputs). The softmax is computed in that dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be [batch, length, heads, head_dim], got {shapes}")
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must have q's batch {batch} and head_dim {head_dim}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's [batch, key_length, kv_heads] {list(k.shape[:3])}, got {list(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's kv_heads, got {kv_heads}")
    for name, bound in (("first", first), ("stop", stop)):
        if bound.shape != (batch, length) or bound.is_floating_point():
            got = f"{bound.dtype} {list(bound.shape)}"
            raise ValueError(f"{name} must be whole numbers [batch, length] = {[batch, length]}, got {got}")
    scale = head_dim**-0.5 if scale is None else scale
    first, stop = (bound.long().clamp(0, k.shape[1]) for bound in (first, stop))
    out, lse = dispatch.run("interval_attention", q.device, q, k, v, first, stop, scale)
    return (out, lse) if return_lse else out
