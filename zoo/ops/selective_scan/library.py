"""selective_scan by mamba-ssm's CUDA kernel (package mamba-ssm, built with its selective_scan_cuda).

It puts channels before tokens, wants one dtype for u, delta, B and C, and has no gradient of the last state. Tokens
after the end with delta = 0 and C = e_n leave the state alone and give its entry n as their output; where gradients
are wanted, those read the last state out.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.ops.dispatch import implements

MAX_STATE = 256
OFFSETS = 2**31  # it counts elements in 32 bits, and is wrong beyond without a word


def _refuses(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if initial_state is not None:
        return "it cannot continue from a state"
    if cu_seqlens is not None:
        return "it knows no documents"
    if torch.float64 in (u.dtype, delta.dtype, B.dtype, C.dtype):
        return "float64 inputs"
    batch, length, channels = u.shape
    state_size = A.shape[1]
    if state_size > MAX_STATE:
        return f"states larger than {MAX_STATE}, got {state_size}"
    if batch * channels * (length + state_size) >= OFFSETS:
        return f"{batch} x {length} x {channels} are too many elements for its 32-bit offsets"
    return None


@implements("selective_scan", "library", refuses=_refuses)
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
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    length, state_size = u.shape[1], A.shape[1]
    # delta is float32 where u is bfloat16: decays must not be rounded.
    dtype = reduce(torch.promote_types, (delta.dtype, B.dtype, C.dtype), u.dtype)
    inputs = [x.to(dtype).transpose(1, 2) for x in (u, delta, B, C)]
    reads = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, A))
    if reads:
        inputs = [pad(x, (0, state_size)) for x in inputs]
        inputs[3] = inputs[3] + pad(torch.eye(state_size, dtype=dtype, device=u.device), (length, 0))
    A = A.float().contiguous()
    D = None if D is None else D.float()
    out, state = selective_scan_fn(*inputs[:2], A, *inputs[2:], D, return_last_state=True)
    if reads:
        out, read = out.split([length, state_size], dim=-1)
        # The kernel's own last state is float32; what was read out brings the gradient.
        state = read.float() + (state - read.float()).detach()
    return out.transpose(1, 2).to(u.dtype), state
