"""docs/blocks/recall.md and its picture, from benchmarks/results/recall and nothing else."""

from __future__ import annotations

import json
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
    "window": "#888888", "landmark": "#d9822b", "hierarchical": "#1f6fb4", "infini": "#3f9b5b", "infini delta": "#8a5fb4"
}  # fmt: skip
Result = dict[str, Any]

INTRODUCTION = """# Recall beyond the window

What small models learn to find in noise. Written by `make recall` from the files in `benchmarks/results/recall`, which
it makes first (about {minutes} minutes on two CPU cores); `benchmarks/recall.py` is the study, `zoo/data/recall.py` the
task.

A mark and a key of {key_length} symbols stand in noise of the same {symbols} symbols. `distance` tokens after each
symbol of the key, the model has to say it; whoever cannot see the key is right about one symbol in {symbols}
({chance}). All models have two layers of window attention (`window: {window}`) below and differ in the mixer of the
layer above; recipe, steps and seeds are the same. Training distances grow to {farthest}, which is {times} times the
window; farther ones are extrapolation. `window` is the control: through its three layers it sees {reach} tokens back.

![recall](recall.png)
"""
TABLE = """
## {title}

{text}

"""
SYMBOLS = "Mean of all seeds, at each distance. Greedy, given the symbols before; {keys} keys each."
KEYS = "All {key_length} symbols right: mean of all seeds, and the worst in brackets."
CACHE = """`landmark, top_k 2` is the same model reading through its cache: each head of a token then reads its own block
and two others, at stingy positions."""
GATES = "The share of the memory in each head, at the start 0.5, after the last step."


def read(folder: Path) -> list[Result]:
    """All results, mixer by mixer in the order of COLORS."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: (list(COLORS).index(result["mixer"]), result["seed"]))


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
    window, symbols = study["window"], study["symbols"]
    parts = [
        INTRODUCTION.format(
            **study,
            minutes=round(sum(result["cpu_seconds"]["all"] for result in results) / 2 / 60),
            chance=f"{1 / symbols:.1%}",
            times=study["farthest"] // window,
            reach=3 * (window - 1),
        )
    ]
    distances = study["distances"]
    head = ("mixer", "seeds", *(f"{distance:,}" for distance in distances))
    for title, text, score in (
        ("Symbols right, by distance", SYMBOLS.format(**study), "symbols"),
        ("Whole keys right, by distance", f"{KEYS.format(**study)} {CACHE}", "keys"),
    ):
        lines = []
        for name, curves in series.items():
            cells = []
            for found in zip(*curves, strict=True):
                shares = [each[score] for each in found]
                worst = f" ({min(shares):.1%})" if score == "keys" else ""
                cells.append(f"{sum(shares) / len(shares):.1%}{worst}")
            lines.append((name, str(len(curves)), *cells))
        parts.append(TABLE.format(title=title, text=text) + table(head, lines))
    lines = [
        (result["mixer"], str(result["seed"]), *(f"{gate:.2f}" for gate in result["history"]["gates"][-1]))
        for result in with_gates(results)
    ]
    if lines:
        heads = (f"head {i}" for i in range(len(lines[0]) - 2))
        parts.append(TABLE.format(title="Infini's gates", text=GATES) + table(("mixer", "seed", *heads), lines))
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
    study = results[0]["study"]
    window, farthest, chance = study["window"], study["farthest"], 1 / study["symbols"]
    for name, curves in by_series(results).items():
        mixer, _, is_cached = name.partition(",")
        style = "--" if is_cached else "-"
        distances = [each["distance"] for each in curves[0]]
        shares = list(zip(*([each["symbols"] for each in curve] for curve in curves), strict=True))
        mean = [sum(each) / len(each) for each in shares]
        left.plot(distances, mean, style, marker=".", color=COLORS[mixer], label=name)
        left.fill_between(
            distances, *zip(*((min(x), max(x)) for x in shares), strict=True), color=COLORS[mixer], alpha=0.2, lw=0
        )
        if mixer.startswith("infini"):
            for i, curve in enumerate(curves):
                far = [each for each in curve if each["distance"] >= window]
                compressions = [each["distance"] // window for each in far]
                label = name if i == 0 else None
                middle.plot(
                    compressions, [each["symbols"] for each in far], marker=".", color=COLORS[mixer], label=label
                )
    _recall_axes(left, "symbols right against the distance, mean and range of the seeds", study["distances"], chance)
    left.axvline(3 * (window - 1), color=COLORS["window"], lw=1, ls=":")
    left.annotate(
        "windows end",
        (3 * (window - 1), 0.5),
        (-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="center",
        fontsize=8,
        color="0.4",
    )
    times = [distance // window for distance in study["distances"] if distance >= window]
    _recall_axes(middle, "infini: symbols right against compressions, each seed", times, chance)
    for axes, edge in ((left, farthest), (middle, farthest / window)):
        axes.axvline(edge, color="black", lw=1, ls=":")
        axes.annotate(
            "longest in training",
            (edge, 0.5),
            (-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            fontsize=8,
        )
    for result in with_gates(results):
        for head, gates in enumerate(zip(*result["history"]["gates"], strict=True)):
            label = result["mixer"] if head == result["seed"] == 0 else None
            right.plot(range(1, len(gates) + 1), gates, color=COLORS[result["mixer"]], lw=1, alpha=0.6, label=label)
    right.axhline(0.5, color="black", lw=1, ls=":")
    right.set_title("infini: the gate of each head and seed in training", fontsize=10, loc="left")
    right.set_xlabel("step")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _recall_axes(axes: Axes, title: str, ticks: Sequence[int], chance: float) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.axhline(chance, color="black", lw=1)
    axes.annotate("chance", (ticks[0], chance), (0, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel(
        "tokens between a symbol and the question for it" if chance and ticks[0] > 1 else "segments between"
    )
    axes.grid(axis="y", alpha=0.2)
