"""Chooses the implementation behind an op.

An op is a public function in `zoo/ops/<op>/__init__.py`. It checks its arguments once and then calls the
implementation that `select` returns. Each implementation registers itself under (op, backend):

    reference   one token at a time, float64-capable, obviously right; everything else is compared with it
    torch       chunked PyTorch, memory-linear in the length
    triton      our GPU kernels
    library     somebody else's kernels (fla, mamba-ssm), imported only when chosen
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

BACKENDS = ("reference", "torch", "triton", "library")

Function = TypeVar("Function", bound=Callable[..., Any])

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
# A plain global, not a ContextVar: torch.compile guards on it, so a graph compiled under one backend is never
# reused under another.
_chosen = "auto"


def implements(op: str, backend: str) -> Callable[[Function], Function]:
    """Register the decorated function as `backend` of `op`."""

    def register(function: Function) -> Function:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return register


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` on one backend: reference, torch, triton, library, or auto (the default).

    Raises:
        ValueError: no such backend.
    """
    global _chosen
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend {name!r} does not exist; choose one of {', '.join((*BACKENDS, 'auto'))}")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def backends(op: str) -> tuple[str, ...]:
    """The backends `op` has, in the order of BACKENDS.

    Raises:
        ValueError: no such op.
    """
    if op not in _implementations:
        raise ValueError(f"op {op!r} does not exist; choose one of {', '.join(sorted(_implementations))}")
    return tuple(name for name in BACKENDS if name in _implementations[op])


def run(op: str, device: torch.device, /, *args: Any, **kwargs: Any) -> Any:
    """Call `op` on the chosen backend, outside autocast: an op states its own precision.

    Raises:
        ValueError: the chosen backend is not implemented for this op.
    """
    name = "torch" if _chosen == "auto" else _chosen
    function = _implementations[op].get(name)
    if function is None:
        raise ValueError(f"{op} has no {name!r} backend; it has {', '.join(backends(op))}")
    # The meta device has no autocast to ask about.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        with torch.autocast(device_type=device.type, enabled=False):
            return function(*args, **kwargs)
    return function(*args, **kwargs)
