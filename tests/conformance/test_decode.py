import pytest
import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, gradients, inputs, probe

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
    chunks, whole = (chunked(model, x, sizes) for sizes in ([9, 1, 10], [20]))
    measure.gradients("chunks", gradients(model, probe(chunks), x), gradients(model, probe(whole), x), 1e-9)
