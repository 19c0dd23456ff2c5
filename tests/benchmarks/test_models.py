"""Ours and the peers' models are the same size, the sizes that the issue names."""

import pytest
import torch

import zoo
from benchmarks.length import STACKS
from benchmarks.models import LAYERS, families, parameters, stacks

MILLIONS = {"jamba": 11.4, "mamba2": 3.7, "minimax": 15.3, "llama": 6.6}


@pytest.mark.parametrize("hidden", [32, 256])
@pytest.mark.parametrize("name", MILLIONS)
def test_both_sides_have_the_same_parameters(name, hidden):
    family = families(hidden)[name]
    with torch.device("meta"):
        ours, theirs = zoo.build(family.ours), family.theirs()
    assert parameters(ours) == parameters(theirs)
    assert ours.config.num_hidden_layers == theirs.config.num_hidden_layers == LAYERS
    if hidden == 256:
        assert round(parameters(ours) / 1e6, 1) == MILLIONS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_both_sides_have_the_same_layers_in_the_same_order(name):
    """By the shapes of their weights, whatever the names."""
    family = families(32)[name]
    with torch.device("meta"):
        ours, theirs = zoo.build(family.ours).model, family.theirs().base_model
    for i, layers in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        shapes = [sorted(tuple(p.squeeze().shape) for p in layer.parameters()) for layer in layers]
        assert shapes[0] == shapes[1], i


def test_every_stack_is_recurrent_alone():
    for name in STACKS:
        model = zoo.build(stacks(32)[name])
        assert model.state_bytes(1, 10) == model.state_bytes(1, 1000), name
