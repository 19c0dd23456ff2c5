"""Each op alone: every backend that runs on the device, and the peers, at several lengths and widths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.inputs import CACHED, SPARSE, Case, Shape, cases, floor, make_inputs
from benchmarks.rows import Options, Row, Task, make_row
from benchmarks.timing import Timing, alternate
from zoo import ops
from zoo.ops import dispatch

FORWARD, BOTH, DECODE = "forward", "forward+backward", "decode"
LENGTHS = {"cpu": (512, 4096), "cuda": (2048, 8192, 32768, 65536, 131072), "quick": (32,)}
TOKENS = {"cpu": 4096, "cuda": 131072, "quick": 64}  # of all rows of a batch together
# Whose one token attends to a cache.
CACHING = ("softmax_attention", "landmark_attention", *SPARSE)
FORWARD_ONLY = ("select_blocks",)  # without a gradient
SLOW_REFERENCE = 512  # tokens beyond which one token at a time takes too long
# Ours and the peers' names of what is a constant there, as in the model, and gets no gradient.
CONSTANT = {"per head": ("log_decay", "dt", "A")}


def plan(options: Options) -> list[Task]:
    shapes = [(Shape(1, 1, decode=True), DECODE)]
    for length in LENGTHS[options.size]:
        shape = Shape(max(1, TOKENS[options.size] // length), length)
        shapes += [(shape, FORWARD), (shape, BOTH)]
    return [
        Task(
            case.op,
            f"{case.op} {case.width} {dtype} {shape.batch} x {shape.length} {pass_}",
            partial(measure, case, shape, pass_, dtype, options),
        )
        for case in cases(options.size)
        for dtype in options.dtypes
        for shape, pass_ in shapes
        if pass_ != BOTH or case.op not in FORWARD_ONLY
    ]


def measure(case: Case, shape: Shape, pass_: str, dtype: str, options: Options) -> Row:
    """One row: our backends and the peers on the same values."""
    if shape.decode and case.op in CACHING:
        shape = shape._replace(keys=CACHED[options.size])
    inputs = make_inputs(case, shape, dtype, options)
    constant = CONSTANT.get(case.variant or "", ())
    ours = [name for name in dispatch.backends(case.op, options.device) if worthwhile(name, shape, options)]
    calls = {name: peers.Call(partial(on_backend, name, case.op, inputs.fixed), inputs.tensors) for name in ours}
    failed = {}
    for name, build in peers.find(case.op, options).items():
        try:
            told = {name: x for name, x in inputs.fixed.items() if isinstance(x, Tensor)}
            peer = build(inputs.tensors | told, case.variant, shape.decode)
        except Exception as error:  # an installation may be broken in any way
            failed[name] = in_one_line(error)
        else:
            if peer is not None:
                calls[name] = peer
    timings = time_those_that_run(
        {name: runner(pass_, *call, constant) for name, call in calls.items()}, failed, options
    )
    identity = {
        "what": case.op,
        "pass": pass_,
        "dtype": dtype,
        "shape": {
            "variant": case.variant,
            "batch": shape.batch,
            "length": shape.length,
            "heads": case.heads,
            "width": case.width,
            "keys": shape.keys or None,
        },
    }
    work = floor(case, shape, dtype, inputs, backward=pass_ == BOTH)
    return make_row(identity, timings, work, options.peaks, ours, **({"failed": failed} if failed else {}))


def worthwhile(backend: str, shape: Shape, options: Options) -> bool:
    """Not the reference at lengths where it takes minutes, nor kernels interpreted on a CPU, which are for tests."""
    if backend == "reference":
        return shape.length <= SLOW_REFERENCE
    return backend != "triton" or options.device != "cpu"


def time_those_that_run(
    candidates: dict[str, Callable[[], object]], failed: dict[str, str], options: Options
) -> dict[str, Timing]:
    """The times of what runs; the errors of the others are added to `failed`."""
    for name, call in candidates.items():
        try:
            call()
        except Exception as error:  # somebody else's kernels, and memory: anything may come
            failed[name] = in_one_line(error)
    running = {name: call for name, call in candidates.items() if name not in failed}
    return alternate(running, device=options.device, **{"warmup": 1, "seconds": 3.0} | options.effort)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def on_backend(name: str, op: str, fixed: dict[str, Any], **tensors: Tensor) -> Any:
    with ops.backend(name):
        return getattr(ops, op)(**tensors, **fixed)


def runner(
    pass_: str, function: Callable[..., Any], tensors: dict[str, Tensor], constant: tuple[str, ...]
) -> Callable[[], object]:
    """What is timed: the call without gradients, or with the gradients of every tensor not named in `constant`."""
    if pass_ != BOTH:
        return partial(torch.no_grad()(function), **tensors)
    given = {name: tensor.detach().requires_grad_(name not in constant) for name, tensor in tensors.items()}
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    gradient: list[Tensor] = []

    def forward_and_backward() -> object:
        out = function(**given)
        if not gradient:
            gradient.append(torch.randn_like(out))  # laid out as the output is
        return torch.autograd.grad(out, leaves, gradient[0])

    return forward_and_backward
