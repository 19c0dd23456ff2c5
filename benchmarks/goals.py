"""What a long text must cost at the most: whole attentions from their q, k and v on, forward and backward, each beside
what else a user would take, and how many times as fast it is to be.

The blocks run themselves, without their projections and rotations, as the peers have none: hierarchical is its window,
the means of blocks, the choice, the chosen blocks and the gates. Heads are NSA's, for the peers too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zoo
from benchmarks import peers
from benchmarks.inputs import LANDMARK_BLOCK, SPARSE_HEADS, WINDOW, shared_heads
from benchmarks.ops import BOTH, runner, time_those_that_run
from benchmarks.rows import DTYPES, Options, Row, Task, Work, make_row
from zoo import ops
from zoo.blocks import Mixer, SequenceContext

LENGTHS = {"cpu": 4096, "cuda": 65536, "quick": 160}
OWN = {"cpu": "torch", "cuda": "triton"}  # the backend that is ours, where the peer is another one of the zoo's
READ = 16  # blocks that a head of landmark reads, as many as hierarchical chooses


class Goal(NamedTuple):
    """`peer` is sdpa, dense flash attention, or flex, the same block on FlexAttention. Every tier of the mixer has keys
    and values of its own; of several, gates too."""

    mixer: dict[str, Any]
    tiers: int
    peer: str
    times: float


GOALS = {
    "hierarchical": Goal({"kind": "hierarchical", "window": WINDOW, "compress": "mean"}, 3, "sdpa", 4.0),
    "landmark": Goal({"kind": "landmark", "block_size": LANDMARK_BLOCK, "train_top_k": READ}, 1, "sdpa", 3.0),
    "window": Goal({"kind": "attention", "window": WINDOW}, 1, "flex", 1.0),
}


def plan(options: Options) -> list[Task]:
    return [
        Task(name, f"{name} beside {goal.peer} {dtype}", partial(measure, name, dtype, options))
        for name, goal in GOALS.items()
        for dtype in options.dtypes
    ]


def measure(name: str, dtype: str, options: Options) -> Row:
    goal, length = GOALS[name], LENGTHS[options.size]
    (heads, width), *_ = SPARSE_HEADS[options.size]
    kv_heads = shared_heads(heads)
    block = build(goal.mixer, heads, kv_heads, width)
    random = partial(torch.randn, 1, length, device=options.device, dtype=DTYPES[dtype])
    tensors = {"q": random(heads, width)}
    tensors |= {name: random(goal.tiers * kv_heads, width) for name in ("k", "v")}  # one tier behind the other
    if goal.tiers > 1:
        tensors["gate"] = random(goal.tiers, heads)
    if goal.peer == "flex":
        backend = OWN[torch.device(options.device).type]
        peer = peers.Call(partial(attend, block, "library"), tensors)
    else:
        backend = "auto"
        peer = peers.dense({name: tensors[name][:, :, : heads if name == "q" else kv_heads] for name in "qkv"}, False)
    calls = {"zoo": peers.Call(partial(attend, block, backend), tensors), goal.peer: peer}
    failed: dict[str, str] = {}
    timings = time_those_that_run({name: runner(BOTH, *call, ()) for name, call in calls.items()}, failed, options)
    shape = {"batch": 1, "length": length, "heads": heads, "kv_heads": kv_heads, "width": width}
    identity = {"what": name, "pass": BOTH, "dtype": dtype, "shape": shape}
    wanted = {"peer": goal.peer, "times": goal.times}
    return make_row(identity, timings, Work(length), options.peaks, ("zoo",), goal=wanted, failed=failed)


def build(mixer: dict[str, Any], heads: int, kv_heads: int, width: int) -> Mixer:
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width, "rope": None}
    model = {"vocab_size": 1, "hidden_size": 1, "blocks": {"b": {"mixer": mixer | sizes}}, "pattern": "b"}
    config = zoo.load_config(model)
    block = config.layers[0].mixer.build(config, 0)
    block.o_proj = nn.Identity()
    return block


class Given(nn.Module):
    """Stands for a projection that has been computed."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.flatten(2)


def attend(block: Mixer, backend: str, **tensors: Tensor) -> Tensor:
    """`[1, length, heads * width]`, of what the block's projections would give, by their names."""
    for name, tensor in tensors.items():
        setattr(block, f"{name}_proj", Given(tensor))
    x = tensors["q"].flatten(2)  # of which only the projections read the values
    with ops.backend(backend):
        return block(x, SequenceContext.of(x))


def verdict(row: Row) -> str:
    """One line: whether it is as fast as it should be."""
    peer, wanted, shape = row["goal"]["peer"], row["goal"]["times"], row["shape"]
    what = f"{row['what']} at {shape['length']:,} tokens, {row['pass']}"
    ratio = row["candidates"].get("zoo", {}).get("ratios", {}).get(peer)
    if ratio is None:
        return f"{what}: not compared with {peer}, {wanted:g} times as fast asked for: not shown"
    met = "met" if ratio >= wanted else "not met"
    return f"{what}: {ratio:.3g} times as fast as {peer}, {wanted:g} asked for: {met}"
