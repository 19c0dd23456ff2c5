"""Arguments of each op at the shapes that are measured, and the least work that they ask for.

Decays, rates and states are float32, as in the models; the rest is of the row's dtype. The floor counts what the
recurrence or the definition needs, not what a chunked algorithm spends: multiplications and additions, and every input
read and every output written once (backward: inputs read again, their gradients written, the output's read).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.rows import DTYPES, Options, Work
from zoo import ops
from zoo.ops.softmax_attention import Pattern

STATE_SIZE, TAPS, EPS = 16, 4, 1e-6
SEGMENT = 2048  # of Infini-attention
CACHED = {"cpu": 4096, "cuda": 32768, "quick": 32}  # keys that one token attends to
HEADS = {"cpu": ((4, 64), (8, 128)), "cuda": ((32, 64), (16, 128), (8, 256)), "quick": ((2, 16),)}
CHANNELS = {"cpu": (512, 1536), "cuda": (2048, 4096), "quick": (32,)}
WINDOW, SINKS, SOFTCAP = 512, 4, 30.0
# NSA's compressed and chosen tiers, one shape for their three ops, so that their rows add up.
SPARSE = ("interval_attention", "select_blocks", "block_sparse_attention")
SPARSE_HEADS = HEADS | {"cuda": ((64, 128),)}
CHOSEN_BLOCK, FEW = 64, 4  # keys in a block to choose, and where there are no more than one such
CHOSEN, SHARED = 16, 16  # blocks of a query, and query heads that choose together
VARIANTS = {
    "linear_attention": ("per head", "per token"),  # Lightning's decay, one group per head; Mamba-2's, one group
    "selective_scan": (None,),
    "causal_conv1d": (None,),
    "gated_rms_norm": ("gate first", "norm first"),  # Mamba-2's with SiLU, Lightning's with a sigmoid
    "block_sparse_attention": (None,),  # NSA's blocks, at random but for the first and the last two
    "select_blocks": (None,),  # the choice of such, with the log-sum-exp that the compressed tier gives
    "softmax_attention": (None, "window", "sinks", "strided+random", "softcap"),  # as the op tells its kinds apart
    "interval_attention": (None,),  # to blocks that end before the query, the compressed tier of NSA
    "landmark_attention": (None, "top_k"),
    "infini_attention": ("linear", "delta"),
}
LANDMARK_BLOCK, LANDMARK_TOP_K = 63, 4  # with the landmark, 64 tokens


class Case(NamedTuple):
    """`width` is the last dimension of the op's first argument: head_dim, or all the channels."""

    op: str
    variant: str | None
    heads: int
    width: int


class Shape(NamedTuple):
    batch: int
    length: int
    decode: bool = False  # from a state; of attention, against `keys` keys
    keys: int = 0


class Inputs(NamedTuple):
    """`tensors` and `fixed` are our op's arguments; only tensors get gradients. `flops` is the forward pass's."""

    tensors: dict[str, Tensor]
    fixed: dict[str, Any]
    flops: int


def cases(size: str) -> list[Case]:
    return [
        Case(op, variant, *shape)
        for op, variants in VARIANTS.items()
        for variant in variants
        for shape in _shapes(op, size)
    ]


def _shapes(op: str, size: str) -> tuple[tuple[int, int], ...]:
    """Heads and width."""
    if op in SPARSE:
        return SPARSE_HEADS[size]
    return HEADS[size] if op.endswith("attention") else tuple((1, width) for width in CHANNELS[size])


def shared_heads(heads: int) -> int:
    """Key heads of the sparse tiers."""
    return max(1, heads // SHARED)


def chosen_block(keys: int) -> int:
    """Keys in a block to choose."""
    return CHOSEN_BLOCK if keys > CHOSEN_BLOCK else FEW


def make_inputs(case: Case, shape: Shape, dtype: str, options: Options) -> Inputs:
    """Random arguments of our op."""
    random = partial(torch.randn, device=options.device, dtype=DTYPES[dtype])
    wide = partial(torch.randn, device=options.device)
    tensors, fixed, flops = _makers[case.op](case, shape, random, wide)
    return Inputs(tensors, fixed | ({"return_state": True} if "initial_state" in tensors else {}), flops)


def floor(case: Case, shape: Shape, dtype: str, inputs: Inputs, backward: bool) -> Work:
    """The least that the call must do."""
    tokens = shape.batch * shape.length
    given = sum(tensor.nbytes for tensor in inputs.tensors.values())
    made = tokens * case.heads * case.width * DTYPES[dtype].itemsize
    if case.op == "select_blocks":
        made = tokens * shared_heads(case.heads) * CHOSEN * torch.int64.itemsize
    if "initial_state" in inputs.tensors:
        made += inputs.tensors["initial_state"].nbytes
    if backward:
        return Work(tokens, 3 * inputs.flops, 3 * given + 2 * made)
    return Work(tokens, inputs.flops, given + made)


Made = tuple[dict[str, Tensor], dict[str, Any], int]
Random = Callable[..., Tensor]


def _linear_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, heads, width = shape.batch, shape.length, case.heads, case.width
    groups = heads if case.variant == "per head" else 1
    tensors = {
        "q": random(batch, length, groups, width) * width**-0.5,
        "k": random(batch, length, groups, width),
        "v": random(batch, length, heads, width),
        "log_decay": -softplus(wide(heads) if case.variant == "per head" else wide(batch, length, heads)),
    }
    if shape.decode:
        tensors["initial_state"] = wide(batch, heads, width, width)
    return tensors, {}, 4 * batch * length * heads * width**2


def _selective_scan(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, channels = shape.batch, shape.length, case.width
    rates = -torch.arange(1.0, STATE_SIZE + 1).expand(channels, -1)
    tensors = {
        "u": random(batch, length, channels),
        "delta": softplus(wide(batch, length, channels) - 4),
        "A": wide(channels, STATE_SIZE).copy_(rates),
        "B": random(batch, length, STATE_SIZE),
        "C": random(batch, length, STATE_SIZE),
        "D": wide(channels),
    }
    if shape.decode:
        tensors["initial_state"] = wide(batch, channels, STATE_SIZE)
    # For each state: delta A, its exponential, B (delta u), a h + x, and C h.
    return tensors, {}, 7 * batch * length * channels * STATE_SIZE


def _causal_conv1d(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, channels = shape.batch, shape.length, case.width
    tensors = {
        "x": random(batch, length, channels),
        "weight": random(channels, TAPS) / math.sqrt(TAPS),
        "bias": random(channels),
    }
    if shape.decode:
        tensors["initial_state"] = wide(batch, channels, TAPS - 1)
    return tensors, {"activation": "silu"}, 2 * batch * length * channels * TAPS


def _gated_rms_norm(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, channels = shape.batch, shape.length, case.width
    tensors = {name: random(batch, length, channels) for name in ("x", "gate")} | {"weight": random(channels)}
    first = case.variant == "gate first"
    fixed = {"gate_first": first, "activation": "silu" if first else "sigmoid", "eps": EPS}
    # x * gate, its square, their sum, times the root, times the weight.
    return tensors, fixed, 5 * batch * length * channels


def _softmax_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, heads, width = shape.batch, shape.length, case.heads, case.width
    keys = shape.keys or length
    tensors = {"q": random(batch, length, heads, width)}
    tensors |= {name: random(batch, keys, max(1, heads // 2), width) for name in ("k", "v")}
    window, pattern = min(WINDOW, max(1, keys // 4)), Pattern()
    fixed: dict[str, Any] = {}
    if case.variant in ("window", "sinks", "strided+random"):
        pattern = Pattern(window, num_sinks=SINKS if case.variant == "sinks" else 0)
        if case.variant == "strided+random":
            block = max(1, window // 8)
            pattern = Pattern(window, stride=block, random_blocks=3, block_size=block)
        fixed["pattern"] = pattern
    if case.variant == "softcap":
        fixed["softcap"] = SOFTCAP
    pairs = pattern.visible_pairs(keys) - pattern.visible_pairs(keys - length)  # of a query and a key that it sees
    return tensors, fixed, 4 * batch * pairs * heads * width


def _interval_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    """As many keys as the text has compressed blocks, NSA's: half as long as those to choose, begun every quarter."""
    batch, length, heads, width = shape.batch, shape.length, case.heads, case.width
    keys = shape.keys or length
    block, stride = chosen_block(keys) // 2, chosen_block(keys) // 4
    tensors = {"q": random(batch, length, heads, width)}
    compressed = max(1, (keys - block + stride) // stride)
    tensors |= {name: random(batch, compressed, shared_heads(heads), width) for name in ("k", "v")}
    position = torch.arange(keys - length, keys, device=tensors["q"].device)
    stop = ((position + 1 - block + stride) // stride).clamp(min=0)
    fixed = {name: bound.expand(batch, -1) for name, bound in (("first", 0 * stop), ("stop", stop))}
    return tensors, fixed, 4 * batch * int(stop.sum()) * heads * width


def _select_blocks(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    tensors, within, flops = _interval_attention(case, shape, random, wide)
    with torch.no_grad():
        _, lse = ops.interval_attention(**tensors, **within, return_lse=True)
    keys = shape.keys or shape.length
    size = chosen_block(keys)
    position = torch.arange(keys - shape.length, keys, device=lse.device).expand(shape.batch, -1)
    fixed = {"first": within["first"], "position": position, "lse": lse, "top_n": CHOSEN}
    fixed |= {"compress_block": size // 2, "compress_stride": size // 4, "select_block": size}
    return {name: tensors[name] for name in ("q", "k")}, fixed, flops // 2  # no values


def _landmark_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    tensors, _, _ = _softmax_attention(case, shape, random, wide)
    batch, length, keys = shape.batch, shape.length, tensors["k"].shape[1]
    block = torch.arange(keys, device=tensors["k"].device) // (LANDMARK_BLOCK + 1)
    is_landmark = torch.arange(1, keys + 1, device=block.device) % (LANDMARK_BLOCK + 1) == 0
    fixed: dict[str, Any] = {"is_landmark": is_landmark.expand(batch, keys)}
    before = block[keys - length :]  # of each query
    read = before
    if case.variant == "top_k":
        fixed["top_k"] = LANDMARK_TOP_K
        read = before.clamp(max=LANDMARK_TOP_K)
    own = torch.arange(keys - length, keys, device=block.device) % (LANDMARK_BLOCK + 1) + 1
    # A product for each landmark, and two for each key that is read.
    products = int((before + 2 * (read * LANDMARK_BLOCK + own)).sum())
    return tensors, fixed, 2 * batch * products * case.heads * case.width


def _block_sparse_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    batch, length, heads, width = shape.batch, shape.length, case.heads, case.width
    keys, kv_heads = shape.keys or length, shared_heads(heads)
    tensors = {"q": random(batch, length, heads, width)}
    tensors |= {name: random(batch, keys, kv_heads, width) for name in ("k", "v")}
    size = chosen_block(keys)
    position = torch.arange(keys - length, keys, device=tensors["q"].device)[:, None, None]
    own = (position // size).expand(batch, -1, kv_heads, -1)
    others = (torch.rand(batch, length, kv_heads, CHOSEN - 3, device=own.device) * (own + 1)).long()
    blocks = torch.cat([0 * own, (own - 1).clamp(min=0), own, others], -1).sort(-1).values
    blocks[..., 1:].masked_fill_(blocks[..., 1:] == blocks[..., :-1], -1)
    seen = (position + 1 - blocks * size).clamp(max=size).masked_fill(blocks < 0, 0)
    fixed = {"block_indices": blocks, "block_size": size}
    return tensors, fixed, 4 * int(seen.sum()) * (heads // kv_heads) * width


def _infini_attention(case: Case, shape: Shape, random: Random, wide: Random) -> Made:
    """Segments as long as the paper's, or of a sixteenth of a short text."""
    batch, length, heads, width = shape.batch, shape.length, case.heads, case.width
    kv_heads, segment = max(1, heads // 2), max(1, min(SEGMENT, length // 16))
    tensors = {"q": random(batch, length, heads, width)}
    tensors |= {name: random(batch, length, kv_heads, width) for name in ("k", "v")}
    tensors |= {"gate": wide(heads)}
    complete, rest = divmod(length, segment)
    pairs = complete * (segment * (segment + 1) // 2) + rest * (rest + 1) // 2
    products = max(0, length - segment) * heads + complete * segment * kv_heads  # of a vector with M
    if case.variant == "delta":
        products += max(0, complete - 1) * segment * kv_heads
    flops = 4 * batch * pairs * heads * width + 2 * batch * products * width**2
    return tensors, {"segment": segment, "update": case.variant}, flops


_makers: dict[str, Callable[[Case, Shape, Random, Random], Made]] = {
    "linear_attention": _linear_attention,
    "selective_scan": _selective_scan,
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
    "block_sparse_attention": _block_sparse_attention,
    "select_blocks": _select_blocks,
    "softmax_attention": _softmax_attention,
    "interval_attention": _interval_attention,
    "landmark_attention": _landmark_attention,
    "infini_attention": _infini_attention,
}
