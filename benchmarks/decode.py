"""Cached greedy decoding of one sequence, ours against the family's own transformers class, as users call it
(generate) and as the bare forward pass per token (loop). bfloat16 is the weights' dtype."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks import models
from benchmarks.rows import DTYPES, Options, Row, Task, Work, make_row
from benchmarks.timing import alternate

FAMILIES = ("jamba", "mamba2", "minimax", "llama")
PASSES = ("generate", "loop")
SIZES = {"cpu": (128, 64), "cuda": (128, 64), "quick": (8, 4)}  # tokens of the prompt, and new ones


def plan(options: Options) -> list[Task]:
    return [
        Task(name, f"{name} {dtype} {pass_}", partial(measure, name, dtype, pass_, options))
        for name in FAMILIES
        for dtype in options.dtypes
        for pass_ in PASSES
    ]


@torch.no_grad()
def measure(name: str, dtype: str, pass_: str, options: Options) -> Row:
    family = models.families(32 if options.quick else 256)[name]
    sides: dict[str, Any] = {"zoo": zoo.build(family.ours)}
    if "transformers" in options.peers:
        sides["transformers"] = family.theirs()
    prompt, new = SIZES[options.size]
    ids = torch.randint(1, models.VOCAB, (1, prompt), device=options.device)
    candidates = {}
    for side, model in sides.items():
        model.to(options.device, DTYPES[dtype]).eval()
        candidates[side] = partial(generate, model, ids, new) if pass_ == "generate" else loop(model, ids, new)
    timings = alternate(candidates, device=options.device, **options.effort)
    ours = sides["zoo"]
    weights = ours.num_active_params() * DTYPES[dtype].itemsize
    return make_row(
        {"what": name, "pass": pass_, "dtype": dtype, "shape": {"batch": 1, "length": prompt, "new": new}},
        timings,
        Work(new, flops=new * ours.flops(1, 1), bytes=new * (weights + ours.state_bytes(1, prompt + new))),
        options.peaks,
        ("zoo",),
    )


def generate(model: Any, ids: Tensor, new: int) -> Tensor:
    """The prompt and exactly `new` tokens after it."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )


def loop(model: Any, ids: Tensor, new: int) -> Any:
    """A call that takes `new` steps of one token each from the cache behind the prompt; the prompt is read here."""
    first = model(ids, use_cache=True)
    name = next(name for name in ("past_key_values", "cache_params") if getattr(first, name, None) is not None)

    def call() -> Tensor:
        cache, token = copy.deepcopy(getattr(first, name)), first.logits[:, -1:].argmax(-1)
        tokens = []
        for _ in range(new):
            logits = model(token, use_cache=True, **{name: cache}).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, 1)

    return call
