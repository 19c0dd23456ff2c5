"""Every kind of mixer beside every other: what one may break for the other, each stack built once.

Outputs are compared with those of whole rows in one forward pass. As no output depends on a later token, which comes
first, every prefix of a row is a text of its own: padded rows and packed documents are such prefixes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, gradients, inputs, probe
from zoo.models import ZooModel

LENGTH = 38  # over the windows, segments and blocks of every setting
SIZES = [1, 7, 2, 11, 5]  # then a token at a time
PACKED = [(0, 1), (1, 23), (2, LENGTH), (0, 6)]  # row, and how many of its tokens
# Where the tokens of each row stand: on the right, on the left, in two pieces.
PADDED = [range(9, LENGTH), range(17), [*range(2, 8), *range(21, LENGTH)]]


def test_pairs(pair: str, measure: Measure) -> None:
    model, x = build(pair), inputs(3, LENGTH).requires_grad_()
    whole = forward(model, x)
    with torch.no_grad():
        check_alone(model, x, measure)
        check_causal(model, x, whole, measure)
        check_states(model, x, whole, measure)
    cu_seqlens = torch.tensor([0, *(length for _, length in PACKED)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = forward(model, torch.cat([x[row, :length] for row, length in PACKED])[None], cu_seqlens=cu_seqlens)[0]
    packed_ref = torch.cat([whole[row, :length] for row, length in PACKED])
    measure("packed", packed, packed_ref, 1e-10)
    spread, mask = pad(x)
    padded = forward(model, spread, attention_mask=mask)[mask]
    padded_ref = torch.cat([row[: len(real)] for row, real in zip(whole, PADDED, strict=True)])
    measure("padded", padded, padded_ref, 1e-10)
    losses = (probe(torch.cat(outs)) for outs in ((packed, padded), (packed_ref, padded_ref)))
    measure.gradients("packed and padded", *(gradients(model, loss, x) for loss in losses), 1e-9)
    with torch.no_grad():
        chunks = chunked(model, spread, [*SIZES, *[1] * (LENGTH - sum(SIZES))], mask=mask)[mask]
    measure("padded, in chunks", chunks, padded_ref, 1e-9)


def check_alone(model: ZooModel, x: Tensor, measure: Measure) -> None:
    """Each layer by itself: what layers share (rotations) would be wrong everywhere alike."""
    calls: list[tuple] = []
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in model.layers]
    forward(model, x)
    for hook in hooks:
        hook.remove()
    for layer, (given, context, *_), (out, *_) in calls:
        measure("a layer by itself", out, layer(given, replace(context, rotations={}))[0], 1e-12)


def check_causal(model: ZooModel, x: Tensor, whole: Tensor, measure: Measure) -> None:
    t = 19
    changed = torch.cat([x[:, :t], -x[:, t:]], 1)
    after = forward(model, changed)
    measure(f"outputs before token {t}", after[:, :t], whole[:, :t], 1e-12)
    assert ((after[:, t] - whole[:, t]).norm(dim=-1) > 1e-3).all(), f"token {t} does not reach its own output"


def check_states(model: ZooModel, x: Tensor, whole: Tensor, measure: Measure) -> None:
    """A prompt in odd chunks, then token by token, with the rows in another order and again in another."""
    start, cache = sum(SIZES), model.new_cache(3, x.device, x.dtype)
    measure("chunks", chunked(model, x[:, :start], SIZES, cache), whole[:, :start], 1e-10)
    rows = torch.arange(3)
    for order in ([2, 0, 0], [1, 2, 0]):
        cache.reorder_cache(torch.tensor(order))
        rows = rows[order]
        tokens = chunked(model, x[rows, start : start + 6], [1] * 6, cache)
        measure(f"tokens after {order}", tokens, whole[rows, start : start + 6], 1e-10)
        start += 6


def pad(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first tokens of each row of x where PADDED says, with garbage between them, and the mask."""
    padded, mask = 1e3 * inputs(*x.shape[:2], seed=5), torch.zeros(x.shape[:2], dtype=torch.bool)
    for i, real in enumerate(PADDED):
        mask[i, list(real)] = True
        padded[i, list(real)] = x[i, : len(real)]
    return padded, mask
