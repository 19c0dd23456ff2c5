"""What a verb plans and what it measures: tasks, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from benchmarks.machine import rounded
from benchmarks.timing import Timing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOISY = 1.5  # a median so many times the minimum says that something else ran
PEERS = ("transformers", "fla", "mamba_ssm", "sdpa")

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a run measures.

    peers    whom to compare with, where they can be imported and run there.
    compile  train also under torch.compile.
    quick    tiny sizes, to see that everything runs.
    peaks    measured FLOP/s by dtype, and bytes/s as "copy".
    """

    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    peers: tuple[str, ...] = PEERS
    compile: bool = False
    quick: bool = False
    peaks: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Which of a verb's tables of sizes counts."""
        return "quick" if self.quick else torch.device(self.device).type

    @property
    def effort(self) -> dict[str, Any]:
        """How long `alternate` measures."""
        return {"warmup": 1, "rounds": 1} if self.quick else {}


class Task(NamedTuple):
    """One row to measure, of the op, model or stack `what`; `measure` raises what the models raise."""

    what: str
    label: str
    measure: Callable[[], Row]


class Work(NamedTuple):
    """The least that one call must do: tokens, floating-point operations, bytes read and written."""

    tokens: int
    flops: float | None = None
    bytes: float | None = None


def make_row(
    identity: Mapping[str, Any],
    timings: Mapping[str, Timing],
    work: Work,
    peaks: Mapping[str, float],
    ours: Collection[str],
    **more: Any,
) -> Row:
    """The row of one comparison.

    identity  what, pass, dtype, shape: see machine.IDENTITY.
    ours      which of the candidates are ours; each gets its ratio to every other one, above 1 where ours is faster.
    more      further fields of the row.
    """
    candidates = {name: figures(timing, work, peaks, identity["dtype"]) for name, timing in timings.items()}
    for name in timings.keys() & set(ours):
        candidates[name]["ratios"] = {
            peer: rounded(timings[peer].median / timings[name].median) for peer in timings if peer not in ours
        }
    floor = {"flops": work.flops, "bytes": work.bytes}
    return {**identity, "candidates": candidates, "floor": floor, **more, "versions": machine.versions()}


def figures(timing: Timing, work: Work, peaks: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """One candidate's figures; rates of the floor's work, so that waste counts against a candidate."""
    found: dict[str, Any] = {
        "ms": rounded(1e3 * timing.median),
        "min_ms": rounded(1e3 * timing.minimum),
        "count": timing.count,
        "tokens_per_s": rounded(work.tokens / timing.median),
    }
    for name, amount in (("flop", work.flops), ("byte", work.bytes)):
        if amount is not None:
            found[f"{name}s_per_s"] = rounded(amount / timing.median)
    found |= machine.fractions(found, dtype, peaks)
    if timing.peak_bytes is not None:
        found["peak_bytes"] = timing.peak_bytes
    return found


def summary(row: Row) -> str:
    """One line: what, and each candidate's time, with ours against the peers."""
    shape = " ".join(f"{name} {value}" for name, value in row["shape"].items() if value is not None)
    times = []
    for name, candidate in row["candidates"].items():
        ratios = ", ".join(f"{ratio:.3g}x {peer}" for peer, ratio in candidate.get("ratios", {}).items())
        times.append(f"{name} {candidate['ms']:.4g} ms" + (f" ({ratios})" if ratios else ""))
    times += [f"{name} failed: {said}" for name, said in row.get("failed", {}).items()]
    noisy = any(candidate["ms"] > NOISY * candidate["min_ms"] for candidate in row["candidates"].values())
    said = f"{row['what']}, {row['pass']}, {row['dtype']}, {shape}: " + "; ".join(times)
    return said + (" (noisy: measure again when nothing else runs)" if noisy else "")
