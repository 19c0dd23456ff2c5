"""report.html of a run: everything on it is computed from the run's own files and its data module.

One self-contained file: pictures are inline SVG, there is no script, no font and no address to load.
"""

import html
import io
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from zoo.config import ZooConfig
from zoo.models.picture import layer_stack_svg
from zoo.train.callbacks.samples import read_samples
from zoo.train.logger import FILE_NAME, read_metrics

Row = dict[str, float]

matplotlib.use("Agg")  # no window, whatever display there is

INK, SOFT, GRID = "#1c2430", "#64748b", "#e6e9ef"
BLUE, ORANGE = "#2f6fde", "#e07a2c"
XZ_LIMIT = 20_000_000

STYLE = """
body{margin:0;background:#f5f6f9;color:#1c2430;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;margin:0;letter-spacing:-.01em}h2{font-size:1.15rem;margin:0 0 .75rem}
p{margin:.35rem 0}.soft{color:#64748b}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.6rem,1fr));gap:.9rem;margin:1.5rem 0}
.card,section{background:#fff;border:1px solid #e6e9ef;border-radius:.7rem}
.card{padding:.9rem 1.1rem}
.card b{display:block;font-size:1.65rem;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.card span{color:#64748b;font-size:.86rem}
section{padding:1.2rem 1.4rem;margin:.9rem 0;overflow-x:auto}section svg{width:100%;height:auto}
pre{background:#f5f6f9;border-radius:.5rem;padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:.4rem 0}
pre em{font-style:normal;color:#64748b}summary{cursor:pointer}details{margin:.3rem 0}
"""


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `text` after xz -9e: what a general compressor makes of it, having seen no other text."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Finished steps and values of one metric."""
    found = [(int(row["step"]), row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, without the pull towards 0 at the start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _axes(ylabel: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axes.set_xlabel("optimiser step", color=SOFT)
    axes.set_ylabel(ylabel, color=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _svg(figure: plt.Figure, label: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # the same run gives the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _loss_picture(rows: Sequence[Row]) -> str:
    figure, axes = _axes("nats per token")
    steps, losses = series(rows, "train/loss")
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(losses, 0.9 if len(losses) > 40 else 0.5), color=BLUE, linewidth=2, label="training")
    held_out = series(rows, "val/loss")
    axes.plot(*held_out, color=ORANGE, linewidth=2, marker="o", markersize=4, label="held-out")
    if len(losses) > 4:  # the first steps are off the chart: they only say what the vocabulary's size is
        tail = losses[len(losses) // 20 :] + held_out[1]
        axes.set_ylim(min(tail) * 0.95, max(tail) * 1.03)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, "training and held-out loss by step")


def _bits_picture(rows: Sequence[Row], xz: float | None) -> str:
    figure, axes = _axes("bits per byte")
    axes.plot(*series(rows, "val/bpb"), color=ORANGE, linewidth=2, marker="o", markersize=4, label="this model")
    if xz is not None:
        axes.axhline(xz, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=f"xz -9e: {xz:.3f}")
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, "held-out bits per byte by step, beside xz")


def _speed_picture(rows: Sequence[Row]) -> str:
    figure, axes = _axes("tokens per second")
    axes.plot(*series(rows, "throughput/tokens_per_second"), color=BLUE, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _svg(figure, "training speed by step")


def _cards(figures: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for value, name in figures
    )


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    def one(sample: dict[str, Any]) -> str:
        return f"<pre><em>{html.escape(sample['prompt'])}</em>{html.escape(sample['text'])}</pre>"

    if not samples:
        return '<p class="soft">This run wrote none (samples.every_n_steps is 0).</p>'
    earlier = "".join(
        f"<details><summary>after step {sample['step']:,}</summary>{one(sample)}</details>"
        for sample in reversed(samples[:-1])
    )
    return f'<p class="soft">After step {samples[-1]["step"]:,}; the prompt is grey.</p>{one(samples[-1])}{earlier}'


def write_report(run_folder: Path, config: ZooConfig, num_params: int, held_out: bytes) -> Path:
    """Writes report.html into `run_folder` and returns its path.

    Args:
        run_folder: holds metrics.csv, and where the run wrote them samples.jsonl and config.yaml.
        config: the model's.
        num_params: number of the model's parameters.
        held_out: the held-out text as raw bytes, for xz's figure; at most its first 20 MB count. Empty: no figure.
    """
    rows = read_metrics(run_folder / FILE_NAME)
    samples = read_samples(run_folder)
    xz = xz_bits_per_byte(held_out[:XZ_LIMIT]) if held_out else None
    steps, losses = series(rows, "train/loss")
    bits = series(rows, "val/bpb")[1]
    speed = series(rows, "throughput/tokens_per_second")[1]
    mfu = series(rows, "throughput/mfu")[1]

    figures = [(f"{num_params / 1e6:,.2f} M", "parameters"), (f"{steps[-1] if steps else 0:,}", "optimiser steps")]
    if bits:
        figures.append((f"{bits[-1]:.3f}", "held-out bits per byte"))
    if xz is not None:
        figures.append((f"{xz:.3f}", "xz -9e on the same held-out text"))
    if speed:
        figures.append((f"{sorted(speed)[len(speed) // 2]:,.0f}", "tokens per second (median)"))
        figures.append((f"{sorted(mfu)[len(mfu) // 2]:.1%}", "of the measured matmul peak (MFU)"))

    pattern = config.pattern if isinstance(config.pattern, str) else " ".join(config.pattern)
    sections = [("Layers", f'<p class="soft">{html.escape(pattern)}</p>{layer_stack_svg(config)}')]
    if losses:
        sections.append(("Loss", _loss_picture(rows)))
    if bits:
        sections.append(("Held-out text, in bits per byte", _bits_picture(rows, xz)))
    if speed:
        sections.append(("Speed", _speed_picture(rows)))
    sections.append(("What it writes", _samples(samples)))
    config_yaml = run_folder / "config.yaml"
    if config_yaml.exists():
        text = html.escape(config_yaml.read_text(encoding="utf-8"))
        sections.append(("Configuration", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"))

    title = html.escape(run_folder.resolve().name)
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>"
        f'<div class="cards">{_cards(figures)}</div>{body}</main></body></html>\n'
    )
    path = run_folder / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path
