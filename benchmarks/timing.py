"""Times candidates side by side in one process, and the machine's own peaks to hold them against."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from zoo.ops.matmul import matmul

SAMPLE = 0.005  # seconds: a call shorter than this is repeated within one sample


class Timing(NamedTuple):
    """Seconds per call over `count` samples; `peak_bytes` is what a call needs on a GPU above what it finds there."""

    median: float
    minimum: float
    count: int
    peak_bytes: int | None


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    warmup: int = 2,
    rounds: int = 7,
    seconds: float = 20.0,
) -> dict[str, Timing]:
    """Times the candidates in rounds, each once per round, the order reversed every other round.

    What disturbs the machine for a while then disturbs all of them alike. Each candidate is run `warmup` times before
    any is timed. At least one round is timed; no further one begins after `seconds`.
    """
    repeats, peaks = {}, {}
    for name, call in candidates.items():
        for _ in range(warmup):
            first, peaks[name] = _sample(call, 1, device)
            repeats[name] = max(1, math.ceil(SAMPLE / first))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    end = time.perf_counter() + seconds
    for index in range(rounds):
        for name in list(candidates)[:: -1 if index % 2 else 1]:
            duration, peaks[name] = _sample(candidates[name], repeats.get(name, 1), device)
            samples[name].append(duration)
        if time.perf_counter() > end:
            break
    return {
        name: Timing(statistics.median(taken), min(taken), len(taken), peaks[name]) for name, taken in samples.items()
    }


def _sample(call: Callable[[], object], repeats: int, device: str) -> tuple[float, int | None]:
    """Seconds per call, and on a GPU the most memory it held above the start."""
    if torch.device(device).type == "cpu":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats, torch.cuda.max_memory_allocated(device) - before


def matmul_peak(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the fastest of a few square matrix products: what a perfect step would run at."""
    on_cpu = torch.device(device).type == "cpu"
    fastest = 0.0
    for size in (1024, 2048) if on_cpu else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        calls = {"torch": lambda a=a, b=b: a @ b, "ours": lambda a=a, b=b: matmul(a, b)}
        taken = alternate(calls, device=device, rounds=20, seconds=seconds)
        fastest = max(fastest, *(2 * size**3 / timing.minimum for timing in taken.values()))
    return fastest


def copy_peak(device: str, seconds: float = 2.0) -> float:
    """Bytes/s, read and written, of copying a tensor larger than any cache."""
    source = torch.ones((1 << 26) if torch.device(device).type == "cpu" else (1 << 28), device=device)
    target = torch.empty_like(source)
    taken = alternate({"copy": lambda: target.copy_(source)}, device=device, rounds=20, seconds=seconds)
    return 2 * source.nbytes / taken["copy"].minimum
