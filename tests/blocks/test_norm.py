"""Norms against transformers' (Llama's, Gemma's) and torch's."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.blocks.helpers import TOLERANCE, assert_close, assert_parity, perturb, random_input
from zoo.blocks.norm import Norm, NormConfig

REFERENCES = {
    "rms": (NormConfig(eps=0.1), lambda: LlamaRMSNorm(12, eps=0.1)),
    "zero_centered": (NormConfig(eps=0.1, zero_centered=True), lambda: GemmaRMSNorm(12, eps=0.1)),
    "layer": (NormConfig(kind="layer", eps=0.1), lambda: torch.nn.LayerNorm(12, eps=0.1)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_others(name):
    config, reference = REFERENCES[name]
    theirs, ours = reference(), Norm(12, config)
    weights = {"weight": "weight"} | ({"bias": "bias"} if name == "layer" else {})
    assert_parity(ours, ours, theirs, theirs, weights, 3 + random_input(2, 5, 12))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_formula(kind, zero_centered, dtype):
    norm = perturb(Norm(12, NormConfig(kind=kind, eps=0.3, zero_centered=zero_centered))).to(dtype)
    x = 2 + random_input(2, 5, 12, dtype=dtype)
    scale = norm.weight + 1 if zero_centered else norm.weight
    if kind == "rms":
        reference = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.3) * scale
    else:
        centred = x - x.mean(-1, keepdim=True)
        reference = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 0.3) * scale + norm.bias
    assert_close(norm(x), reference)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_starts_as_the_plain_norm(kind, zero_centered):
    norm = Norm(12, NormConfig(kind=kind, zero_centered=zero_centered))
    y = norm(random_input(1, 50, 12))
    assert_close(y.square().mean(-1), torch.ones(1, 50), tolerance=1e-4)


def test_bfloat16_is_computed_in_float32():
    """Sums of squares beyond bfloat16's precision do not hurt."""
    norm = perturb(Norm(4096, NormConfig()))
    x = 100 + random_input(2, 4096)
    rounded = x.bfloat16()
    assert_close(norm(rounded).float(), norm(rounded.float()), tolerance=4e-3)
    assert norm(rounded).dtype == torch.bfloat16
