"""What a long text costs each way to attend: a training step per token, and the next token after a long context.

Both lengths alternate in one process; a training step is measured as in benchmarks/length.py. The context is read in
chunks, by the model itself, and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import zoo
from benchmarks import length, machine, models
from benchmarks.machine import rounded
from benchmarks.rows import DTYPES, Options, Row, Task, Work, figures
from benchmarks.timing import alternate

NEXT = "next token"
TRAIN_LENGTHS = {"cpu": (4096, 32768), "cuda": (4096, 65536), "quick": (64, 128)}
CONTEXTS = {"cpu": (4096, 131072), "cuda": (4096, 131072), "quick": (64, 128)}
CHUNK = 1024  # tokens of the context at once
NEW = 8  # tokens in a call


def plan(options: Options) -> list[Task]:
    found = []
    for stack in models.attending():
        for dtype in options.dtypes:
            lengths = TRAIN_LENGTHS[options.size]
            train = partial(length.measure, stack, dtype, options, lengths)
            found.append(Task(stack, f"{stack} {dtype} {length.PASS}", train))
            if stack != models.ALL_BLOCKS:  # it would read its context for a quarter of an hour
                found.append(Task(stack, f"{stack} {dtype} {NEXT}", partial(measure, stack, dtype, options)))
    return found


@torch.no_grad()
def measure(stack: str, dtype: str, options: Options) -> Row:
    """The next token after each context."""
    contexts = CONTEXTS[options.size]
    model = zoo.build(models.stacks(length.width(options))[stack]).to(options.device, DTYPES[dtype]).eval()
    candidates, cache_bytes = {}, {}
    for context in contexts:
        candidates[f"{context} tokens"], cache_bytes[context] = after(model, context)
    timings = alternate(candidates, device=options.device, **options.effort or {"rounds": 15, "seconds": 30.0})
    work = Work(NEW, NEW * model.flops(1, 1))
    found = {name: figures(timing, work, options.peaks, dtype) for name, timing in timings.items()}
    for held, candidate in zip(cache_bytes.values(), found.values(), strict=True):
        candidate["us_per_token"] = rounded(1e3 * candidate["ms"] / NEW)
        candidate["cache_bytes"] = held
    short, long = (found[f"{context} tokens"] for context in (min(contexts), max(contexts)))
    return {
        "what": stack,
        "pass": NEXT,
        "dtype": dtype,
        "shape": {"batch": 1, "short": min(contexts), "length": max(contexts)},
        "candidates": found,
        "time_ratio": rounded(long["us_per_token"] / short["us_per_token"]),
        "memory_ratio": rounded(long["cache_bytes"] / short["cache_bytes"]),
        "versions": machine.versions(),
    }


def after(model: zoo.ZooForCausalLM, context: int) -> tuple[Callable[[], None], int]:
    """A call that takes the next NEW tokens from a cache behind `context` ones, and the bytes of that cache."""
    ids = torch.randint(0, models.VOCAB, (1, context), device=model.device)
    cache = model.model.new_cache(1, model.device, model.dtype)
    for chunk in ids.split(CHUNK, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)

    def call() -> None:
        for token in ids[:, :NEW].split(1, 1):
            model(token, past_key_values=cache)

    return call, cache.nbytes()
