"""Comparisons shared by the tests of the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that is made inside, the operators of zoo.ops included: torch runs them
    with modes off, so they are taken apart here."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _maybe_get_opdef(func)
        if operator is not None:
            with self:
                return operator._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage()._cdata: x for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), result)
        )
        for x in (x for storage, x in made.items() if storage not in given):  # the others are views
            self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


# Of two functions in transformers that give the same output, the one whose gradients are right too: those of the decays
# through cumulative sums are off by up to 4e-4 of their norm.
RECURRENT = {
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
}


def in_torch(module: ModuleType) -> ModuleType:
    """A modelling file of transformers that calls functions of its own, the exact ones: where a package with kernels is
    installed (fla, causal-conv1d, mamba-ssm) it calls that package's instead, even with a CPU's tensors, which they
    cannot read."""
    for name, function in list(vars(module).items()):
        own = getattr(function, "__wrapped__", None)
        if own is not None and own.__module__ == module.__name__:
            setattr(module, name, own)
    for chunked, recurrent in RECURRENT.items():
        if hasattr(module, chunked):
            setattr(module, chunked, getattr(module, recurrent))
    return module
