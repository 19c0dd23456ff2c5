"""The selective scan, one token at a time. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("selective_scan", "reference")
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, state)` as the public function documents them."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (u, delta, B, C)]
    A = A.to(dtype)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    states = u.new_zeros(rows, *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if cu_seqlens is None:
        out, states = _scan(A, states, *inputs)
    else:
        bounds = cu_seqlens.tolist()
        outs, ends = [], []
        for i in range(rows):
            document = [x[:, bounds[i] : bounds[i + 1]] for x in inputs]
            y, state = _scan(A, states[i : i + 1], *document)
            outs.append(y)
            ends.append(state)
        out, states = torch.cat(outs, 1), torch.cat(ends)
    if D is not None:
        out = out + D.to(dtype) * inputs[0]
    return out.to(u.dtype), states


def _scan(A: Tensor, state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        # Outer product and read-out as matmuls, so that torch.utils.flop_counter sees 2*channels*state each.
        state = decay * state + (delta[:, t] * u[:, t])[:, :, None] @ B[:, t, None, :]
        out.append((state @ C[:, t, :, None]).squeeze(-1))
    return (torch.stack(out, 1) if out else torch.zeros_like(u)), state
