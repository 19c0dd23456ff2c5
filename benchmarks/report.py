"""docs/performance.md and its pictures, from benchmarks/results and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, pictures
from benchmarks.context import NEXT
from benchmarks.rows import DTYPES, PEERS, Row
from benchmarks.train import AS_IT_COMES, PASS

DOCS = Path(__file__).parents[1] / "docs"
FILE = "performance.md"
INTRODUCTION = """# Performance

Written by `python -m benchmarks report` from the files in `benchmarks/results`; `make benchmarks` measures a CPU anew.
Ours and the peer alternate in one process after a warm-up, in an order that turns round each time; figures are medians.
A peer that takes minutes took one step, after ours.
A ratio above 1 means that ours is faster. Fractions are of the highest peak measured on the same machine: matrix
products for FLOP/s, a copy for bytes/s. The work counted is the least that the mathematics needs, so that waste counts
against whoever wastes; it leaves out what a chunked algorithm adds.
"""
TRAIN = """
### Training

One forward and backward pass with labels, no optimiser, random weights, the same number of parameters on both sides;
bfloat16 is autocast. The peer is the family's own transformers class. Ours computes the routers' balancing losses too.
`train.py` tells glibc to keep freed memory. The peer is measured with that setting too, and as it comes, without.
"""
DECODE = """
### Decoding

Greedy, cached, one sequence. `generate` is what a user calls, the prompt included; `loop` is the bare forward pass,
token by token, from the cache behind the prompt; `after` is the same from a cache of that size. bfloat16 is the
weights'.
"""
LENGTH = """
### Length

What a training step costs per token at {length:,} tokens against {short:,}, for stacks of one recurrent mixer. Memory
is that of a fresh process with glibc's own settings.
"""
CONTEXT = """
### Long contexts

Stacks of two layers of one way to attend. Full attention, and landmarks whose queries read every block, are quadratic:
they are there to compare with.
"""
# Of each pass: what stands above its table, the field of its memory, and that field's unit.
CONTEXT_TABLES = {
    PASS: ("\nA training step, measured as under Length.\n", "bytes_per_token", "kB per token"),
    NEXT: ("\nThe next token after a context, and the cache.\n", "cache_bytes", "cache in kB"),
}
STREAM = """
### Streaming

A layer each of {mixers}, hidden size 16, in the loop of
`zoo generate --stream-context`: {length:,} tokens one by one behind a prompt of {trained}. All logits were finite, and
after every tenth the tensors took {kilobytes:,.1f} kB. The process held {first:.1f} MB after the first tenth and
{last:.1f} MB after the last; a step took {early:.2f} ms in the first and {late:.2f} ms in the last.
"""
OPS = """
### Ops

Milliseconds. `decode` is one token from a state (attention: against as many keys as the column says). Ours is the
fastest of our backends there; its fraction is of the peak that it comes closer to. Where a peer has no figure it cannot
do that case.
"""


def write(results: list[dict[str, Any]], docs: Path = DOCS) -> Path:
    """Writes the page and every picture it shows; its path."""
    docs.mkdir(parents=True, exist_ok=True)
    pictures.draw(results, docs / "performance")
    file = docs / FILE
    file.write_text(page(results))
    return file


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for kind in ("cpu", "cuda"):
        found = [each for each in results if each["machine"]["device"] == kind]
        parts += [section(each) for each in found]
        if not found:
            parts.append("\n## GPU\n\nNot yet measured.\n" if kind == "cuda" else "\n## CPU\n\nNot yet measured.\n")
    return "".join(parts)


def section(results: dict[str, Any]) -> str:
    """One machine's figures."""
    peaks, name = results["peaks"], results["machine"]["name"]
    flops = [f"{rate(peaks[dtype])}FLOP/s in {dtype}" for dtype in DTYPES]
    measured = ", ".join([*flops, f"{rate(peaks['copy'])}B/s"])
    threads = sorted({row["versions"]["threads"] for verb in machine.SECTIONS for row in results[verb]})
    parts = [f"\n## {name}\n\nMeasured peaks: {measured}. Threads: {', '.join(map(str, threads)) or 'none'}.\n"]
    parts += [f"\n![{text}](performance/{file})\n" for text, file in pictures.files(results)]
    writers: dict[str, Callable[[list[Row]], str]] = {
        "train": train,
        "decode": decode,
        "length": length,
        "context": context,
        "stream": stream,
        "ops": ops,
    }
    parts += [writer(results[verb]) for verb, writer in writers.items() if results[verb]]
    return "".join(parts)


def train(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        candidates, shape = row["candidates"], row["shape"]
        ours, theirs = candidates["zoo"], candidates.get("transformers", {})
        plain, ratios = candidates.get(AS_IT_COMES, {}), ours.get("ratios", {})
        compiled = candidates.get("zoo compiled", {})
        once = " (one step)" if theirs.get("count") == 1 else ""
        lines.append(
            (
                row["what"],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{shape['batch']} x {shape['length']:,}" + (" checkpointed" if row.get("checkpointing") else ""),
                row["dtype"],
                number(ours["tokens_per_s"]),
                number(compiled.get("tokens_per_s")) + (f" after {row['compile_s']} s" if compiled else ""),
                number(theirs.get("tokens_per_s")) + once,
                times(ratios.get("transformers")),
                number(plain.get("tokens_per_s")) + (once if plain else ""),
                times(ratios.get(AS_IT_COMES)),
                percent(ours.get("flop_fraction")),
                gigabytes(ours.get("peak_bytes"), theirs.get("peak_bytes")),
            )
        )
    head = ("model", "parameters", "batch", "dtype", "ours, tokens/s", "ours compiled", "peer", "ratio")
    return TRAIN + table((*head, "peer as it comes", "ratio", "of matmul peak", "peak memory, peer's"), lines)


def decode(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        shape, ours, theirs = row["shape"], row["candidates"]["zoo"], row["candidates"].get("transformers", {})
        lines.append(
            (
                row["what"],
                row["pass"],
                f"{shape['length']:,} + {shape['new']}",
                row["dtype"],
                number(ours["tokens_per_s"]),
                number(theirs.get("tokens_per_s")),
                times(ours.get("ratios", {}).get("transformers")),
                gigabytes(row.get("cache_bytes")),
            )
        )
    head = ("model", "way", "prompt + new", "dtype", "ours, tokens/s", "peer", "ratio", "cache")
    return DECODE + table(head, lines)


def length(rows: list[Row]) -> str:
    return LENGTH.format(**rows[0]["shape"]) + two_lengths(rows, "bytes_per_token", "kB per token")


def context(rows: list[Row]) -> str:
    parts = [CONTEXT]
    for pass_, (text, field, unit) in CONTEXT_TABLES.items():
        mine = [row for row in rows if row["pass"] == pass_]
        if mine:
            parts.append(text + two_lengths(mine, field, unit))
    return "".join(parts)


def stream(rows: list[Row]) -> str:
    """Of the longest text; a file may hold shorter ones of other runs."""
    row = max(rows, key=lambda row: row["shape"]["length"])
    first, last = (each / 1e6 for each in row["resident_bytes"])
    early, late = (candidate["ms"] for candidate in row["candidates"].values())
    mixers, kilobytes = ", ".join(row["mixers"]), row["tensor_bytes"] / 1e3
    return STREAM.format(
        **row["shape"], mixers=mixers, kilobytes=kilobytes, first=first, last=last, early=early, late=late
    )


def two_lengths(rows: list[Row], memory: str, unit: str) -> str:
    """A table of time and memory at a short and a long length, the field `memory` in thousands."""
    lines = []
    for row in rows:
        short, long = (row["candidates"][f"{row['shape'][name]} tokens"] for name in ("short", "length"))
        microseconds = [number(each["us_per_token"]) for each in (short, long)]
        kilobytes = [f"{each[memory] / 1e3:,.1f}" for each in (short, long)]
        ratios = [f"{row[name]:.2f}" for name in ("time_ratio", "memory_ratio")]
        lines.append((row["what"], row["dtype"], *microseconds, ratios[0], *kilobytes, ratios[1]))
    at = [f"{rows[0]['shape'][name]:,}" for name in ("short", "length")]
    head = ("stack", "dtype", f"µs per token at {at[0]}", f"at {at[1]}", "ratio")
    return table((*head, f"{unit} at {at[0]}", f"at {at[1]}", "ratio"), lines)


def ops(rows: list[Row]) -> str:
    parts = [OPS]
    for op in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == op]
        peers = [peer for peer in PEERS if any(peer in row["candidates"] for row in mine)]
        lines = []
        for row in mine:
            shape, candidates = row["shape"], row["candidates"]
            name = pictures.fastest(row)
            ours = candidates[name]
            theirs = [
                f"{number(candidates[peer]['ms'])} ({times(ours['ratios'][peer])})" if peer in candidates else ""
                for peer in peers
            ]
            sizes = f"{shape['heads']} x {shape['width']}" if shape["heads"] > 1 else str(shape["width"])
            batch = f"{shape['batch']} x {shape['length']:,}"
            keys = f"{shape['keys']:,}" if shape["keys"] else ""
            case = (shape["variant"] or "", sizes, batch, keys, row["pass"], row["dtype"])
            lines.append((*case, f"{number(ours['ms'])} {name}", *theirs, percent(pictures.fraction(ours))))
        head = (
            "variant",
            "width",
            "batch",
            "keys",
            "pass",
            "dtype",
            "ours",
            *(f"{peer} (ratio)" for peer in peers),
            "of peak",
        )
        parts.append(f"\n#### {op}\n" + table(head, lines))
    return "".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty throughout."""
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    rows = [[line[i] for i in used] for line in (head, ["---"] * len(head), *lines)]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def number(x: float | None) -> str:
    """Three digits, thousands set apart."""
    if x is None:
        return ""
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 100 else f"{x:.3g}"


def rate(x: float) -> str:
    """`2.4 T` for 2.4e12: a unit follows."""
    return f"{x / 1e12:.3g} T" if x >= 1e12 else f"{x / 1e9:.3g} G"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{number(ratio)}x"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def gigabytes(*amounts: int | None) -> str:
    return ", ".join(f"{amount / 1e9:.3g} GB" for amount in amounts if amount is not None)
