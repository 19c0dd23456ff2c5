"""gated_rms_norm as its equation reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zoo.ops.dispatch import implements


@implements("gated_rms_norm", "reference")
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, activation: str, gate_first: bool
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    factor = functional.silu(gate.to(dtype)) if activation == "silu" else torch.sigmoid(gate.to(dtype))
    y = x.to(dtype)
    if gate_first:
        y = y * factor
    groups = y.unflatten(-1, (num_groups, -1))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    if not gate_first:
        y = y * factor
    return y.to(gate.dtype)
