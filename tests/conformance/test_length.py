import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, forward, inputs
from zoo import ops

# 1, primes, around the chunks of the ops (64; attention takes up to 256 queries at a time), several chunks.
LENGTHS = (1, 2, 3, 31, 61, 63, 64, 65, 127, 128, 129, 191, 256, 257)


@torch.no_grad()
def test_any_length_equals_the_reference(subject: str, measure: Measure) -> None:
    model, x = build(subject), inputs(1, max(LENGTHS))
    with ops.backend("reference"):
        reference = forward(model, x)  # causal: its beginning is the reference of every shorter length
    for length in LENGTHS:
        measure(f"length {length}", forward(model, x[:, :length]), reference[:, :length], 1e-9)
