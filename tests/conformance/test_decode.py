import pytest
import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, inputs

LENGTH = 72  # over the chunk of every op and far over the windows
SIZES = {
    "whole": [LENGTH],
    "prefill, then tokens": [65] + [1] * 7,
    "tokens only": [1] * LENGTH,
    "uneven, then tokens": [1, 2, 3, 1, 5, 7, 11, 13, 17] + [1] * 12,
}


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_chunks_and_single_tokens_equal_one_forward(subject: str, sizes: str, measure: Measure) -> None:
    model, x = build(subject), inputs(2, LENGTH)
    measure(sizes, chunked(model, x, SIZES[sizes]), forward(model, x), 1e-10)


def test_gradients_flow_from_chunk_to_chunk(subject: str, measure: Measure) -> None:
    model, x = build(subject), inputs(2, 20).requires_grad_()
    whole = gradients_of(model, x, [20])
    measure.gradients("chunks", gradients_of(model, x, [9, 1, 10]), whole, 1e-9)


def gradients_of(model, x, sizes):
    from tests.conformance.runs import gradients, probe

    return gradients(model, probe(chunked(model, x, sizes)), x)
