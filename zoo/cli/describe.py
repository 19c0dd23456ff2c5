"""Describe a model: parameters, FLOPs, state and training memory of every layer, as a table or a page.

FLOPs count two for each multiply-add of matrix products in a forward pass, averaged over the sequence; a training step
takes three times as many. The state is what a sequence leaves behind for the next token: recurrent states in float32,
keys and values in bfloat16. Training memory is that of float32 weights, gradients, AdamW's two averages, and what the
backward pass needs, without gradient checkpointing; temporaries of single operations come on top.
"""

from __future__ import annotations

import dataclasses
import html
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

import zoo.blocks
from zoo.blocks.norm import NormConfig
from zoo.blocks.registry import MixerPart
from zoo.blocks.residual import RESIDUALS
from zoo.cli.check import parts, span
from zoo.cli.errors import CommandError
from zoo.cli.options import Option, file_name, length
from zoo.config import load_config
from zoo.models.picture import layer_stack_svg
from zoo.models.summary import Summary, runs, summarize
from zoo.schema import FieldError, Size, expected, get_hints, shown

HEADER = ("layer", "block", "kind", "parameters", "FLOPs/token", "state")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "file", type=file_name, nargs="?", metavar="FILE", help="A model file, or the folder of a saved model."
    )
    parser.add_argument("--length", type=length, default=4096, help="Tokens of a sequence: 4096, 128k, 1M.")
    parser.add_argument("--batch", type=Option(Size), default=1, help="Sequences in a training step.")
    parser.add_argument(
        "--html", type=file_name, default=None, help="Write a page with a picture to this file as well."
    )
    parser.add_argument("--kinds", action="store_true", help="List every kind of mixer and feed-forward instead.")


def run(arguments: Namespace) -> None:
    if arguments.kinds:
        print("\n".join(kinds()))
        return
    if arguments.file is None:
        raise CommandError("FILE is missing; give a model file, or --kinds")
    path = Path(arguments.file)
    config = load_config(path / "config.json" if os.path.isdir(path) else path)  # Path's raises for a name too long
    try:
        summary = summarize(config, arguments.length)
    except OverflowError as error:
        raise CommandError(f"{path}: {error}; make the model smaller") from None
    print("\n".join([*table(summary), "", *totals(summary, arguments.batch)]))
    if arguments.html is not None:
        write_page(Path(arguments.html), path, summary, arguments.batch)


def rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    """HEADER's columns for every run of layers, then weights that layers share, then embedding and head together, then
    the total."""
    total = summary.total

    def figures(cost: zoo.models.summary.Cost) -> tuple[str, ...]:
        return count(cost.params), count(cost.flops / summary.length), size(cost.state_bytes)

    for run in runs(summary.config.layers):
        name = run.layer.name if run.count == 1 else f"{run.layer.name} x {run.count}"
        yield span(run.first, run.last), name, parts(run.layer), *figures(summary.blocks[run.key] * run.count)
    for name, cost in summary.shared.items():
        layer = next(layer for layer in summary.config.layers if layer.name == name)
        yield "", f"{name}, shared", parts(layer), *figures(cost)
    ends = "embedding = head" if summary.config.tie_word_embeddings else "embedding, head"
    yield "", ends, "", *figures(summary.ends)
    yield "total", "", "", *figures(total)


def table(summary: Summary) -> list[str]:
    """The table as lines of text: words to the left, figures to the right."""
    cells = [HEADER, *rows(summary)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]

    def line(row: tuple[str, ...]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [line(HEADER), rule, *map(line, cells[1:-1]), rule, line(cells[-1])]


def totals(summary: Summary, batch: int) -> list[str]:
    """What the table's columns do not say, a line each."""
    total = summary.total
    memory = summary.training_bytes(batch)
    named = ", ".join(f"{name} {size(value)}" for name, value in memory.items())
    lines = [f"parameters: {total.params:,}"]
    if total.active_params < total.params:
        inner = total.active_params - summary.ends.params
        lines.append(f"active per token: {total.active_params:,} ({count(inner)} without embedding and head)")
    return [
        *lines,
        f"FLOPs of a forward pass over {summary.length:,} tokens: {count(total.flops)}",
        f"state after {summary.length:,} tokens: {size(total.state_bytes)}",
        f"training on {batch:,} x {summary.length:,} tokens, float32, AdamW, no checkpointing: "
        f"{size(sum(memory.values()))} ({named})",
    ]


def count(number: float) -> str:
    """`1.23 M`."""
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """`1.23 GiB`."""
    for unit, scale in (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:,.0f} B"


# The page.

STYLE = """
body{margin:0;background:#f5f6f9;color:#1c2430;font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0}p{margin:.35rem 0;color:#64748b}
section{background:#fff;border:1px solid #e6e9ef;border-radius:.7rem}
section{padding:1.2rem 1.4rem;margin:1rem 0;overflow-x:auto}
svg{width:100%;height:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:left;white-space:nowrap;border-bottom:1px solid #e6e9ef}
th{color:#64748b;font-weight:500}th:nth-child(n+4),td:nth-child(n+4){text-align:right}
tr:last-child td{font-weight:600;border-bottom:0}code{overflow-wrap:anywhere}
"""


def write_page(target: Path, source: Path, summary: Summary, batch: int) -> None:
    """Write a page that opens from disk with no network, whole or not at all.

    Raises:
        CommandError: it cannot be written.
    """

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    pattern = summary.config.pattern
    pattern = pattern if isinstance(pattern, str) else " ".join(pattern)
    name = html.escape(str(source))
    body = "".join(row(cells, "td") for cells in rows(summary))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main><h1>{name}</h1>"
        f"<p><code>{html.escape(pattern)}</code></p><section>{layer_stack_svg(summary.config)}</section>"
        f"<section><table>{row(HEADER, 'th')}{body}</table></section>"
        f"<section>{''.join(f'<p>{html.escape(line)}</p>' for line in totals(summary, batch))}</section>"
        f"</main></body></html>\n"
    )
    if not target.name:
        raise CommandError(f"--html: {target}: is a folder; give a file")
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:  # source may not be UTF-8
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):  # a name that is too long cannot be removed either
            temporary.unlink(missing_ok=True)
        raise CommandError(f"--html: {target}: cannot be written ({error.strerror}); give another file") from None


# The kinds.


def kinds() -> list[str]:
    """Every kind with its fields: type, default, one line each."""
    try:
        found = zoo.blocks.kinds()
    except FieldError as error:
        raise CommandError(error.problem) from None
    titles = {"mixer": "mixer: {kind: ...}", "ffn": "ffn: {kind: ...}"}
    sections = [(titles[kind.role], kind.name, kind.config_class) for kind in found]
    sections += [("residual: {kind: ...}", name, cls) for name, cls in RESIDUALS.items()]
    sections.append(("norm: ...", "", NormConfig))
    lines: list[str] = []
    title = None
    for heading, name, cls in sections:
        if heading != title:
            lines += ["", heading] if lines else [heading]
            title = heading
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:14}{summary}" if name else f"  {summary}")
        lines += [f"      {line}" for line in fields(cls)]
    return lines


def fields(cls: type, prefix: str = "") -> Iterator[str]:
    """A line for each field of a config dataclass, those of its own dataclasses (`rope.theta`) after them."""
    explained = explanations(cls)
    hints = get_hints(cls)
    for field in dataclasses.fields(cls):
        inner = [
            part
            for part in (hints[field.name], *getattr(hints[field.name], "__args__", ()))
            if part is not MixerPart  # any kind's, each listed by itself
            if dataclasses.is_dataclass(part)
        ]
        default = spelled(field)
        line = f"{prefix + field.name:38}{expected(hints[field.name])}, {default}. {explained.get(field.name, '')}"
        yield line.rstrip()
        for part in inner:
            yield from fields(part, f"{prefix}{field.name}.")


def spelled(field: dataclasses.Field) -> str:
    """The default as YAML spells it; a field that is null by default is optional."""
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "optional"
    if field.default is dataclasses.MISSING or dataclasses.is_dataclass(field.default):
        return "default as below"
    return f"default {field.default if isinstance(field.default, str) else shown(field.default)}"


def explanations(cls: type) -> dict[str, str]:
    """Field name -> what the class's docstring says about it: lines of `name  text`, or `name, name  text`."""
    found: dict[str, str] = {}
    for line in (cls.__doc__ or "").splitlines():
        if match := re.fullmatch(r" {4}(\w+(?:, \w+)*)  +(\S.*)", line):
            found |= dict.fromkeys(match[1].split(", "), match[2])
    return found
