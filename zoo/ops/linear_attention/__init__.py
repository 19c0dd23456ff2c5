"""linear_attention: a decaying state of outer products. Lightning, RetNet, Mamba-2 and simple GLA are all this op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.linear_attention import chunked as chunked
from zoo.ops.linear_attention import reference as reference
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("linear_attention", "triton", "zoo.ops.linear_attention.kernels", requires="triton")
dispatch.lazily("linear_attention", "library", "zoo.ops.linear_attention.library", requires=("fla", "mamba_ssm"))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Linear attention with decay, causal, without a normaliser.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t

    The present token is not decayed. With no decay this is plain linear attention; with one per head, Lightning
    attention (Lightning Attention-2, arXiv:2401.04658, section 3) and RetNet (arXiv:2307.08621, section 2.1); with one
    per head and token, simple GLA and the SSD of Mamba-2 (arXiv:2405.21060, sections 6 and 7: q=C, k=B, v=dt*x,
    g=dt*A).

    States, decays and their gradients are float32, or float64 where q, k or v is. Gradients reach every tensor
    argument, also through the returned state.

    Args:
        q: queries `[batch, length, groups, key_dim]`.
        k: keys, like q.
        v: values `[batch, length, heads, value_dim]`; groups divides heads, and consecutive heads share q and k.
        log_decay: g, the natural logarithm of the decay: `[heads]`, `[batch, length, heads]`, or None for no decay.
            A value above 0 counts as 0; -inf forgets everything before its token.
        scale: a factor on the output.
        initial_state: the state to continue from, `[batch, heads, key_dim, value_dim]` (`[n, ...]` with `cu_seqlens`);
            None is zeros.
        return_state: also return the state after the last token.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1); the state starts anew
            at each. A document may be empty: its state passes through.

    Returns:
        out `[batch, length, heads, value_dim]` in v's dtype, or `(out, state)` with the state in float32 (float64 for
        float64 inputs), shaped like `initial_state`.

    Raises:
        ValueError: a shape does not fit, or `cu_seqlens` is not as described.
    """
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q must be [batch, length, groups, key_dim] with at least one token, got {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must be shaped like q, {list(q.shape)}, got {list(k.shape)}")
    batch, length, groups, key_dim = q.shape
    if v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must be [{batch}, {length}, heads, value_dim] to go with q, got {list(v.shape)}")
    heads, value_dim = v.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"v's {heads} heads must be a multiple of q's {groups}: consecutive heads share q and k")
    if log_decay is not None and log_decay.shape not in ((heads,), (batch, length, heads)):
        raise ValueError(
            f"log_decay must be [{heads}] (per head) or [{batch}, {length}, {heads}] (per token and head), "
            f"got {list(log_decay.shape)}"
        )
    documents = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        documents = cu_seqlens.numel() - 1
    state_shape = (documents, heads, key_dim, value_dim)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")

    double = torch.float64 in (q.dtype, k.dtype, v.dtype)
    state_dtype = torch.float64 if double else torch.float32
    if log_decay is None:
        log_decay = v.new_zeros(heads, dtype=state_dtype)
    else:
        # exp(-1000) is 0 even in float64; a finite bound spares the backends -inf - -inf.
        log_decay = log_decay.to(state_dtype).clamp(-1000.0, 0.0)
    if initial_state is None:
        initial_state = v.new_zeros(state_shape, dtype=state_dtype)
    out, state = dispatch.run(
        "linear_attention", v.device, q, k, v, log_decay, scale, initial_state.to(state_dtype), cu_seqlens
    )
    return (out, state) if return_state else out
