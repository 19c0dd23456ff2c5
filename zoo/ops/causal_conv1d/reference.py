"""causal_conv1d one token at a time: a window of the last inputs slides along the sequence."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from zoo.ops.dispatch import implements


@implements("causal_conv1d", "reference")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        out, state = _slide(x, weight, bias, activation, initial_state)
        return out.to(x.dtype), state
    outs, states = [], []
    bounds = cu_seqlens.tolist()
    for document, (start, end) in enumerate(pairwise(bounds)):
        rows = initial_state[document : document + 1]
        out, state = _slide(x[:, start:end], weight, bias, activation, rows)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1).to(x.dtype), torch.cat(states)


def _slide(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    weight = weight.to(state.dtype)
    inputs = x.to(state.dtype)
    outs = [inputs[:, :0]]
    for x_t in inputs.unbind(1):
        window = torch.cat([state, x_t[..., None]], dim=-1)
        # einsum becomes a matmul, so that torch.utils.flop_counter sees the 2*W FLOPs of a channel and token.
        y = torch.einsum("bdw,dw->bd", window, weight)
        if bias is not None:
            y = y + bias.to(state.dtype)
        outs.append((functional.silu(y) if activation == "silu" else y)[:, None])
        state = window[..., 1:]
    return torch.cat(outs, dim=1), state
