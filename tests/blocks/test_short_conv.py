"""The double-gated short convolution: against transformers' LFM2 layer, and token by token."""

import pytest
import torch
from transformers import DynamicCache, Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from tests.blocks.helpers import (
    assert_close,
    assert_parity,
    build_part,
    copy_weights,
    model_config,
    perturb,
    random_input,
    run_mixer,
)
from zoo.blocks import SequenceContext


def pair(kernel, bias):
    config = Lfm2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, layer_types=["conv"],
        conv_L_cache=kernel, conv_bias=bias, vocab_size=8,
    )  # fmt: skip
    reference = Lfm2ShortConv(config, 0)
    ours = build_part(
        model_config(hidden_size=12, mixer={"kind": "short_conv", "conv_kernel": kernel, "bias": bias}), "mixer"
    )
    weights = {name: name for name, _ in ours.named_parameters()}
    weights["conv.weight"] = ("conv.weight", lambda weight: weight.squeeze(1))
    return ours, reference, config, weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_equals_transformers(kernel, bias):
    ours, reference, _, weights = pair(kernel, bias)
    assert_parity(ours, run_mixer(ours), reference, lambda x: reference(x), weights, random_input(2, 19, 12))


def test_decodes_as_transformers_does():
    ours, reference, config, weights = pair(3, True)
    perturb(reference)
    copy_weights(ours, reference, weights)
    x, cache = random_input(2, 12, 12), DynamicCache(config=config)
    state = ours.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        whole = reference(x)
        outputs = []
        for chunk in x.split([5] + [1] * 7, dim=1):
            outputs.append(ours(chunk, SequenceContext.of(chunk), state))
            assert_close(outputs[-1], reference(chunk, cache))
    assert_close(torch.cat(outputs, 1), whole)


def test_equals_the_equation_in_float64():
    mixer = perturb(pair(3, True)[0].double())
    x = random_input(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        B, C, u = (x @ mixer.in_proj.weight.T + mixer.in_proj.bias).chunk(3, -1)
        rows = []
        for t in range(9):
            past = [(B * u)[:, t - 2 + w] * mixer.conv.weight[:, w] for w in range(3) if t - 2 + w >= 0]
            rows.append(C[:, t] * (sum(past) + mixer.conv.bias))
        expected = torch.stack(rows, 1) @ mixer.out_proj.weight.T + mixer.out_proj.bias
        assert_close(run_mixer(mixer)(x), expected)


def test_the_state_holds_kernel_minus_one_inputs():
    config = model_config(hidden_size=12, mixer={"kind": "short_conv"})
    assert config.layers[0].mixer.config.conv_kernel == 3
    mixer = build_part(config)
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert state["conv"].shape == (3, 12, 2) and state["conv"].dtype == torch.float32
    assert state.nbytes() == mixer.state_bytes(3, 1000)
