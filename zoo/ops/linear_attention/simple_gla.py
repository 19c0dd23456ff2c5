"""linear_attention by flash-linear-attention's simple_gla (package fla-core 0.6 or newer).

The same recurrence, state layout and gradients as ours. It wants as many heads of q and k as of v. Below one of its
chunks its token-by-token kernel serves. Of its two forms of the decay,

    g_gamma  `[H]`      has no gradient, and with a decay of e^-2 or stronger an unfinished chunk turns to NaN
    g        `[B,T,H]`  does everything

so g_gamma is for whole chunks of a constant decay, which is how Lightning attention trains.
"""

from __future__ import annotations

import importlib.metadata
import re

import torch
from torch import Tensor

from zoo.ops.dispatch import asked_device

CHUNK = 64
HOPPER = 9  # major compute capability


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
        return "bfloat16 only: it multiplies float32 in TF32, and keeps the states of float16 in float16"
    if q.shape[3] % 2 or v.shape[3] % 2:
        return "its backward pass needs even head dims"
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_decay, initial_state))
    chunked_with_g = v.shape[1] >= CHUNK and _decays_per_token(v, log_decay, cu_seqlens)
    if gradient and chunked_with_g and miscompiles(asked_device(v.device)):
        return "its gradients of a decay per token need Triton 3.7.1 on this GPU"
    return None


def _decays_per_token(v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether it gets the decay as g and not as g_gamma."""
    unfinished = cu_seqlens is not None or v.shape[1] % CHUNK != 0
    return log_decay.dim() == 3 or log_decay.requires_grad or unfinished


def miscompiles(device: torch.device) -> bool:
    """Triton before 3.7.1 makes wrong code of its backward pass with g for Hopper; fla raises there (its issue 640)."""
    if device.type != "cuda":
        return False
    try:
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            return False
    except (AssertionError, RuntimeError):
        return False  # explained from a machine without a GPU
    version = re.findall(r"\d+", importlib.metadata.version("triton"))[:3]
    return tuple(map(int, version)) < (3, 7, 1)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    batch, length, heads = v.shape[:3]
    shared = heads // q.shape[2]
    if shared > 1:
        q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    if _decays_per_token(v, log_decay, cu_seqlens):
        decay = {"g": log_decay.expand(batch, length, heads)}
    else:
        decay = {"g_gamma": log_decay}
    run = fused_recurrent_simple_gla if length < CHUNK else chunk_simple_gla
    out, state = run(
        q, k, v, **decay, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return out, state
