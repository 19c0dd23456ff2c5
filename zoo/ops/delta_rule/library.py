"""delta_rule by flash-linear-attention's gated_delta_rule and kda (package fla-core 0.6 or newer).

The same recurrence, state layout and gradients as ours, and heads of q and k shared alike. Its kernels for a few tokens
have no backward pass, so they serve only where no gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import asked_device, implements
from zoo.ops.linear_attention.simple_gla import miscompiles

CHUNK = 64
MAX_KEY_DIM = 256


def _refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if {q.dtype, k.dtype, v.dtype} != {torch.bfloat16}:
        return "bfloat16 only: it multiplies float32 in TF32"
    if q.shape[3] > MAX_KEY_DIM:
        return f"its kernels have keys of at most {MAX_KEY_DIM}"
    gradient = _wants_gradient(q, k, v, beta, log_decay, initial_state)
    if gradient and log_decay.dim() < 4 and miscompiles(asked_device(v.device)):
        return "its gradients of a decay per head need Triton 3.7.1 on this GPU"
    return None


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@implements("delta_rule", "library", refuses=_refuses)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    per_channel = log_decay.dim() == 4
    gradient = _wants_gradient(q, k, v, beta, log_decay, initial_state)
    if v.shape[1] < CHUNK and not gradient:
        run = fused_recurrent_kda if per_channel else fused_recurrent_gated_delta_rule
    else:
        run = chunk_kda if per_channel else chunk_gated_delta_rule
    if not per_channel:
        log_decay = log_decay.expand(v.shape[:3])
    out, state = run(
        q=q,
        k=k,
        v=v,
        g=log_decay,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return out, state
