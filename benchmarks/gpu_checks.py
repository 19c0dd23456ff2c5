"""What the kernels compute against what they should, on real shapes: the jobs that benchmarks.gpu_suite runs side by
side, each in a process of its own, as nothing in a process survives an illegal memory access.

    python -m benchmarks.gpu_checks JOB [--device cuda] [--tiny]        prints one JSON object for each result

The truth is the `torch` backend in float64, itself tested against the reference. It is computed a segment of tokens at
a time: forward, the state is carried from one segment to the next, backward its gradient from the last to the first.
So a million tokens are compared one by one, outputs and gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import SPARSE, Case, Shape, cases
from benchmarks.inputs import make_inputs as random_inputs
from benchmarks.ops import BOTH, DECODE, FORWARD, FORWARD_ONLY, measure, on_backend
from benchmarks.rows import Options

STATEFUL = ("linear_attention", "selective_scan", "causal_conv1d")
WITH_LSE = ("softmax_attention", "interval_attention")
# A token sees all before it, and no state carries them.
WHOLE = (*WITH_LSE, "landmark_attention", "block_sparse_attention", "infini_attention")
PACKED = (*STATEFUL, "softmax_attention", "infini_attention")
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # float32 multiplied in TF32 would be off by 3e-4
MIN_KEYS = 1100  # that one token attends to
SEGMENT = {"cuda": 1 << 16, "quick": 20}
WARM = {"cuda": 640, "quick": 4}  # tokens of the calls that only compile

Result = dict[str, Any]
Tensors = dict[str, Tensor]


class Job(NamedTuple):
    """`gigabytes` is what it may hold on the GPU."""

    run: Callable[[], Iterable[Result]]
    gigabytes: int = 4


class Mode(NamedTuple):
    """One way to call an op. `packed` puts documents into the row, empty ones among them."""

    dtype: str
    batch: int
    length: int
    gradients: bool = True
    packed: bool = False


MODES = {
    "cuda": (
        Mode("bfloat16", 1, 4133),
        Mode("float32", 2, 1031),
        Mode("bfloat16", 1, 2111, packed=True),
        Mode("bfloat16", 3, 1, gradients=False),
    ),
    "quick": (Mode("float32", 1, 21), Mode("float32", 1, 11, packed=True), Mode("float32", 1, 1, gradients=False)),
}
CHOICES = {
    "cuda": (Mode("float32", 1, 2111), Mode("bfloat16", 1, 1 << 16), Mode("bfloat16", 2, 1)),
    "quick": (Mode("float32", 1, 40), Mode("float32", 1, 1)),
}
LENGTH = {"cuda": ("bfloat16", 1, 1 << 20), "quick": ("float32", 1, 50)}
# At 1,048,576 tokens, with or without gradients, and the memory that takes. Those without have over 2^31 elements.
LONG = (
    (Case("linear_attention", "per head", 20, 128), False, 80),
    (Case("linear_attention", "per token", 4, 128), True, 40),
    (Case("selective_scan", None, 1, 2080), False, 60),
    (Case("selective_scan", None, 1, 512), True, 40),
    (Case("causal_conv1d", None, 1, 2056), True, 40),
    (Case("gated_rms_norm", "gate first", 1, 2056), True, 50),
    (Case("softmax_attention", "sinks", 2, 128), True, 40),
    (Case("block_sparse_attention", None, 4, 64), True, 60),
)


def jobs(options: Options) -> dict[str, Job]:
    """Every job by its name; that of a case also compiles what its benchmark will run."""
    size = options.size
    found = {"pytest": Job(partial(kernel_tests, options), 30)}
    for case, gradients, gigabytes in LONG:
        case = case._replace(heads=min(2, case.heads), width=16) if options.quick else case
        mode = Mode(*LENGTH[size], gradients)
        found[named(case, mode)] = Job(partial(in_turn, [partial(check, case, mode, options)]), gigabytes)
    for case in cases(size):
        modes = [mode for mode in MODES[size] if case.op in PACKED or not mode.packed]
        if case.variant == "top_k":  # of two blocks that are nearly alike float32 may choose another than float64
            modes = [mode for mode in modes if mode.dtype == "bfloat16" or options.quick]
        calls = [partial(check, case, mode, options) for mode in modes]
        if case.op == "select_blocks":
            calls = [partial(choices, case, mode, options) for mode in CHOICES[size]]
        gigabytes = 40 if case.op == "select_blocks" else 12 if case.op in SPARSE else 4
        found[named(case)] = Job(partial(in_turn, [*calls, partial(warm, case, options)]), gigabytes)
    return found


def named(case: Case, mode: Mode | None = None) -> str:
    name = " ".join(str(part) for part in case if part is not None)
    if mode is None:
        return name
    how = ["packed"] * mode.packed + ["forward"] * (not mode.gradients)
    return ", ".join([f"{name}, {mode.dtype} {mode.batch} x {mode.length}", *how])


def in_turn(calls: Iterable[partial[Result]]) -> Iterator[Result]:
    """The calls' results; of one that raises, the end of its traceback."""
    for call in calls:
        start = time.perf_counter()
        try:
            result = call()
        except Exception:  # whatever it is belongs into the report
            name = named(*(part for part in call.args if not isinstance(part, Options)))
            result = {"check": name, "failed": traceback.format_exc().splitlines()[-4:]}
        yield result | {"seconds": round(time.perf_counter() - start, 1)}


def check(case: Case, mode: Mode, options: Options) -> Result:
    """The relative error of every output and gradient, the worst over the segments, and whether a second run gives the
    same bits."""
    tensors, fixed = make_inputs(case, mode, options)
    found = run(case.op, tensors, fixed, mode)
    again = run(case.op, tensors, fixed, mode)
    repeatable = all(torch.equal(found[key], again.pop(key)) for key in list(again))
    errors = compare(case.op, tensors, fixed, mode, found, SEGMENT[options.size])
    errors = {key: float(f"{min(error, 1e9):.2g}") for key, error in errors.items()}  # JSON knows no infinity
    passed = max(errors.values()) < LIMITS[mode.dtype] and repeatable
    return {"check": named(case, mode), "passed": passed, "repeatable": repeatable, "errors": errors}


def make_inputs(case: Case, mode: Mode, options: Options) -> tuple[Tensors, dict[str, Any]]:
    """Those of the benchmarks, from a state, with slower decays, and in documents where the mode wants them."""
    torch.manual_seed(0)
    shape = Shape(mode.batch, mode.length, decode=case.op in STATEFUL, keys=MIN_KEYS if mode.length == 1 else 0)
    inputs = random_inputs(case, shape, mode.dtype, options)
    tensors, fixed = dict(inputs.tensors), dict(inputs.fixed)
    if "log_decay" in tensors:  # memories from a few tokens to the whole of a long sequence
        tensors["log_decay"] *= torch.logspace(0, -6, case.heads, device=options.device)
    if mode.packed:
        third = mode.length // 3
        bounds = [0, 0, 1, third, third, 2 * third + 1, mode.length]
        fixed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=options.device)
        if "initial_state" in tensors:
            states = tensors["initial_state"]
            tensors["initial_state"] = torch.randn(len(bounds) - 1, *states.shape[1:], device=options.device)
    if case.op in WITH_LSE:
        fixed["return_lse"] = True
    return tensors, fixed


def call(backend: str, op: str, fixed: dict[str, Any], tensors: Tensors) -> Tensors:
    outputs = on_backend(backend, op, fixed, **tensors)
    if op in WITH_LSE:  # an empty row's lse is -inf
        return {"out": outputs[0], "exp lse": outputs[1].exp()}
    return dict(zip(("out", "state"), outputs, strict=True)) if isinstance(outputs, tuple) else {"out": outputs}


def run(op: str, tensors: Tensors, fixed: dict[str, Any], mode: Mode) -> Tensors:
    """The kernels' outputs and, as "d name", the gradients: random ones of the outputs, those they give the inputs."""
    if not mode.gradients:
        with torch.no_grad():
            return call("triton", op, fixed, tensors)
    torch.manual_seed(1)
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    outputs = call("triton", op, fixed, leaves)
    given = {f"d {key}": torch.randn_like(y) for key, y in outputs.items()}
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(given.values()))
    outputs = {key: y.detach() for key, y in outputs.items()}
    return outputs | given | {f"d {key}": gradient for key, gradient in zip(leaves, found, strict=True)}


def compare(
    op: str, tensors: Tensors, fixed: dict[str, Any], mode: Mode, found: Tensors, segment: int
) -> dict[str, float]:
    """The errors of what `run` found."""
    inputs = {key: t for key, t in tensors.items() if key != "initial_state"}
    parts = [slice(start, start + segment) for start in range(0, mode.length, segment)]
    if mode.packed or op in WHOLE:
        parts = [slice(None)]
    errors: dict[str, list[float]] = {}
    sums: Tensors = {}

    def part(now: slice, state: Tensor | None) -> Tensors:
        some = {key: (t[:, now] if over_tokens(t) else t).double() for key, t in inputs.items()}
        return some | ({} if state is None else {"initial_state": state})

    def note(key: str, out: Tensor, ref: Tensor) -> None:
        errors.setdefault(key, []).append(relative_error(out, ref.detach()))

    states = [tensors["initial_state"].double() if "initial_state" in tensors else None]
    with torch.no_grad():
        for now in parts[:-1]:
            states.append(call("torch", op, fixed, part(now, states[-1])).get("state"))
    carried = found["d state"].double() if "d state" in found else None
    for now, state in reversed(list(zip(parts, states, strict=True))):
        leaves = {key: t.requires_grad_(mode.gradients) for key, t in part(now, state).items()}
        outputs = call("torch", op, fixed, leaves)
        note("out", found["out"][:, now], outputs["out"])
        if op in WITH_LSE:
            note("exp lse", found["exp lse"], outputs["exp lse"])
        if state is not None and now is parts[-1]:
            note("state", found["state"], outputs["state"])
        if not mode.gradients:
            continue
        given = [found["d out"][:, now].double(), *([] if carried is None else [carried])]
        given += [found["d exp lse"].double()] if op in WITH_LSE else []
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
        for key, gradient in zip(leaves, gradients, strict=True):
            if key == "initial_state":
                carried = gradient
            elif over_tokens(tensors[key]):
                note(f"d {key}", found[f"d {key}"][:, now], gradient)
            else:
                sums[key] = sums[key] + gradient if key in sums else gradient
    for key, total in (sums | ({} if carried is None else {"initial_state": carried})).items():
        note(f"d {key}", found[f"d {key}"], total)
    return {key: max(over_segments) for key, over_segments in errors.items()}


def over_tokens(t: Tensor) -> bool:
    """Whether it is `[batch, length, ...]`: rates, weights and biases have fewer dimensions."""
    return t.dim() > 2


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, on the device; infinite where anything is not finite."""
    norm, distance = ref.norm().item(), (out.double() - ref).norm().item()
    error = distance / norm if norm > 0 else distance
    return error if error < float("inf") else float("inf")


def choices(case: Case, mode: Mode, options: Options) -> Result:
    """select_blocks' choice for a long row against that of float64. Where two blocks are nearly alike either may be
    chosen: what counts is the share of the rows that differ."""
    tensors, fixed = make_inputs(case, mode, options)
    found, again = (on_backend("triton", case.op, fixed, **tensors) for _ in range(2))
    exact = on_backend("torch", case.op, fixed | {"lse": None}, **{name: t.double() for name, t in tensors.items()})
    share = (found.sort(-1).values != exact.sort(-1).values).any(-1).double().mean().item()
    passed, repeatable = share < 1e-3, torch.equal(found, again)
    errors = {"rows": share}
    return {"check": named(case, mode), "passed": passed and repeatable, "repeatable": repeatable, "errors": errors}


def warm(case: Case, options: Options) -> Result:
    """Runs what the benchmark of this case will, on few tokens: compiled kernels stay in Triton's cache."""
    failed = {}
    few = Shape(1, WARM[options.size])
    passes = [(FORWARD, few), (BOTH, few), (DECODE, Shape(1, 1, decode=True))]
    if case.op in FORWARD_ONLY:
        passes.remove((BOTH, few))
    for pass_, shape in passes:
        row = measure(case, shape, pass_, "bfloat16", Options(options.device, quick=True))
        failed |= row.get("failed", {})
    return {"check": f"{named(case)}, benchmark", "passed": not failed} | ({"failed": [str(failed)]} if failed else {})


def kernel_tests(options: Options) -> Iterator[Result]:
    """The kernels' own tests and those of the libraries' backends, not interpreted where there is a GPU: those that
    fail, and the last line."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "-k", "kernels or library", "-v", "--tb=no"]
    command += ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command += ["--collect-only"] if options.quick else []
    line = ""
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if re.search("FAILED|ERROR", line):
                yield {"check": "pytest", "failed": [line.strip()]}
    yield {"check": "pytest", "passed": process.returncode == 0, "said": line.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote then holds NaN
    os.environ["FLA_CACHE_RESULTS"] = "0"  # what its autotuner finds among other processes is not to be kept
    for result in jobs(Options(given.device, quick=given.tiny))[given.job].run():
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
