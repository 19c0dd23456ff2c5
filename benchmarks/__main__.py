"""`python -m benchmarks VERB`: measures, or writes what follows from the measurements.

ops, train, decode, length, context, stream    measure, and write rows into benchmarks/results/<machine>.json
report                        docs/performance.md and its pictures
table                         zoo/ops/measured.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import context, decode, length, machine, ops, report, stream, table, train
from benchmarks.machine import rounded
from benchmarks.rows import DTYPES, PEERS, Options, Row, summary
from benchmarks.timing import copy_peak, matmul_peak
from zoo.ops import measured
from zoo.train.memory import keep_freed_memory

VERBS = {"ops": ops, "train": train, "decode": decode, "length": length, "context": context, "stream": stream}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.verb == "report":
        print("wrote", report.write(machine.read_all(given.results), given.docs))
    elif given.verb == "table":
        machine.write(given.table, table.make_table(machine.read_all(given.results)))
        print("wrote", given.table)
    else:
        measure(given)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=(module.__doc__ or "").partition("\n")[0])
        verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        verb.add_argument(
            "--peer", choices=PEERS, action="append", help="whom to compare with; default all that run here"
        )
        verb.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
        verb.add_argument("--only", metavar="NAME", help="one op, model or stack")
        verb.add_argument(
            "--quick", action="store_true", help="tiny sizes, to see that it runs; kept only with --results"
        )
        verb.add_argument("--results", type=Path, help="folder of the JSON files; default benchmarks/results")
        verb.set_defaults(compile=False)
        if name == "train":
            verb.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    for name in ("report", "table"):
        verb = verbs.add_parser(name)
        verb.add_argument("--results", type=Path, default=machine.RESULTS)
        if name == "report":
            verb.add_argument("--docs", type=Path, default=report.DOCS)
        else:
            verb.add_argument("--table", type=Path, default=measured.TABLE)
    return top


def measure(given: argparse.Namespace) -> None:
    """Runs a verb's tasks; each row is in the file as soon as it is measured."""
    transformers.logging.set_verbosity_error()
    keep_freed_memory()  # as train.py does; peers run in this process too
    console = Console(highlight=False)
    options = Options(
        device=given.device,
        dtypes=tuple(DTYPES) if given.dtype == "both" else (given.dtype,),
        peers=tuple(given.peer or PEERS),
        compile=given.compile,
        quick=given.quick,
    )
    names = sorted({task.what for task in VERBS[given.verb].plan(options)})
    if given.only not in (None, *names):
        raise SystemExit(f"there is no {given.only!r} to measure; choose one of {', '.join(names)}")
    options = replace(options, peaks=peaks(options))
    tasks = [task for task in VERBS[given.verb].plan(options) if given.only in (None, task.what)]
    folder = given.results or (Path(tempfile.mkdtemp()) if given.quick else machine.RESULTS)
    file = machine.path(given.device, folder)
    rows, failed = [], []
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=task.label)
            try:
                row = task.measure()
            except Exception as error:  # one model too large for the device must not cost the rest
                failed.append(task.label)
                console.print(f"{task.label} failed: {type(error).__name__}: {error}", markup=False)
            else:
                rows.append(row)
                machine.record(file, given.device, dict(options.peaks), given.verb, [row])
                console.print(summary(row), markup=False, soft_wrap=True)
            progress.advance(bar)
    console.print(overview(rows))
    console.print(f"wrote {len(rows)} rows to {file}", markup=False, soft_wrap=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def peaks(options: Options) -> dict[str, float]:
    """What the machine can do, measured now."""
    seconds = 0.1 if options.quick else 2.0
    found = {name: matmul_peak(options.device, DTYPES[name], seconds) for name in DTYPES}
    return {name: rounded(peak) for name, peak in (found | {"copy": copy_peak(options.device, seconds)}).items()}


def overview(rows: Sequence[Row]) -> Table:
    """The short table at the end: our best time, and how it compares."""
    found = Table("what", "pass", "dtype", "shape", "ours, ms", "times faster than", box=None)
    for row in rows:
        shape = " ".join(str(value) for value in row["shape"].values() if value is not None)
        ours = [each for each in row["candidates"].values() if each.get("ratios")] or list(row["candidates"].values())
        best = min(ours, key=lambda candidate: candidate["ms"])
        against = ", ".join(f"{peer} {ratio:.3g}" for peer, ratio in best.get("ratios", {}).items())
        if "time_ratio" in row:
            against = f"per token: {row['time_ratio']:.3g} times the time, {row['memory_ratio']:.3g} times the memory"
        found.add_row(row["what"], row["pass"], row["dtype"], shape, f"{best['ms']:.4g}", against)
    return found


if __name__ == "__main__":
    main()
