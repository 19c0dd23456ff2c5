"""One training step, ours against the family's own transformers class: forward with labels, and backward.

No optimiser on either side; gradients start as None each time. bfloat16 is autocast over float32 weights. Ours computes
the routers' balancing losses as well, which transformers leaves out unless asked. On a CPU the peer is measured twice:
with freed memory kept, as train.py has it for ours, and with glibc's own settings, which its users have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import zoo
from benchmarks import models
from benchmarks.rows import DTYPES, Options, Row, Task, Work, make_row
from benchmarks.timing import alternate
from zoo.train.memory import give_freed_memory_back, keep_freed_memory

PASS = "training step"
AS_IT_COMES = "transformers, memory not kept"


class Size(NamedTuple):
    """`slow`: the peer's loop over tokens takes minutes, so it runs once, after one short step."""

    batch: int
    length: int
    slow: bool = False


SIZES = {
    "cpu": {
        "jamba": [Size(1, 128), Size(2, 512, slow=True)],
        "mamba2": [Size(2, 512)],
        "minimax": [Size(2, 512)],
        "llama": [Size(2, 512)],
        "minimax-125m": [Size(1, 2048)],
    },
    "cuda": {
        "jamba": [Size(1, 128), Size(2, 512, slow=True)],
        "mamba2": [Size(8, 2048)],
        "minimax": [Size(8, 2048)],
        "llama": [Size(8, 2048)],
        "minimax-125m": [Size(8, 2048)],
    },
    "quick": {name: [Size(1, 16, slow=name == "jamba")] for name in ("jamba", "mamba2", "minimax", "llama")},
}


def plan(options: Options) -> list[Task]:
    return [
        Task(name, f"{name} {dtype} {size.batch} x {size.length}", partial(measure, name, size, dtype, options))
        for name, sizes in SIZES[options.size].items()
        for size in sizes
        for dtype in options.dtypes
    ]


def measure(name: str, size: Size, dtype: str, options: Options) -> Row:
    """One row: ours, ours compiled where asked, and the peer where there is one."""
    ids = torch.randint(0, models.VOCAB, (size.batch, size.length), device=options.device)
    run = partial(step, ids=ids, dtype=dtype)
    family = models.families(32 if options.quick else 256).get(name)
    ours = zoo.build(models.MINIMAX_125M if family is None else family.ours).to(options.device).train()
    candidates: dict[str, Callable[[], object]] = {"zoo": partial(run, ours)}
    more: dict[str, float] = {"parameters": models.parameters(ours)}
    if options.compile:
        compiled = torch.compile(ours)
        start = time.perf_counter()
        run(compiled)
        more["compile_s"] = round(time.perf_counter() - start, 1)
        candidates["zoo compiled"] = partial(run, compiled)
    theirs, peers = None, {}
    if family is not None and "transformers" in options.peers:
        theirs = family.theirs().to(options.device).train()
        more["peer_parameters"] = models.parameters(theirs)
        if more["peer_parameters"] != more["parameters"]:
            raise RuntimeError(
                f"{name} is not the peer's: {more['parameters']} and {more['peer_parameters']} parameters"
            )
        peers = {"transformers": partial(run, theirs)}
        if options.device == "cpu":
            peers[AS_IT_COMES] = as_it_comes(partial(run, theirs))
        if size.slow:
            step(theirs, ids[:1, :16], dtype)
        else:
            candidates |= peers
    effort = options.effort or {"warmup": 2, "rounds": 9, "seconds": 30.0}
    timings = alternate(candidates, device=options.device, **effort)
    if theirs is not None and size.slow:
        timings |= alternate(peers, device=options.device, warmup=0, rounds=1)
    shape = {"batch": size.batch, "length": size.length}
    return make_row(
        {"what": name, "pass": PASS, "dtype": dtype, "shape": shape},
        timings,
        Work(ids.numel(), flops=3 * ours.flops(size.batch, size.length)),
        options.peaks,
        ("zoo", "zoo compiled"),
        **more,
    )


def as_it_comes(call: Callable[[], object]) -> Callable[[], None]:
    """`call` without keep_freed_memory, which holds again afterwards."""

    def under_defaults() -> None:
        give_freed_memory_back()
        try:
            call()
        finally:
            keep_freed_memory()

    return under_defaults


def step(model: nn.Module, ids: Tensor, dtype: str) -> None:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=DTYPES[dtype] is torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
