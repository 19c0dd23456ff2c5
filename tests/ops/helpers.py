"""Comparisons shared by the tests of the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Where the kernels' tests run: interpreted on the CPU, or on a GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin come full of NaN inside, so that what nobody writes shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
