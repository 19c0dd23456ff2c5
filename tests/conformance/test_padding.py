import pytest
import torch
from torch import Tensor

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, gradients, inputs, probe

LENGTH = 24
GARBAGE = 1e4

# For each row, where its real tokens stand. A row of 23 leading pads is nothing but padding in its first chunks, one of
# 2 tokens in its last ones; a prompt padded on the right that then generates has padding in between.
MASKS = {
    "left": [range(LENGTH), range(9, LENGTH), range(LENGTH - 1, LENGTH)],
    "right": [range(LENGTH), range(13), range(2)],
    "between": [range(LENGTH), [*range(5), *range(14, LENGTH)], [*range(2, 7), *range(16, LENGTH)]],
    "everywhere": [range(3, 15), [0, 1, 2, 9, 11, 20], range(0)],
}
SIZES = {"whole": [LENGTH], "chunks": [8, 7, 1, 2, 1, 1, 1, 1, 1, 1]}


def padded(name: str) -> tuple[Tensor, Tensor]:
    """Embeddings with garbage at the padding, and the mask."""
    mask = torch.zeros(len(MASKS[name]), LENGTH, dtype=torch.bool)
    for row, real in enumerate(MASKS[name]):
        mask[row, list(real)] = True
    x = inputs(*mask.shape)
    return torch.where(mask[..., None], x, GARBAGE * x), mask


def alone(model, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's outputs without its padding."""
    return [forward(model, row[real][None])[0] for row, real in zip(x, mask, strict=True) if real.any()]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_padded_rows_equal_each_alone(subject: str, side: str, sizes: str, measure: Measure) -> None:
    model, (x, mask) = build(subject), padded(side)
    x.requires_grad_()
    out = chunked(model, x, SIZES[sizes], mask=mask)[mask]
    ref = torch.cat(alone(model, x, mask))
    measure(f"{side}, {sizes}", out, ref, 1e-9)
    got, wanted = gradients(model, probe(out), x), gradients(model, probe(ref), x)
    assert not got["input"][~mask].any(), "padding gets a gradient"
    measure.gradients(f"{side}, {sizes}", got, wanted, 1e-8)


@torch.no_grad()
@pytest.mark.parametrize("side", MASKS)
def test_without_a_cache(subject: str, side: str, measure: Measure) -> None:
    model, (x, mask) = build(subject), padded(side)
    out = forward(model, x, attention_mask=mask.long())
    measure(side, out[mask], torch.cat(alone(model, x, mask)), 1e-9)


@torch.no_grad()
def test_decode_goes_on_after_a_padded_prompt(subject: str, measure: Measure) -> None:
    """As generate() does: a padded prompt, then tokens that are all real."""
    model = build(subject)
    for side in ("left", "right"):
        x, mask = padded(side)
        x, mask = torch.cat([x, inputs(3, 6, seed=3)], 1), torch.cat([mask, mask.new_ones(3, 6)], 1)
        out = chunked(model, x, [LENGTH] + [1] * 6, mask=mask)
        measure(side, out[mask], torch.cat(alone(model, x, mask)), 1e-9)


@torch.no_grad()
def test_a_chunk_of_nothing_but_padding(subject: str, measure: Measure) -> None:
    """A prompt padded to a multiple of the chunk."""
    model, x = build(subject), inputs(1, 12)
    mask = torch.arange(12)[None] >= 9
    out = chunked(model, x, [4, 4, 4], mask=mask)
    assert out.isfinite().all()
    measure("only padding", out[mask], torch.cat(alone(model, x, mask)), 1e-9)
