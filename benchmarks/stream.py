"""Generation without end, token by token, far past what a model was made for: flat memory, finite logits.

One small model with every mixer that `zoo generate --stream-context` takes: what is measured is the loop and the
states, not the arithmetic. The suite runs the same for fewer tokens (tests/benchmarks/test_stream.py).
"""

from __future__ import annotations

import gc
import math
import time
from functools import partial
from itertools import islice

import torch
from torch import Tensor

import zoo
from benchmarks import machine
from benchmarks.length import status
from benchmarks.machine import rounded
from benchmarks.rows import Options, Row, Task, Work, figures
from benchmarks.timing import Timing
from zoo.models.streaming import stream

WINDOW = 32  # every window and segment: a state has the same size again after so many tokens
MIXERS = {
    "sinks": {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": WINDOW, "num_sinks": 4},
    "infini": {"kind": "infini", "num_heads": 2, "segment": WINDOW},
    "lightning": {"kind": "lightning", "num_heads": 2},
    "mamba": {"kind": "mamba", "state_size": 4},
    "mamba2": {"kind": "mamba2", "num_heads": 2, "head_dim": 16, "state_size": 8},
}
TOKENS = {"cpu": 100_000, "cuda": 100_000, "quick": 320}
PARTS = 10
TRAINED = 64  # tokens of the prompt: twice the window


def plan(options: Options) -> list[Task]:
    return [Task("stream", "stream", partial(measure, TOKENS[options.size], options))]


def build() -> zoo.ZooForCausalLM:
    """A layer of each, wide enough to say something and no wider."""
    torch.manual_seed(0)
    blocks = {name: {"mixer": mixer} for name, mixer in MIXERS.items()}
    config = {"vocab_size": 61, "hidden_size": 16, "initializer_range": 0.3, "blocks": blocks}
    return zoo.build(config | {"pattern": " ".join(MIXERS), "max_position_embeddings": TRAINED}).eval()


def measure(tokens: int, options: Options) -> Row:
    """At least `tokens` steps, in PARTS parts of whole windows; after each part, the bytes of all tensors there are and
    of the process.

    Raises:
        ValueError: logits that are not finite, or a state that grew.
    """
    model, seen = build().to(options.device), set()

    def choose(logits: Tensor) -> Tensor:
        if not logits.isfinite().all():
            raise ValueError("logits are not finite")
        token = torch.multinomial(logits.softmax(-1), 1)
        seen.add(int(token))
        return token

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a step has nothing to share out, and waiting for each other takes longer
    endless = stream(model, torch.randint(61, (1, TRAINED), device=options.device), choose)
    each = math.ceil(tokens / PARTS / WINDOW) * WINDOW
    times, tensors, resident = [], [], []
    for _ in range(PARTS):
        began = time.perf_counter()
        for _ in islice(endless, each):
            pass
        times.append((time.perf_counter() - began) / each)
        tensors.append(tensor_bytes())
        resident.append(status("VmRSS"))
    endless.close()
    torch.set_num_threads(threads)
    if len(set(tensors)) > 1:
        raise ValueError(f"the tensors grew from {tensors[0]} to {max(tensors)} bytes")
    work = Work(1, model.flops(1, 1))
    candidates = {
        name: figures(Timing(seconds, seconds, each, None), work, options.peaks, "float32")
        for name, seconds in (("first tenth", times[0]), ("last tenth", times[-1]))
    }
    return {
        "what": "stream",
        "pass": "token by token",
        "dtype": "float32",
        "shape": {"batch": 1, "length": each * PARTS, "trained": TRAINED},
        "candidates": candidates,
        "mixers": list(MIXERS),
        "tensor_bytes": tensors[0],
        "resident_bytes": [resident[0], resident[-1]],
        "time_ratio": rounded(times[-1] / times[0]),
        "memory_ratio": rounded(resident[-1] / resident[0]),
        "different_tokens": len(seen),
        "versions": machine.versions(),
    }


def tensor_bytes() -> int:
    """Of all tensors in this process, each storage once."""
    gc.collect()
    return sum(dict(map(_storage, gc.get_objects())).values())


def _storage(x: object) -> tuple[int, int]:
    """Where a tensor's memory is, and its bytes."""
    try:
        if issubclass(type(x), torch.Tensor) and not x.is_meta:  # type: ignore[attr-defined]
            return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()  # type: ignore[attr-defined]
    except Exception:  # a fake tensor, or a proxy of something dead
        pass
    return 0, 0
