"""causal_conv1d for all tokens at once: the width shifted copies of the sequence, each times its weight, summed.

The initial states are put in front of their documents first, so that what remains is a plain convolution in which
nothing is special about a document's start.

The sum of shifted products in `[batch, length, channels]` beats F.conv1d on CPU because it needs no transpose to
`[batch, channels, length]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zoo.ops.dispatch import implements
from zoo.ops.varlen import document_ids


@implements("causal_conv1d", "torch")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    history = weight.shape[1] - 1
    states = initial_state.transpose(1, 2).to(x.dtype)
    if cu_seqlens is None:
        extended = torch.cat([states, x], dim=1)
        state = extended[:, length:]
        out = _Convolve.apply(extended, weight, bias)
    else:
        documents = states.shape[0]
        tokens = torch.arange(length, device=x.device) + document_ids(cu_seqlens, length) * history
        bounds = cu_seqlens + torch.arange(documents + 1, device=x.device) * history
        window = torch.arange(history, device=x.device)
        extended = x.new_empty(1, length + documents * history, x.shape[2])
        extended = extended.index_copy(1, tokens + history, x)
        extended = extended.index_copy(1, (bounds[:-1, None] + window).flatten(), states.flatten(0, 1)[None])
        state = extended[0, bounds[1:, None] - history + window]
        out = _Convolve.apply(extended, weight, bias).index_select(1, tokens)
    if activation == "silu":
        out = functional.silu(out)
    return out, state.transpose(1, 2).to(initial_state.dtype)


class _Convolve(torch.autograd.Function):
    """y_t = bias + sum_w weight_w x_{t+w}: x `[B,T+W-1,D]` to y `[B,T,D]`, summed in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        inputs, columns = x.to(dtype), weight.to(dtype).unbind(1)
        length = x.shape[1] - len(columns) + 1
        out = inputs[:, :length] * columns[0]
        for w, column in enumerate(columns[1:], start=1):
            out.addcmul_(inputs[:, w : w + length], column)
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        inputs, columns, d_out = x.to(dtype), weight.to(dtype).unbind(1), d_out.to(dtype)
        length = d_out.shape[1]
        d_x = torch.zeros_like(inputs)
        d_columns = []
        for w, column in enumerate(columns):
            d_x[:, w : w + length].addcmul_(d_out, column)
            d_columns.append((d_out * inputs[:, w : w + length]).sum((0, 1)))
        d_bias = d_out.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return d_x.to(x.dtype), torch.stack(d_columns, dim=1).to(weight.dtype), d_bias
