"""Comparisons shared by the tests of the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(out: Tensor | None, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, computed in float64.

    Infinite (so every comparison fails) when `out` is missing, has another shape, or holds anything not finite.
    An all-zero reference leaves nothing to divide by, so then the norm of `out` itself is returned.
    """
    if out is None or out.shape != ref.shape or not torch.isfinite(out).all():
        return math.inf
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    norm = ref.norm().item()
    return (out - ref).norm().item() / (norm if norm > 0 else 1.0)
