"""causal_conv1d: the short depthwise convolution before a state-space layer's scan."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.causal_conv1d import chunked as chunked
from zoo.ops.causal_conv1d import reference as reference
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("causal_conv1d", "triton", "zoo.ops.causal_conv1d.kernels", requires="triton")
dispatch.lazily("causal_conv1d", "library", "zoo.ops.causal_conv1d.library", requires="causal_conv1d")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Depthwise convolution along the sequence that never looks ahead (Mamba, arXiv:2312.00752, section 3.4).

        y_t = activation(bias + sum_{w=0..W-1} weight_w * x_{t-W+1+w})

    Gradients reach every tensor argument, also through the returned state.

    Args:
        x: `[batch, length, channels]`.
        weight: `[channels, width]`; the last column meets the present token.
        bias: `[channels]` or None.
        activation: "silu" or None.
        initial_state: the width - 1 inputs before the first, oldest first, `[batch, channels, width - 1]`
            (`[n, channels, width - 1]` with `cu_seqlens`); None is zeros.
        return_state: also return the last width - 1 inputs, those of `initial_state` among them when x is shorter.
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1); each sees only itself
            and its row of the state. A document may be empty: its state passes through.

    Returns:
        out, shaped like x and in its dtype, or `(out, state)` with the state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape does not fit, the activation is unknown, or `cu_seqlens` is not as described.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [batch, length, channels] with at least one token, got {list(x.shape)}")
    batch, length, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"weight must be [{channels}, width] to go with x's channels, got {list(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}] to go with x's channels, got {list(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    documents = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        documents = cu_seqlens.numel() - 1
    state_shape = (documents, channels, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")

    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = x.new_zeros(state_shape, dtype=state_dtype)
    out, state = dispatch.run(
        "causal_conv1d", x.device, x, weight, bias, activation, initial_state.to(state_dtype), cu_seqlens
    )
    return (out, state) if return_state else out
