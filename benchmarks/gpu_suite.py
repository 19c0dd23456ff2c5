"""Everything that a GPU should check, in one command of under nine minutes.

    python -m benchmarks.gpu_suite --out DIR [--only checks,goals,ops,train,decode,context] [--match REGEX]
                                   [--minutes 8.5]

checks   every kernel against float64 on real shapes, a million tokens too, and the kernels' tests (gpu_checks.py)
goals    whole attentions at 65,536 tokens beside flash or FlexAttention, and whether they are as fast as they should
         be (goals.py)
ops      every op against its peers at 2k to 128k tokens in bfloat16 (benchmarks.ops), the most telling shapes first
train    a training step of three models of a billion parameters at 8,192 tokens
decode   their next token after 4k, 128k and 1M tokens, and what their caches weigh
context  stacks of each way to attend, at 64k tokens against 4k (benchmarks.context)

Each row is written as it comes: figures to DIR/<gpu>.json, as `python -m benchmarks` writes them (DIR may be
benchmarks/results), the rest to DIR/checks/<gpu>.json: the checks, the goals, what failed, what there was no time for.
--match keeps the jobs and rows whose names it finds. --tiny is for a CPU: small sizes, kernels interpreted.

From a session that is lent a GPU, with the wheels of what is missing there (jsonargparse, docstring-parser,
typeshed-client, fla-core, einops) in .whl, a folder that git ignores and the call carries:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site &&
    PYTHONUNBUFFERED=1 python3 -m benchmarks.gpu_suite --out $OUT
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from rich.console import Console

import zoo
from benchmarks import context, goals, gpu_checks, machine, ops
from benchmarks.__main__ import overview, peaks
from benchmarks.models import parameters
from benchmarks.rows import DTYPES, Options, Row, Task, Work, make_row, summary
from benchmarks.timing import alternate
from benchmarks.train import PASS, step
from zoo.blocks.state import KeyValueState
from zoo.models import ZooForCausalLM

# The share of the time that a section may take; what it leaves is for the later ones.
SHARES = {"checks": 0.30, "goals": 0.08, "ops": 0.29, "train": 0.13, "decode": 0.10, "context": 0.10}
PROCESSES = 14  # of checks side by side
DTYPE = "bfloat16"
OPS_ORDER = (8192, 65536, 131072, 32768, 2048, 1)  # lengths
TOLD = (8192, 65536, 131072)  # those in the table at the end
BATCHES = ((4, False), (2, False), (1, False), (1, True))  # and checkpointing: the first that fits
TRAINED = {"cuda": 8192, "quick": 16}  # tokens of a row
CONTEXTS = {"cuda": (4096, 131072, 1 << 20), "quick": (16, 40)}
NEW = 8  # tokens decoded in one timed call


def billion(hidden: int = 2048, head_dim: int = 128, vocab_size: int = 32768) -> dict[str, dict[str, Any]]:
    """Models of 1.0, 1.2 and 1.0 billion parameters, with as many layers as these of any width."""
    heads = hidden // head_dim
    softmax = {"kind": "attention", "num_heads": heads, "num_kv_heads": max(1, heads // 4), "head_dim": head_dim}
    rotary = {"mixer": softmax | {"rope": {"theta": 1e6}}}
    narrow = {"kind": "mlp", "intermediate_size": 3 * hidden // 8}
    experts = narrow | {"kind": "moe", "num_experts": 8, "top_k": 2}
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden}
    return {
        "minimax-1b": {
            **sizes,
            "defaults": {"ffn": experts},
            "blocks": {
                "lightning": {"mixer": {"kind": "lightning", "num_heads": heads, "head_dim": head_dim}},
                "softmax": rotary,
            },
            "residual": {"kind": "normalized", "mixer_alpha": 2.0, "ffn_alpha": 2.0},
            "pattern": "(lightning*7 softmax)*2",
        },
        "jamba-1b": {
            **sizes,
            "defaults": {"mixer": {"kind": "mamba", "inner_norms": True}, "ffn": narrow},
            "blocks": {
                "mamba": {},
                "mixture": {"ffn": experts | {"renormalize": False}},
                "softmax": {"mixer": softmax | {"rope": None}},
            },
            "pattern": "((mamba mixture)*2 softmax mixture mamba mixture)*3",
        },
        "transformer-1b": {
            **sizes,
            "blocks": {"softmax": rotary | {"ffn": narrow | {"intermediate_size": 11 * hidden // 4}}},
            "pattern": "softmax*20",
        },
    }


@lru_cache(maxsize=1)
def build(name: str, device: str, dtype: torch.dtype, quick: bool) -> ZooForCausalLM:
    return zoo.build((billion(32, 8, 512) if quick else billion())[name], device=device, dtype=dtype)


# What the sections measure


def plan_ops(options: Options) -> list[Task]:
    """The rows of benchmarks.ops; plain attention, which is torch's own, last."""

    def place(task: Task) -> tuple[bool, int, bool]:
        case, shape, pass_ = task.measure.args[:3]  # type: ignore[attr-defined]
        length = OPS_ORDER.index(shape.length) if shape.length in OPS_ORDER else 0
        return case[:2] == ("softmax_attention", None), length, pass_ != ops.BOTH

    return sorted(ops.plan(options), key=place)


def plan_train(options: Options) -> list[Task]:
    return [Task(name, f"{name} training", partial(train, name, options)) for name in billion()]


def train(name: str, options: Options) -> Row:
    """A step, float32 weights under autocast."""
    effort = options.effort or {"warmup": 2, "rounds": 5, "seconds": 8.0}
    for batch, checkpointing in BATCHES:
        model = build(name, options.device, torch.float32, options.quick).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.randint(0, model.config.vocab_size, (batch, TRAINED[options.size]), device=options.device)
        try:
            timings = alternate({"zoo": partial(step, model, ids, DTYPE)}, device=options.device, **effort)
        except torch.OutOfMemoryError:
            build.cache_clear()
            del model
            torch.cuda.empty_cache()
        else:
            return make_row(
                {"what": name, "pass": PASS, "dtype": DTYPE, "shape": {"batch": batch, "length": ids.shape[1]}},
                timings,
                Work(ids.numel(), flops=3 * model.flops(*ids.shape)),
                options.peaks,
                ("zoo",),
                parameters=parameters(model),
                checkpointing=checkpointing,
            )
    raise MemoryError(f"{name} does not fit")


def plan_decode(options: Options) -> list[Task]:
    return [
        Task(name, f"{name} after {context:,} tokens", partial(decode, name, context, options))
        for name in billion()
        for context in CONTEXTS[options.size]
    ]


@torch.no_grad()
def decode(name: str, context: int, options: Options) -> Row:
    """One token after another, from a cache as large as it is after `context` tokens. Its keys and values are random:
    to read a million tokens with softmax attention takes minutes."""
    model = build(name, options.device, DTYPES[DTYPE], options.quick).eval()
    cache = model.model.new_cache(1, model.device, DTYPES[DTYPE])
    for state in cache.layers:
        if isinstance(state, KeyValueState):
            random = partial(
                torch.randn, 1, context, *state["keys"].shape[2:], device=model.device, dtype=DTYPES[DTYPE]
            )
            past = {"keys": random(), "values": random()}
            state.load(past | {"mask": torch.ones(1, context, dtype=torch.bool, device=model.device)})
            del past  # the cache copies it into a buffer, and then it must go
    cache.advance(context, context)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)

    def next_tokens() -> None:
        for _ in range(NEW):
            model(token, past_key_values=cache, use_cache=True)

    effort = options.effort or {"warmup": 1, "rounds": 7, "seconds": 4.0}
    timings = alternate({"zoo": next_tokens}, device=options.device, **effort)
    shape = {"batch": 1, "length": context, "new": NEW}
    read = model.num_active_params() * DTYPES[DTYPE].itemsize + model.state_bytes(1, context)
    return make_row(
        {"what": name, "pass": f"after {context:,} tokens", "dtype": DTYPE, "shape": shape},
        timings,
        Work(NEW, bytes=NEW * read),
        options.peaks,
        ("zoo",),
        cache_bytes=cache.nbytes(),
    )


PLANS: dict[str, Callable[[Options], list[Task]]] = {
    "goals": goals.plan,
    "ops": plan_ops,
    "train": plan_train,
    "decode": plan_decode,
    "context": context.plan,
}


# How they run

SLACK = 30  # seconds that the last row of a section may take beyond its share


class Report:
    """The file beside the figures. `tried` are the rows begun in this run, in whatever process."""

    def __init__(self, out: Path, device: str) -> None:
        self.file = machine.path(device, out / "checks")
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def start(self, device: str) -> None:
        lists: dict[str, Any] = {"checks": [], "goals": [], "failed": {}, "tried": [], "left_out": [], "seconds": {}}
        self.write(machine=machine.describe(device), versions=machine.versions(), **lists)

    def write(self, **more: Any) -> None:
        self.content |= more
        machine.write(self.file, self.content)


def measure(section: str, match: str, end: float, out: Path, options: Options) -> None:
    """The rows of one section, in this process; after an error of CUDA, which leaves it useless, it exits with 1."""
    report = Report(out, options.device)
    options = replace(options, peaks=report.content["peaks"])
    for number, task in enumerate(PLANS[section](options)):
        name = f"{section} {number}: {task.label}"
        if not re.search(match, task.label) or name in report.content["tried"]:
            continue
        if time.time() > end:
            report.write(left_out=[*report.content["left_out"], name])
            continue
        report.write(tried=[*report.content["tried"], name])
        try:
            row = task.measure()
        except Exception as error:  # of whatever kind, it must not cost the rest
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            report.write(failed=report.content["failed"] | {name: said})
            print(f"{name} failed: {said}", flush=True)
            if re.search(r"CUDA error|Triton Error \[CUDA\]", said):
                raise SystemExit(1) from error
        else:
            if section == "goals":
                report.write(goals=[*report.content["goals"], row])
            else:
                machine.record(machine.path(options.device, out), options.device, dict(options.peaks), section, [row])
            print(summary(row), flush=True)


def in_own_process(command: Sequence[str], section: str, end: float, out: Path, device: str) -> None:
    """Runs a section, again after whatever ended it early: the row it was at has then failed."""
    while time.time() < end:
        before = len(Report(out, device).content["tried"])
        try:
            code = subprocess.run(command, timeout=max(1.0, end + SLACK - time.time())).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code == 0:
            return
        report = Report(out, device)
        tried = report.content["tried"]
        why = "it took too long" if code is None else f"its process ended with {code}"
        name = tried[-1] if len(tried) > before else section
        report.write(failed={name: why} | report.content["failed"])
        if len(tried) == before:
            return  # it does not get as far as a row


def in_processes(
    commands: Mapping[str, Sequence[str]], gigabytes: Mapping[str, int], room: float, end: float
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Runs commands side by side, as many as their memory allows, the largest first. Yields the name of each that is
    done and the JSON objects it printed; one that crashed, or was ended at `end`, has a last object that says so."""
    waiting = sorted(commands, key=lambda name: -gigabytes[name])
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]] = {}
    while waiting or running:
        late = time.time() > end
        if late:
            yield from ((name, [{"check": name, "failed": ["there was no time"]}]) for name in waiting)
            waiting = []
        for name in list(waiting):
            used = sum(gigabytes[other] for other in running)
            if len(running) < PROCESSES and (not running or used + gigabytes[name] <= room):
                waiting.remove(name)
                files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is done)
                process = subprocess.Popen(commands[name], stdout=files[0], stderr=files[1], start_new_session=True)
                running[name] = process, *files
        for name, (process, *files) in list(running.items()):
            finished = process.poll() is not None
            if finished or late:
                if not finished:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                process.wait()
                del running[name]
                said, complaints = (lines(file) for file in files)
                results = [json.loads(line) for line in said if line.startswith("{")]
                if process.returncode:
                    results.append({"check": name, "failed": complaints[-4:] if finished else ["it took too long"]})
                yield name, results
        time.sleep(0.05)


def lines(file: IO[bytes]) -> list[str]:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()


def check(report: Report, match: str, end: float, options: Options) -> None:
    """The jobs of gpu_checks. Their processes fill Triton's cache for the sections that measure."""
    jobs = {name: job for name, job in gpu_checks.jobs(options).items() if re.search(match, name)}
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--device", options.device, *["--tiny"] * options.quick]
    commands = {name: [*command, name] for name in jobs}
    needed = {name: job.gigabytes for name, job in jobs.items()}
    room = 0.9 * torch.cuda.mem_get_info()[0] / 1e9 if options.device == "cuda" else math.inf
    too_large = [name for name in jobs if needed[name] > room]
    report.write(left_out=[*report.content["left_out"], *(f"{name}: needs {needed[name]} GB" for name in too_large)])
    commands = {name: command for name, command in commands.items() if name not in too_large}
    for name, results in in_processes(commands, needed, room, end):
        report.write(checks=report.content["checks"] + results)
        print(f"{name}: {', '.join(verdict(result) for result in results)}", flush=True)


def verdict(result: dict[str, Any]) -> str:
    return "FAILED" if "failed" in result else "right" if result["passed"] else "WRONG"


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    device = "cpu" if given.tiny else "cuda"
    if given.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes, before they import triton
    options = Options(device, (DTYPE,), quick=given.tiny)
    if given.section:
        measure(given.section, given.match, given.end, given.out, options)
        return
    start = time.time()
    report = Report(given.out, device)
    report.start(device)
    wanted = [section for section in SHARES if section in given.only.split(",")]
    for place, section in enumerate(wanted):
        later = sum(SHARES[other] for other in wanted[place + 1 :]) / sum(SHARES[other] for other in wanted)
        began, end = time.time(), start + 60 * given.minutes * (1 - later)
        if section == "checks":
            check(report, given.match, end, options)
        else:
            if place == 0 or wanted[place - 1] == "checks":
                report.write(peaks=peaks(options))
                torch.cuda.empty_cache()  # which the sections' processes need
            command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(given.out), "--match", given.match]
            command += ["--section", section, "--end", str(end), *["--tiny"] * given.tiny]
            in_own_process(command, section, end, given.out, device)
            report = Report(given.out, device)
        report.write(seconds=report.content["seconds"] | {section: round(time.time() - began)})
    tell(report, machine.read(machine.path(device, given.out)))


def tell(report: Report, results: dict[str, Any]) -> None:
    """The short table at the end."""
    console = Console(highlight=False, width=150)
    rows = [row for row in results["ops"] if row["pass"] == ops.BOTH and row["shape"]["length"] in TOLD]
    console.print(overview([*rows, *results["train"], *results["decode"], *results["context"]]))
    say = partial(console.print, markup=False, soft_wrap=True)
    for row in results["train"]:
        figures = row["candidates"]["zoo"]
        say(f"{row['what']}: {figures['tokens_per_s']:,.0f} tokens/s, {figures['flop_fraction']} of the matmul peak")
    for row in results["decode"]:
        per_token = row["candidates"]["zoo"]["ms"] / NEW
        say(f"{row['what']} {row['pass']}: {per_token:.2f} ms a token, a cache of {row['cache_bytes'] / 1e9:.3f} GB")
    for name, said in report.content["failed"].items():
        say(f"{name} failed: {said}")
    found = results | {"goals": report.content["goals"]}
    for row in found["goals"]:
        say(goals.verdict(row))
    for row in (row for section in PLANS for row in found[section]):
        for name, said in row.get("failed", {}).items():
            say(f"{row['what']} {row['pass']} {row['shape']}: {name} failed: {said}")
    wrong = [each for each in report.content["checks"] if verdict(each) != "right"]
    for each in wrong:
        say(f"{verdict(each)} {each['check']}: {each}"[:400])
    say(f"{len(report.content['checks']) - len(wrong)} checks right, {len(wrong)} not; {report.content['seconds']} "
        f"seconds; no time for {len(report.content['left_out'])} rows; see {report.file}")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    top.add_argument("--only", default=",".join(SHARES), help="sections, with commas between")
    top.add_argument("--match", default="", help="a regular expression to find in the names of jobs and rows")
    top.add_argument("--minutes", type=float, default=8.5)
    top.add_argument("--tiny", action="store_true", help="small sizes on a CPU, to see that it runs")
    top.add_argument("--section", choices=tuple(PLANS), help=argparse.SUPPRESS)
    top.add_argument("--end", type=float, help=argparse.SUPPRESS)
    return top


if __name__ == "__main__":
    main()
