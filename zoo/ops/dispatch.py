"""Chooses the implementation behind an op.

An op is a public function in `zoo/ops/<op>/__init__.py`. It checks its arguments once and then calls the
implementation that `choose` names. Each implementation registers itself under (op, backend):

    reference   one token at a time, float64-capable, obviously right; everything else is compared with it
    torch       chunked PyTorch, memory-linear in the length
    triton      our GPU kernels
    library     somebody else's kernels (fla, mamba-ssm), imported only when chosen

A backend that needs a package is imported when it first runs (`lazily`), and may refuse calls it would get wrong.
`auto` takes, of those that can serve the call, the one measured fastest (measured.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from zoo.ops import measured

BACKENDS = ("reference", "torch", "triton", "library")
# Without a measurement: kernels before chunked PyTorch, ours before a library's, which may not do everything.
UNMEASURED = ("triton", "library", "torch")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Implementation:
    """`function` is None until `module`, which registers it, has been imported."""

    function: Callable[..., Any] | None = None
    refuses: Callable[..., str | None] | None = None
    module: str | None = None
    requires: tuple[str, ...] = ()


class Choice(NamedTuple):
    """Which backend runs and why; `others` says of each remaining one why not."""

    backend: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.backend}: {self.reason}", *(f"not {name}: {why}" for name, why in self.others.items())]
        )


class Kinds(NamedTuple):
    """Kinds of calls of one op, among which the fastest backend differs.

    of     called with the op's arguments, says of which kind they are; None is the plain one. As `refuses`, it looks at
           shapes and dtypes only
    first  by kind, the backend that comes first where nothing is measured, for other kinds UNMEASURED
    """

    of: Callable[..., str | None]
    first: Mapping[str | None, str]


_implementations: dict[str, dict[str, Implementation]] = {}
_kinds: dict[str, Kinds] = {}
# A plain global, not a ContextVar: torch.compile guards on it, so a graph compiled under one backend is never
# reused under another.
_chosen = "auto"
# What `only_choosing` collects instead of running anything, and the device the call would run on.
_explaining: tuple[torch.device, list[Choice]] | None = None


def implements(
    op: str, backend: str, refuses: Callable[..., str | None] | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function as `backend` of `op`.

    `refuses`, called with the op's arguments, says why this backend cannot serve them, or None. It looks at shapes and
    dtypes, never at values.
    """

    def register(function: Function) -> Function:
        implementation = _implementations.setdefault(op, {}).setdefault(backend, Implementation())
        implementation.function, implementation.refuses = function, refuses
        return function

    return register


def lazily(op: str, backend: str, module: str, requires: str | tuple[str, ...]) -> None:
    """`backend` of `op` is registered by `module`, imported at its first use; it needs the package `requires`, or one
    of several."""
    packages = (requires,) if isinstance(requires, str) else requires
    _implementations.setdefault(op, {})[backend] = Implementation(module=module, requires=packages)


def tell_apart(op: str, of: Callable[..., str | None], first: Mapping[str | None, str]) -> None:
    """Measure calls of `op` by Kinds."""
    _kinds[op] = Kinds(of, first)


def measured_as(op: str, kind: str | None) -> str:
    """What measured.json calls calls of this kind, of an op that tells kinds apart."""
    return f"{op}: {kind}" if kind is not None and op in _kinds else op


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


def backends(op: str, device: torch.device | str | None = None) -> tuple[str, ...]:
    """The backends `op` has, in the order of BACKENDS; with a device, those that can run there.

    Raises:
        ValueError: no such op.
    """
    if op not in _implementations:
        raise ValueError(f"op {op!r} does not exist; choose one of {', '.join(sorted(_implementations))}")
    names = (name for name in BACKENDS if name in _implementations[op])
    if device is None:
        return tuple(names)
    return tuple(name for name in names if _cannot_run(op, name, torch.device(device).type) is None)


def choose(op: str, device: torch.device, /, *args: Any, **kwargs: Any) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: the backend asked for does not exist for this op, cannot run here, or refuses the call.
    """
    if _chosen != "auto":
        problem = _problem(op, _chosen, device.type, args, kwargs)
        if problem is not None:
            usable = [name for name in BACKENDS if _problem(op, name, device.type, args, kwargs) is None]
            raise ValueError(f"{op} cannot run on backend {_chosen!r}: {problem}; use {', '.join((*usable, 'auto'))}")
        return _chosen
    called, order = _automatic_order(op, device.type, args, kwargs)
    candidates = [name for name in order if not _problem(op, name, device.type, args, kwargs)]
    if len(candidates) == 1:
        return candidates[0]
    first = args[0]
    table = measured.fastest(called, _name(device), first.dtype, first.shape[-1], tuple(candidates))
    # Comparisons, so that torch.compile guards on a class of lengths and not on each length.
    longest = table[-1][1] if table else candidates[0]
    return next((name for length, name in table if first.shape[1] <= length), longest)


def explain_choice(op: str, device: torch.device, /, *args: Any, **kwargs: Any) -> Choice:
    """As `choose`, with its reasons."""
    chosen = choose(op, device, *args, **kwargs)
    if _chosen != "auto":
        return Choice(chosen, f'asked for with zoo.ops.backend("{_chosen}")', {})
    called, order = _automatic_order(op, device.type, args, kwargs)
    problems = {name: _problem(op, name, device.type, args, kwargs) for name in order}
    candidates = tuple(name for name, problem in problems.items() if problem is None)
    others = {name: problem for name, problem in problems.items() if problem is not None}
    if len(candidates) == 1:
        return Choice(chosen, f"the only one that serves this call on {device.type}", others)
    first = args[0]
    rows = measured.by_length(called, _name(device), measured.name_of(first.dtype), first.shape[-1], candidates)
    if not rows:
        others |= dict.fromkeys(candidates[1:], "comes later in the order for what is not measured")
        return Choice(chosen, f"first in the order for what is not measured: no figures for {_name(device)}", others)
    row = next((row for row in rows if first.shape[1] <= row.length), rows[-1])
    figures = {name: f"{time:.3g} ms" for name, time in row.among(candidates).items()}
    others |= {name: figures.get(name, "not measured there") for name in candidates if name != chosen}
    at = f"length {row.length}, width {row.width}, {row.dtype} on {row.device}"
    return Choice(chosen, f"the fastest measured at {at}: {figures[chosen]}", others)


def run(op: str, device: torch.device, /, *args: Any, **kwargs: Any) -> Any:
    """Call `op` on the backend that serves it, outside autocast: an op states its own precision.

    Raises:
        ValueError: as `choose`.
    """
    if _explaining is not None:
        device, choices = _explaining
        choices.append(explain_choice(op, device, *args, **kwargs))
        raise _Explained
    name = choose(op, device, *args, **kwargs)
    function = _implementations[op][name].function
    assert function is not None, "choose() has imported the module that registers it"
    if device.type == "cuda" and not torch.compiler.is_compiling() and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return _outside_autocast(function, device, *args, **kwargs)
    return _outside_autocast(function, device, *args, **kwargs)


def _outside_autocast(function: Callable[..., Any], device: torch.device, /, *args: Any, **kwargs: Any) -> Any:
    # The meta device has no autocast to ask about.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        with torch.autocast(device_type=device.type, enabled=False):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def outside_autocast(differentiate: Function) -> Function:
    """An operator's registered gradient, run outside autocast as the op is: backward() may be called inside."""

    @wraps(differentiate)
    def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
        # Not from ctx.saved_tensors: a checkpoint unpacks those only once.
        device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
        return _outside_autocast(differentiate, device, ctx, *grads)

    return cast(Function, wrapped)


def asked_device(device: torch.device) -> torch.device:
    """The device that a call on `device` is about: another one while it is only being explained."""
    return device if _explaining is None else _explaining[0]


class _Explained(Exception):
    """Leaves an op once its backend is known."""


@contextmanager
def only_choosing(device: torch.device) -> Iterator[list[Choice]]:
    """Inside, an op called on tensors of any device leaves the `with` block once its backend on `device` is chosen;
    the list then holds the choice."""
    global _explaining
    choices: list[Choice] = []
    previous, _explaining = _explaining, (device, choices)
    try:
        yield choices
    except _Explained:
        pass
    finally:
        _explaining = previous


def _automatic(op: str, device_type: str) -> list[str]:
    """What `auto` chooses from: never the reference, and kernels only on a GPU (interpreted ones are for tests)."""
    names = UNMEASURED if device_type == "cuda" else ("torch",)
    return [name for name in names if name in _implementations[op]]


def _automatic_order(op: str, device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[str]]:
    """What such calls are called where they are measured, and the order of backends where they are not."""
    names = _automatic(op, device_type)
    if len(names) == 1 or op not in _kinds:
        return op, names
    kind = _kinds[op].of(*args, **kwargs)
    first = _kinds[op].first.get(kind)
    return measured_as(op, kind), sorted(names, key=lambda name: name != first)


def _problem(op: str, name: str, device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why backend `name` cannot serve this call, or None."""
    problem = _cannot_run(op, name, device_type)
    if problem is not None:
        return problem
    refuses = _implementations[op][name].refuses
    return None if refuses is None else refuses(*args, **kwargs)


# What torch.compile may take as constants: it cannot look into imports, files and the environment.
_constant = torch.compiler.assume_constant_result


@_constant
def _cannot_run(op: str, name: str, device_type: str) -> str | None:
    """Why backend `name` of `op` cannot run on such a device, or None; then its module has been imported."""
    implementation = _implementations[op].get(name)
    if implementation is None:
        return "it is not implemented"
    missing = [package for package in implementation.requires if not _installed(package)]
    if missing and len(missing) == len(implementation.requires):
        return f"{missing[0]} is not installed" + "".join(f", nor is {package}" for package in missing[1:])
    if name == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels need a GPU (TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests)"
    if name == "library" and device_type == "cpu":
        return "its kernels need a GPU"
    if implementation.function is None:
        assert implementation.module is not None, "lazily() gives it"
        problems = [unusable(package) for package in implementation.requires if package not in missing]
        if problems and all(problems):
            return problems[0]
        return unusable(implementation.module)
    return None


@_constant
def unusable(module: str) -> str | None:
    """Why a module cannot be imported, or None once it is."""
    if "." not in module and not _installed(module):
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # built for another torch, say: auto passes it over
        return f"it cannot be imported: {str(error).splitlines()[0]}"
    return None


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@_constant
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
