"""linear_attention by mamba-ssm's SSD (package mamba-ssm, Triton kernels; Mamba-2, arXiv:2405.21060, section 6).

    S_t = exp(dt A) S_{t-1} + dt x_t B_t^T      is ours with dt = 1, A = log_decay, x = v, B = k, C = q

A decay per token would have to be dt, and v be divided by it: at a decay of nothing that is 0 / 0, and near it the
gradients cancel each other's digits. So a decay per head is what it serves. Its state is `[heads, value, key]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

WRONG_FROM = 61_000  # tokens from which it is wrong without a word (its issue 1015)
CHUNK = 256


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if {q.dtype, k.dtype, v.dtype} != {torch.bfloat16}:
        return "bfloat16 only: it multiplies float32 in TF32"
    if log_decay.dim() == 3:
        return "a decay per token would be divided by"
    if cu_seqlens is not None:
        return "it has no states for documents"
    if v.shape[1] >= WRONG_FROM:
        return f"{v.shape[1]} tokens: it is wrong from about {WRONG_FROM}"
    return None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    ones = torch.ones(v.shape[:3], dtype=torch.float32, device=v.device)
    out, state = mamba_chunk_scan_combined(
        v, ones, log_decay, k, q * scale, CHUNK, initial_states=initial_state.mT.contiguous(), return_final_states=True
    )
    return out, state.float().mT
