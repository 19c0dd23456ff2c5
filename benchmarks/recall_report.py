"""docs/blocks/recall.md and its picture, from benchmarks/results/recall and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.report import DOCS, table

DOCS = DOCS / "blocks"
FILE = "recall.md"
COLORS = {
    "window": "#888888", "landmark": "#d9822b", "hierarchical": "#1f6fb4", "infini": "#3f9b5b",
    "infini delta": "#8a5fb4",
}  # fmt: skip
Result = dict[str, Any]

INTRODUCTION = """# Recall beyond the window

What small models learn to find in noise. `make recall` trains them (about {minutes} minutes on two CPU cores, if
nothing else runs) and writes this page from their results in `benchmarks/results/recall`. The study is
`benchmarks/recall.py`, the task `zoo/data/recall.py`.

A key of {key_length} symbols behind a mark stands in noise of the same {symbols} symbols. Another mark asks for it, so
that each symbol has to be said `distance` tokens after it stood there. Who cannot see the key is right about one symbol
in {symbols} ({chance:.1%}). All models have two layers of window attention (`window: {window}`) and one of the mixer in
question, whose window, block or segment is {window} too; recipe, steps and seeds are the same. Training asks at
distances up to {farthest}, which is {times} times the window; what is farther is extrapolation. `window` is the
control: its three layers together see {reach} tokens back.

![recall](recall.png)
"""
SYMBOLS = """
## Symbols right, by distance

Mean of all seeds. The symbols of the key before the one in question are given. {keys} keys at each distance and seed.
"""
KEYS = """
## Whole keys right, by distance

Mean of all seeds, and the worst seed in brackets.
"""
CACHE = """
`landmark, top_k 2` is the same landmark models reading through their cache: each head of a token then reads its own
block and two others, at stingy positions.
"""
GATES = """
## Infini's gates

The share of the memory in each head after the last step; 0.5 at the start.
"""


def write(results: list[Result], docs: Path = DOCS) -> Path:
    """Writes the page and its picture; the page's path."""
    docs.mkdir(parents=True, exist_ok=True)
    figure = draw(results)
    figure.savefig((docs / FILE).with_suffix(".png"), dpi=110, metadata={"Software": None})
    plt.close(figure)
    (docs / FILE).write_text(page(results))
    return docs / FILE


def page(results: list[Result]) -> str:
    """The whole page."""
    study, series = results[0]["study"], by_series(results)
    minutes = sum(result["cpu_seconds"]["all"] for result in results) / 2 / 60
    times = study["farthest"] // study["window"]
    parts = [INTRODUCTION.format(**results[0], **study, minutes=round(minutes), times=times)]
    head = ("mixer", "seeds", *(f"{distance:,}" for distance in study["distances"]))
    for text, score in ((SYMBOLS, "symbols"), (KEYS, "keys")):
        lines = []
        for name, curves in series.items():
            shares = [[each[score] for each in found] for found in zip(*curves, strict=True)]
            cells = [f"{sum(found) / len(found):.1%}" for found in shares]
            if score == "keys":
                cells = [f"{cell} ({min(found):.1%})" for cell, found in zip(cells, shares, strict=True)]
            lines.append((name, str(len(curves)), *cells))
        parts.append(text.format(**study) + table(head, lines))
    if any("cache" in result["recall"] for result in results):
        parts.append(CACHE)
    lines = [
        (result["mixer"], str(result["seed"]), *(f"{gate:.2f}" for gate in result["history"]["gates"][-1]))
        for result in with_gates(results)
    ]
    if lines:
        heads = (f"head {i}" for i in range(len(lines[0]) - 2))
        parts.append(GATES + table(("mixer", "seed", *heads), lines))
    return "".join(parts)


def by_series(results: Sequence[Result]) -> dict[str, list[list[dict[str, float]]]]:
    """Of each mixer, and way to read it, the curve of every seed."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for result in results:
        for way, curve in result["recall"].items():
            found.setdefault(result["mixer"] + (", top_k 2" if way == "cache" else ""), []).append(curve)
    return found


def with_gates(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if "gates" in result["history"]]


def draw(results: Sequence[Result]) -> Figure:
    """Recall against the distance, Infini's against the number of compressions, and its gates in training."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    study, reach, chance = results[0]["study"], results[0]["reach"], results[0]["chance"]
    window = study["window"]
    beyond = [distance for distance in study["distances"] if distance >= window]
    for name, curves in by_series(results).items():
        mixer, _, is_cached = name.partition(",")
        color, shares = COLORS[mixer], [[each["symbols"] for each in curve] for curve in curves]
        of_seeds = list(zip(*shares, strict=True))
        mean = [sum(each) / len(each) for each in of_seeds]
        style = "--" if is_cached else "-"
        left.plot(study["distances"], mean, style, marker=".", color=color, label=name)
        lowest, highest = zip(*((min(each), max(each)) for each in of_seeds), strict=True)
        left.fill_between(study["distances"], lowest, highest, color=color, alpha=0.2, lw=0)
        if mixer.startswith("infini"):
            compressions = [distance / window for distance in beyond]
            for each in shares:
                middle.plot(compressions, each[-len(beyond) :], marker=".", color=color)
    for result in with_gates(results):
        history = result["history"]
        right.plot(history["step"], history["gates"], color=COLORS[result["mixer"]], lw=1, alpha=0.6)
    _recall_axes(left, study["distances"], chance, study["farthest"])
    _mark(left, reach, "the windows end", "0.4")
    left.set_title("symbols right, mean and range of the seeds", fontsize=10, loc="left")
    left.set_xlabel("tokens from a symbol to the question for it")
    _recall_axes(middle, [distance // window for distance in beyond], chance, study["farthest"] / window)
    middle.set_title("infini: symbols right, each seed", fontsize=10, loc="left")
    middle.set_xlabel("compressions from a symbol to the question for it")
    right.axhline(0.5, color="black", lw=1, ls=":")
    right.set_title("infini: the gate of each head and seed", fontsize=10, loc="left")
    right.set_xlabel("training step")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    return figure


def _recall_axes(axes: Axes, ticks: Sequence[int], chance: float, farthest: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.grid(axis="y", alpha=0.2)
    axes.axhline(chance, color="black", lw=1)
    axes.annotate("chance", (ticks[-1], chance), (0, 3), textcoords="offset points", fontsize=8, ha="right")
    _mark(axes, farthest, "longest in training", "black")


def _mark(axes: Axes, x: float, text: str, color: str) -> None:
    axes.axvline(x, color=color, lw=1, ls=":")
    axes.annotate(
        text, (x, 0.3), (-3, 0), textcoords="offset points", rotation=90, ha="right", va="center", fontsize=8,
        color=color,
    )  # fmt: skip
