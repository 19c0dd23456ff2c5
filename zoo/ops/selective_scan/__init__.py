"""Selective state-space scan, the mixer of Mamba-1 (arXiv:2312.00752, Algorithm 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.selective_scan import chunked, reference  # noqa: F401  (they register themselves)
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("selective_scan", "triton", "zoo.ops.selective_scan.kernels", requires="triton")
# mamba-ssm installs without its selective scan unless told otherwise, so that is what must be there.
dispatch.lazily("selective_scan", "library", "zoo.ops.selective_scan.library", requires="selective_scan_cuda")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Selective state-space scan (Gu and Dao, arXiv:2312.00752, Algorithm 2), one diagonal state per channel.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = C_t h_t + D u_t

    Everything is computed in float32, in float64 where u is float64. Gradients reach every tensor argument, also
    through the returned state.

    Args:
        u: the input `[batch, length, channels]`.
        delta: the step size `[batch, length, channels]`, already after softplus.
        A: `[channels, state]`, negative.
        B: the input matrix `[batch, length, state]`.
        C: the output matrix `[batch, length, state]`.
        D: the skip `[channels]`, or None for no skip.
        initial_state: the state to continue from, `[batch, channels, state]` (`[n, channels, state]` with
            `cu_seqlens`); None is zeros.
        return_state: also return the state after the last token.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1); the state starts anew
            at each. A document may be empty: its state passes through.

    Returns:
        out `[batch, length, channels]` in u's dtype, or `(out, state)` with the state in float32 (float64 for float64
        inputs), shaped like `initial_state`.

    Raises:
        ValueError: a shape does not fit, or `cu_seqlens` is not as described.
    """
    if u.dim() != 3 or u.shape[1] == 0:
        raise ValueError(f"u must be [batch, length, channels] with at least one token, got {list(u.shape)}")
    batch, length, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [channels, state] with u's {channels} channels, got {list(A.shape)}")
    documents = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        documents = cu_seqlens.numel() - 1
    state_size = A.shape[1]
    _check_shape("delta", delta, "u's [batch, length, channels]", (batch, length, channels))
    _check_shape("B", B, "[batch, length, state] as u and A give it", (batch, length, state_size))
    _check_shape("C", C, "[batch, length, state] as u and A give it", (batch, length, state_size))
    _check_shape("D", D, "[channels]", (channels,))
    _check_shape("initial_state", initial_state, "[rows, channels, state]", (documents, channels, state_size))
    out, state = dispatch.run("selective_scan", u.device, u, delta, A, B, C, D, initial_state, cu_seqlens)
    return (out, state) if return_state else out


def _check_shape(name: str, x: Tensor | None, meaning: str, expected: tuple[int, ...]) -> None:
    if x is not None and x.shape != expected:
        raise ValueError(f"{name} must be {meaning} = {list(expected)}, got {list(x.shape)}")
