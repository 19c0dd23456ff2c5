"""delta_rule: a decaying state that forgets what it held under a key before it writes there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.delta_rule import chunked as chunked
from zoo.ops.delta_rule import reference as reference
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("delta_rule", "library", "zoo.ops.delta_rule.library", requires="fla")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """The delta rule with decay, causal.

        S'_t = Diag(exp(g_t)) S_{t-1}
        S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T
        o_t = scale * q_t S_t

    With no decay this is DeltaNet (Yang et al. 2024, arXiv:2406.06484, section 2.2); with one per head and token, the
    gated delta rule (arXiv:2412.06464, equation 10); with one per channel of the keys, Kimi Delta Attention
    (arXiv:2510.26692, section 3). The state cannot grow where keys have at most unit length and beta is in [0, 2].

    States, decays, beta and their gradients are float32, or float64 where q, k or v is; so is what is computed.
    Gradients reach every tensor argument, also through the returned state.

    Args:
        q: queries `[batch, length, groups, key_dim]`.
        k: keys, like q; the op does not normalise them.
        v: values `[batch, length, heads, value_dim]`; groups divides heads, and consecutive heads share q and k.
        beta: how much of what is written replaces what was there, `[batch, length, heads]`.
        log_decay: g, the natural logarithm of the decay: `[batch, length, heads]`, `[batch, length, heads, key_dim]`,
            or None for no decay. A value above 0 counts as 0; -inf forgets everything before its token.
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
    per_head = (batch, length, heads)
    if beta.shape != per_head:
        raise ValueError(f"beta must be {list(per_head)}, got {list(beta.shape)}")
    if log_decay is not None and log_decay.shape not in (per_head, (*per_head, key_dim)):
        raise ValueError(
            f"log_decay must be {list(per_head)} (per head) or {[*per_head, key_dim]} (per channel of the keys), "
            f"got {list(log_decay.shape)}"
        )
    documents = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        documents = cu_seqlens.numel() - 1
    state_shape = (documents, heads, key_dim, value_dim)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")

    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    if log_decay is None:
        log_decay = v.new_zeros(heads, dtype=wide)  # the backends know a constant by its one dimension
    else:
        # exp(-1000) is 0 even in float64; a finite bound spares the backends -inf - -inf.
        log_decay = log_decay.to(wide).clamp(-1000.0, 0.0)
    if initial_state is None:
        initial_state = v.new_zeros(state_shape, dtype=wide)
    out, state = dispatch.run(
        "delta_rule", v.device, q, k, v, beta.to(wide), log_decay, scale, initial_state.to(wide), cu_seqlens
    )
    return (out, state) if return_state else out
