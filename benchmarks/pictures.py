"""The pictures of docs/performance.md: one file per machine and kind of picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks import machine
from benchmarks.rows import DTYPES, Row
from zoo.ops.dispatch import BACKENDS

COLORS = {
    "torch": "#1f6fb4", "triton": "#0b4f8a", "library": "#5fa2d8", "zoo": "#1f6fb4", "zoo compiled": "#0b4f8a",
    "transformers": "#d9822b", "fla": "#8a5fb4", "mamba_ssm": "#3f9b5b", "sdpa": "#a8443d",
}  # fmt: skip
SHADES = dict(zip(DTYPES, ("#8fbbe0", "#1f6fb4"), strict=True))


def files(results: dict[str, Any]) -> list[tuple[str, str]]:
    """`(text, file name)` of the pictures that these results give."""
    name = machine.slug(results["machine"]["name"])
    return [(text, f"{name}-{kind}.png") for kind, (text, wanted, _) in KINDS.items() if wanted(results)]


def draw(results: Iterable[dict[str, Any]], folder: Path) -> None:
    """Draws them all anew."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in results:
        name = machine.slug(each["machine"]["name"])
        for kind, (_, wanted, picture) in KINDS.items():
            if wanted(each):
                figure = picture(each)
                figure.savefig(folder / f"{name}-{kind}.png", dpi=120, metadata={"Software": None})
                plt.close(figure)


def fastest(row: Row) -> str:
    """The fastest of our backends, the reference aside."""
    ours = [name for name in BACKENDS if name != "reference" and name in row["candidates"]]
    return min(ours, key=lambda name: row["candidates"][name]["ms"])


def fraction(candidate: dict[str, Any]) -> float | None:
    """Of the peak that it comes closer to."""
    found = [candidate[name] for name in ("flop_fraction", "byte_fraction") if name in candidate]
    return max(found, default=None)


Bar = tuple[str, str, float]  # label, dtype, value


def against_peers(results: dict[str, Any]) -> list[Bar]:
    """The fastest peer's time over ours: training, decoding, and each op forward and backward at its longest."""
    found = []
    for verb in ("train", "decode"):
        for row in results[verb]:
            ratios = row["candidates"]["zoo"].get("ratios")
            if ratios:
                found.append((model_label(verb, row), row["dtype"], min(ratios.values())))
    for row in longest(results["ops"], lambda row: bool(row["candidates"][fastest(row)]["ratios"])):
        found.append((op_label(row), row["dtype"], min(row["candidates"][fastest(row)]["ratios"].values())))
    return found


def of_peak(results: dict[str, Any]) -> list[Bar]:
    """The fraction of the nearer peak: training steps, and each op forward and backward at its longest."""
    rows = [(model_label("train", row), row, row["candidates"]["zoo"]) for row in results["train"]]
    rows += [(op_label(row), row, row["candidates"][fastest(row)]) for row in longest(results["ops"])]
    shares = [(label, row["dtype"], fraction(candidate)) for label, row, candidate in rows]
    return [(label, dtype, share) for label, dtype, share in shares if share is not None]


def longest(rows: Iterable[Row], wanted: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Of each op, width and dtype, the forward and backward pass over the longest sequences."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in filter(wanted, rows):
        if row["pass"] == "forward+backward":
            key = (named(row), row["shape"]["width"], row["dtype"])
            found[key] = max(found.get(key, row), row, key=lambda row: row["shape"]["length"])
    return list(found.values())


def named(row: Row) -> str:
    return row["what"] + (f", {row['shape']['variant']}" if row["shape"]["variant"] else "")


def op_label(row: Row) -> str:
    return f"{named(row)}, {row['shape']['width']} wide, {row['shape']['length']:,} tokens"


def model_label(verb: str, row: Row) -> str:
    size = f"{row['shape']['batch']} x {row['shape']['length']:,}" if verb == "train" else row["pass"]
    return f"{row['what']} {verb}, {size}"


def bars(found: list[Bar], title: str, unit: Callable[[float], str], around: float) -> Figure:
    """Horizontal bars from `around` (1 is on a scale of ratios), one line per label, one bar per dtype."""
    labels = list(dict.fromkeys(label for label, _, _ in found))
    dtypes = [dtype for dtype in DTYPES if any(dtype == other for _, other, _ in found)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(labels)), layout="constrained")
    if around:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        mine = [(labels.index(label), value) for label, other, value in found if other == dtype]
        places = [place + (i - (len(dtypes) - 1) / 2) * height for place, _ in mine]
        axes.barh(places, [value - around for _, value in mine], height, around, color=SHADES[dtype], label=dtype)
        for place, (_, value) in zip(places, mine, strict=True):
            left = value < around
            axes.annotate(
                unit(value), (value, place), (-3 if left else 3, 0), textcoords="offset points",
                ha="right" if left else "left", va="center", fontsize=8,
            )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda x, _: unit(x))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return figure


Panels = dict[str, dict[str, list[tuple[int, float]]]]  # title, line, (length, microseconds per token)


def of_ops_and_stacks(results: dict[str, Any]) -> Panels:
    """A panel per op, forward and backward, and one of the stacks, in the dtype that is common on such a device."""
    dtype = "float32" if results["machine"]["device"] == "cpu" else "bfloat16"
    panels: Panels = {}
    narrowest = {
        named(row): min(r["shape"]["width"] for r in results["ops"] if named(r) == named(row)) for row in results["ops"]
    }
    for row in results["ops"]:
        shape, tokens = row["shape"], row["shape"]["batch"] * row["shape"]["length"]
        if row["pass"] == "forward+backward" and row["dtype"] == dtype and shape["width"] == narrowest[named(row)]:
            panel = panels.setdefault(f"{named(row)} ({shape['width']} wide), {dtype}", {})
            for name, candidate in row["candidates"].items():
                if name != "reference":
                    panel.setdefault(name, []).append((shape["length"], 1e3 * candidate["ms"] / tokens))
    return panels | of_two_lengths([row for row in results["length"] if row["dtype"] == dtype], "stacks")


def of_two_lengths(rows: Iterable[Row], about: str) -> Panels:
    """Of each pass and dtype a panel, in which each row has a line."""
    panels: Panels = {}
    for row in rows:
        lengths = (row["shape"][name] for name in ("short", "length"))
        points = [(length, row["candidates"][f"{length} tokens"]["us_per_token"]) for length in lengths]
        panels.setdefault(f"{about}: {row['pass']}, {row['dtype']}", {})[row["what"]] = points
    return panels


def lines(panels: Panels, title: str) -> Figure:
    """Microseconds per token against the length. A name has one color in all panels."""
    names = dict.fromkeys(name for panel in panels.values() for name in panel)
    colors = {name: f"C{i}" for i, name in enumerate(names)} | COLORS
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(4 * columns, 3.1 * height), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (heading, panel) in zip(grid.flat, panels.items(), strict=False):
        for name, points in panel.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, color=colors[name])
        lengths = sorted({length for points in panel.values() for length, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        # At least a decade and a half, so that a small difference looks small.
        times = [time for points in panel.values() for _, time in points]
        middle, half = math.sqrt(min(times) * max(times)), max(5.6, 1.4 * math.sqrt(max(times) / min(times)))
        axes.set_ylim(middle / half, middle * half)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(heading, fontsize=10, loc="left")
        axes.grid(axis="y", which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


# Of each kind: the text beside it, whether these results give it, and how it is drawn.
KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Figure]]] = {
    "ratio": (
        "Times faster than the fastest peer",
        lambda results: bool(against_peers(results)),
        lambda results: bars(against_peers(results), "times faster than the fastest peer", lambda x: f"{x:.3g}", 1),
    ),
    "length": (
        "Time per token against the length",
        lambda results: bool(of_ops_and_stacks(results)),
        lambda results: lines(of_ops_and_stacks(results), "µs per token against the length, forward and backward"),
    ),
    "context": (
        "Time per token, for each way to attend to a long context",
        lambda results: bool(results["context"]),
        lambda results: lines(
            of_two_lengths(results["context"], "two layers"), "µs per token, for each way to attend to a long context"
        ),
    ),
    "fraction": (
        "Fraction of the measured peak",
        lambda results: bool(of_peak(results)),
        lambda results: bars(of_peak(results), "fraction of the nearer measured peak", lambda x: f"{x:.0%}", 0),
    ),
}
