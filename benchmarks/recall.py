"""What mixers recall from far beyond their window: small models that learn to find a passkey in noise.

    python -m benchmarks.recall      trains what has no result yet, then writes docs/blocks/recall.md and its picture

One recipe serves all mixers: two layers of window attention below, the mixer on top. The control has a window there as
well, so that whatever lies beyond the windows of all layers together is lost to it. A run is one mixer and one seed;
its result is a file of its own, and holds what it was made with: a run is repeated where that has changed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import zoo
from benchmarks import machine, recall_report
from zoo.data.recall import Passkey
from zoo.models.modeling import ZooForCausalLM
from zoo.train.memory import keep_freed_memory
from zoo.train.optimizers import make_optimizer
from zoo.train.schedules import make_schedule

RESULTS = machine.RESULTS / "recall"
SEEDS = 3
EVERY = 10  # steps from one record of the loss and the gates to the next
CHUNK = 2**14  # tokens evaluated at once
HELD_OUT = 2**31  # the seed of examples that no training reads
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all mixers have in common.

    window     of window attention; also the block, segment and window of the mixers.
    farthest   the largest distance in training.
    distances  where recall is measured.
    keys       asked for at each of them.
    steps, tokens, learning_rate, warmup_steps    of training, with Muon and a cosine schedule.
    """

    window: int = 16
    farthest: int = 256
    distances: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    keys: int = 256
    key_length: int = 4
    symbols: int = 62
    hidden_size: int = 64
    num_heads: int = 4
    steps: int = 600
    tokens: int = 4096
    learning_rate: float = 0.01
    warmup_steps: int = 30

    @property
    def mixers(self) -> dict[str, dict[str, Any]]:
        """The mixers of the top layer by name."""
        window, half = self.window, self.window // 2
        compress = {"compress": "mean", "compress_block": half, "compress_stride": half // 2, "select_block": window}
        kinds = {
            "window": {"kind": "attention", "window": window},
            "landmark": {"kind": "landmark", "block_size": window, "top_k": 2},
            "hierarchical": {"kind": "hierarchical", "window": window, **compress, "top_n": 4},
            "infini": {"kind": "infini", "segment": window},
            "infini delta": {"kind": "infini", "segment": window, "update": "delta"},
        }
        return {name: mixer | {"num_heads": self.num_heads} for name, mixer in kinds.items()}

    @property
    def reach(self) -> int:
        """How far back the control sees through all its layers."""
        return 3 * (self.window - 1)

    def model(self, name: str) -> dict[str, Any]:
        """The mapping of a model file."""
        window = {"kind": "attention", "num_heads": self.num_heads, "window": self.window}
        return {
            "vocab_size": self.task(self.farthest, 0).vocab_size,
            "hidden_size": self.hidden_size,
            "defaults": {"ffn": {"kind": "mlp", "intermediate_size": 2 * self.hidden_size}},
            "blocks": {"local": {"mixer": window}, "far": {"mixer": self.mixers[name]}},
            "pattern": "local*2 far",
        }

    def task(self, distance: int, seed: int) -> Passkey:
        return Passkey(distance=distance, key_length=self.key_length, symbols=self.symbols, room=self.window, seed=seed)


def given(study: Study, name: str, seed: int) -> Result:
    """What a run is made with, as its file has it."""
    chance = study.task(study.farthest, seed).chance
    more = {"model": study.model(name), "reach": study.reach, "chance": machine.rounded(chance)}
    return json.loads(json.dumps({"mixer": name, "seed": seed, "study": asdict(study)} | more))


def run(study: Study, name: str, seed: int, advance: Callable[[], None] = lambda: None) -> Result:
    """Trains one model and asks it; `advance` is called after each step."""
    torch.manual_seed(seed)
    model = zoo.build(study.model(name)).train()
    optimizer = make_optimizer(
        "muon", model, learning_rate=study.learning_rate, weight_decay=0.01, betas=(0.9, 0.95), momentum=0.95
    )
    options = {"warmup_steps": study.warmup_steps, "final_fraction": 0.05, "decay_fraction": 0.2}
    schedule = make_schedule("cosine", total_steps=study.steps, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    random, example, history = np.random.RandomState(seed), 0, []
    start = time.process_time()
    for step in range(study.steps):
        task = study.task(distance_at(study, step, random), seed)
        count = max(1, study.tokens // task.length)
        loss = model(**task.batch(example, count), use_cache=False).loss
        example += count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % EVERY == 0 or step + 1 == study.steps:
            history.append({"step": step + 1, "loss": machine.rounded(loss.item())} | gates(model))
        advance()
    trained = time.process_time() - start
    recall = {"forward": recall_by_distance(study, model, use_cache=False)}
    if "top_k" in study.mixers[name]:
        recall["cache"] = recall_by_distance(study, model, use_cache=True)
    return given(study, name, seed) | {
        "parameters": model.num_parameters(),
        "cpu_seconds": {"training": round(trained), "all": round(time.process_time() - start)},
        "versions": machine.versions() | {"machine": machine.device_name("cpu")},
        "recall": recall,
        "history": {key: [each[key] for each in history] for key in history[0]},
    }


def distance_at(study: Study, step: int, random: np.random.RandomState) -> int:
    """That of a step's examples, log-uniform up to a limit, which grows from the window to `farthest` in the first half
    of training, by the same factor at each step."""
    grown = min(1.0, 2 * step / study.steps)
    limit = study.window * (study.farthest / study.window) ** grown
    return round(study.key_length * (limit / study.key_length) ** random.uniform())


def gates(model: ZooForCausalLM) -> dict[str, list[float]]:
    """The share of the memory in each head of an Infini layer."""
    found = [p for name, p in model.named_parameters() if name.endswith("mixer.gate")]
    return {"gates": [machine.rounded(x) for p in found for x in p.detach().sigmoid().tolist()]} if found else {}


@torch.inference_mode()
def recall_by_distance(study: Study, model: ZooForCausalLM, use_cache: bool) -> list[dict[str, float]]:
    """Of the keys asked for at each distance, the share of symbols, and of whole keys, that the model is right about.
    It is told what the key was up to the symbol in question, which does not matter to whole keys."""
    model.eval()
    found = []
    for distance in study.distances:
        task, right = study.task(distance, HELD_OUT), []
        rows = max(1, CHUNK // task.length)
        for start in range(0, study.keys, rows):
            batch = task.batch(start, min(rows, study.keys - start))
            logits = model(batch["input_ids"], use_cache=use_cache).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            asked = labels != -100
            right.append((logits.argmax(-1) == labels)[asked].view(len(labels), -1))
        hits = torch.cat(right)
        shares = {"symbols": hits.double().mean().item(), "keys": hits.all(1).double().mean().item()}
        found.append({"distance": distance} | {name: machine.rounded(share) for name, share in shares.items()})
    return found


def path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{machine.slug(name)}-{seed}.json"


def read(folder: Path, study: Study, name: str, seed: int) -> Result | None:
    """The result of a run; None where there is none, or only that of another run."""
    file, wanted = path(folder, name, seed), given(study, name, seed)
    result = json.loads(file.read_text()) if file.exists() else {}
    return result if wanted.items() <= result.items() else None


def read_all(folder: Path, study: Study) -> list[Result]:
    """Those there are, mixer by mixer."""
    found = (read(folder, study, name, seed) for name in study.mixers for seed in range(SEEDS))
    return [result for result in found if result is not None]


_steps: Any = None  # shared among processes: how many steps each run has made


def _start_worker(steps: Any) -> None:
    global _steps
    _steps = steps
    # Shapes this small gain nothing from a second thread.
    torch.set_num_threads(1)
    keep_freed_memory()


def _work(study: Study, name: str, seed: int, place: int, folder: Path) -> Result:
    def advance() -> None:
        _steps[place] += 1

    result = run(study, name, seed, advance)
    machine.write(path(folder, name, seed), result)
    return result


def run_all(study: Study, runs: Sequence[tuple[str, int]], folder: Path) -> None:
    """Those of `runs` (name and seed) that have no result, one on each core."""
    console = Console(highlight=False)
    missing = [each for each in runs if read(folder, study, *each) is None]
    console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
    context = multiprocessing.get_context("spawn")
    steps = context.Array("i", len(missing))
    with (
        ProcessPoolExecutor(os.cpu_count(), context, _start_worker, (steps,)) as pool,
        Progress(console=console) as progress,
    ):
        pending: dict[Future[Result], Any] = {}
        for place, (name, seed) in enumerate(missing):
            bar = progress.add_task(f"{name}, seed {seed}", total=study.steps)
            pending[pool.submit(_work, study, name, seed, place, folder)] = place, bar
        while pending:
            for future in wait(pending, timeout=1).done:
                pending.pop(future)
                console.print(summary(future.result()), markup=False, soft_wrap=True)
            for place, bar in pending.values():
                progress.update(bar, completed=steps[place])


def summary(result: Result) -> str:
    """One line."""
    found = " ".join(f"{each['distance']}: {each['keys']:.0%}" for each in result["recall"]["forward"])
    return f"{result['mixer']}, seed {result['seed']}: whole keys {found} ({result['cpu_seconds']['all']} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    study = Study()
    parser.add_argument("--only", choices=study.mixers, help="one mixer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=recall_report.DOCS)
    options = parser.parse_args(arguments)
    names = [options.only] if options.only else list(study.mixers)
    run_all(study, [(name, seed) for seed in range(SEEDS) for name in names], options.results)
    print("wrote", recall_report.write(read_all(options.results, study), options.docs))


if __name__ == "__main__":
    main()
