"""Projections initialise as they say."""

import math

import pytest
import torch

from tests.blocks.helpers import model_config
from zoo.blocks.linear import DepthwiseConv, Embedding, Linear, in_projection, out_projection


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_normal_weights_and_zero_bias(std):
    torch.manual_seed(0)
    for module in (Linear(200, 100, std=std, bias=True), Embedding(200, 100, std=std)):
        for _ in range(2):
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.05 * std
            module.weight.data.fill_(torch.nan)
            module.reset_parameters()
    linear = Linear(200, 100, std=std, bias=True)
    assert torch.equal(linear.bias, torch.zeros(100))
    assert Linear(3, 4, std=std).bias is None


def test_what_writes_to_the_stream_starts_smaller():
    torch.manual_seed(0)
    config = model_config(
        hidden_size=100, mixer={"kind": "attention", "num_heads": 2}, num_layers=8, initializer_range=0.5
    )
    assert in_projection(config, 100, 300).weight.std().item() == pytest.approx(0.5, rel=0.05)
    out = out_projection(config, 300, bias=True)
    assert out.weight.shape == (100, 300) and out.bias is not None
    assert out.weight.std().item() == pytest.approx(0.5 / math.sqrt(16), rel=0.05)


def test_conv_starts_as_torchs():
    torch.manual_seed(0)
    ours, theirs = DepthwiseConv(2000, 4), torch.nn.Conv1d(2000, 2000, 4, groups=2000)
    for mine, other in ((ours.weight, theirs.weight.squeeze(1)), (ours.bias, theirs.bias)):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)
        assert mine.abs().max().item() == pytest.approx(0.5, rel=0.01)
