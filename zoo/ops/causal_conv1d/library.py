"""causal_conv1d by the package causal-conv1d.

It takes `[batch, channels, length]` with the channels contiguous, which is our layout seen the other way round. The
state is the last inputs, which need no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements

WIDTHS = (2, 3, 4)
VECTOR = 8  # channels it loads at once
OFFSETS = 2**32  # it counts elements in 32 bits, and is wrong beyond without a word


def _refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if cu_seqlens is not None:
        return "it has no states for documents"
    if torch.float64 in (x.dtype, weight.dtype):
        return "float64 inputs"
    if weight.shape[1] not in WIDTHS:
        return f"widths other than 2, 3 and 4, got {weight.shape[1]}"
    if x.shape[2] % VECTOR:
        return f"channels must be a multiple of {VECTOR}, got {x.shape[2]}"
    if max(x.shape[0] * x.stride(0), x.shape[1] * x.stride(1)) >= OFFSETS:
        return f"{' x '.join(map(str, x.shape))} are too many elements for its 32-bit offsets"
    return None


@implements("causal_conv1d", "library", refuses=_refuses)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn

    if x.stride(2) != 1 or any(distance % VECTOR for distance in (x.storage_offset(), *x.stride()[:2])):
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() would keep the strides of a single row
    before = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    bias = None if bias is None else bias.to(weight.dtype)
    out = causal_conv1d_fn(x.transpose(1, 2), weight, bias, initial_states=before, activation=activation)
    last = weight.shape[1] - 1
    state = torch.cat([initial_state, x[:, -last:].transpose(1, 2).to(initial_state.dtype)], dim=-1)[..., -last:]
    return out.transpose(1, 2), state
