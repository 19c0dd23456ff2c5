"""Training cost per token at a long sequence against a short one, for stacks of recurrent mixers: time and memory.

Both lengths alternate in one process. Memory on a CPU is measured in a process of its own per length: it takes one
short step so that everything lazy is there, resets the kernel's record of the peak, and takes one step.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import zoo
from benchmarks import machine, models
from benchmarks.machine import rounded
from benchmarks.rows import Options, Row, Task, Work, figures
from benchmarks.timing import Timing, alternate
from benchmarks.train import PASS, step

STACKS = ("lightning", "mamba2", "mamba")
LENGTHS = {"cpu": (4096, 65536), "cuda": (4096, 65536), "quick": (64, 128)}
ROOT = Path(__file__).parents[1]
SHORT = 64  # tokens of the step before the measured one


def plan(options: Options) -> list[Task]:
    return [
        Task(stack, f"{stack} {dtype}", partial(measure, stack, dtype, options))
        for stack in STACKS
        for dtype in options.dtypes
    ]


def measure(stack: str, dtype: str, options: Options, lengths: tuple[int, ...] = ()) -> Row:
    """At `lengths`; by default those of LENGTHS."""
    lengths = lengths or LENGTHS[options.size]
    model = zoo.build(models.stacks(width(options))[stack]).to(options.device).train()
    candidates = {}
    for length in lengths:
        ids = torch.randint(0, models.VOCAB, (1, length), device=options.device)
        candidates[f"{length} tokens"] = partial(step, model, ids, dtype)
    timings = alternate(
        candidates, device=options.device, **options.effort or {"warmup": 1, "rounds": 5, "seconds": 60.0}
    )
    if torch.device(options.device).type == "cpu":
        timings = {
            name: timing._replace(peak_bytes=in_own_process(stack, dtype, length, options))
            for (name, timing), length in zip(timings.items(), lengths, strict=True)
        }
    flops = {length: 3 * model.flops(1, length) for length in lengths}
    return combine(stack, dtype, dict(zip(lengths, timings.values(), strict=True)), flops, options) | {
        "parameters": models.parameters(model)
    }


def combine(stack: str, dtype: str, timings: dict[int, Timing], flops: dict[int, int], options: Options) -> Row:
    """Figures per token at each length, and the longest's against the shortest's."""
    candidates = {}
    for length, timing in timings.items():
        candidates[length] = figures(timing, Work(length, flops[length]), options.peaks, dtype)
        candidates[length]["us_per_token"] = rounded(1e6 * timing.median / length)
        candidates[length]["bytes_per_token"] = round((timing.peak_bytes or 0) / length)
    short, long = candidates[min(timings)], candidates[max(timings)]
    return {
        "what": stack,
        "pass": PASS,
        "dtype": dtype,
        "shape": {"batch": 1, "short": min(timings), "length": max(timings)},
        "candidates": {f"{length} tokens": found for length, found in candidates.items()},
        "time_ratio": rounded(long["us_per_token"] / short["us_per_token"]),
        "memory_ratio": rounded(long["bytes_per_token"] / short["bytes_per_token"]),
        "versions": machine.versions(),
    }


def width(options: Options) -> int:
    return 32 if options.quick else 256


def in_own_process(stack: str, dtype: str, length: int, options: Options) -> int:
    """Bytes at the peak of one step above what was held before it."""
    arguments = [stack, dtype, str(length), str(width(options)), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.length", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def status(field: str) -> int:
    """A memory field of this process, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_of_a_step(stack: str, dtype: str, length: int, hidden: int) -> int:
    """As `in_own_process`, in this one."""
    model = zoo.build(models.stacks(hidden)[stack]).train()
    step(model, torch.randint(0, models.VOCAB, (1, SHORT)), dtype)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    step(model, torch.randint(0, models.VOCAB, (1, length)), dtype)
    return status("VmHWM") - before


if __name__ == "__main__":
    stack, dtype, length, hidden, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(peak_of_a_step(stack, dtype, int(length), int(hidden)))
