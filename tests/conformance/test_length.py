import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, forward, gradients, inputs, probe
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


def test_the_shortest_text_gives_every_parameter_a_gradient(subject: str) -> None:
    """If only of 0: data parallel training waits for each of them."""
    model, x = build(subject), inputs(1, 1)
    missing = [name for name, gradient in gradients(model, probe(forward(model, x))).items() if gradient is None]
    assert not missing
