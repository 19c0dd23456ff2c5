"""Mamba-1 against transformers' MambaMixer, and with inner norms against JambaMambaMixer."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

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

WEIGHTS = {
    "in_proj.weight": "in_proj.weight",
    "conv.weight": ("conv1d.weight", lambda weight: weight.squeeze(1)),
    "conv.bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}
INNER_NORMS = {f"inner_norms.{i}.weight": f"{name}_layernorm.weight" for i, name in enumerate(("dt", "b", "c"))}


def mamba(hidden, state_size, kernel, dt_rank, expand):
    config = MambaConfig(
        hidden_size=hidden,
        state_size=state_size,
        conv_kernel=kernel,
        time_step_rank=dt_rank,
        expand=expand,
        num_hidden_layers=1,
    )
    return MambaMixer(config, 0), config, WEIGHTS


def jamba(hidden, state_size, kernel, dt_rank, expand):
    config = JambaConfig(
        hidden_size=hidden,
        mamba_d_state=state_size,
        mamba_d_conv=kernel,
        mamba_dt_rank=dt_rank,
        mamba_expand=expand,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        rms_norm_eps=1e-2,
    )
    return JambaMambaMixer(config, 0), config, WEIGHTS | INNER_NORMS


def ours(hidden, state_size, kernel, dt_rank, expand, inner_norms):
    mixer = {
        "kind": "mamba",
        "intermediate_size": expand * hidden,
        "state_size": state_size,
        "conv_kernel": kernel,
        "dt_rank": dt_rank,
        "inner_norms": inner_norms,
    }
    return build_part(model_config(hidden_size=hidden, mixer=mixer, norm={"eps": 1e-2}))


SIZES = [(16, 8, 4, 1, 2), (12, 3, 2, 5, 3), (10, 16, 3, 2, 1)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("theirs", [mamba, jamba])
def test_equals_transformers(theirs, sizes):
    reference, _, weights = theirs(*sizes)
    mixer = ours(*sizes, inner_norms=theirs is jamba)
    x = random_input(2, 41, sizes[0])
    assert_parity(mixer, run_mixer(mixer), reference, lambda x: reference(x), weights, x)


@pytest.mark.parametrize("theirs", [mamba, jamba])
def test_decodes_as_transformers_does(theirs):
    reference, config, weights = theirs(*SIZES[0])
    mixer = ours(*SIZES[0], inner_norms=theirs is jamba)
    perturb(reference)
    copy_weights(mixer, reference, weights)
    x, cache = random_input(2, 20, 16), DynamicCache(config=config)
    state = mixer.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        whole = reference(x)
        outputs = []
        for chunk in x.split([11] + [1] * 9, dim=1):
            outputs.append(mixer(chunk, SequenceContext.of(chunk), state))
            assert_close(outputs[-1], reference(chunk, cache))
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(state["h"], cache.get_recurrent_state(0), "state")


def test_equals_the_recurrence_in_float64():
    """Algorithm 2 of the paper, token by token."""
    mixer = perturb(ours(6, 4, 3, 2, 2, inner_norms=False).double())
    x = random_input(2, 17, 6, dtype=torch.float64)
    with torch.no_grad():
        u, z = (x @ mixer.in_proj.weight.T).chunk(2, -1)
        padded = F.pad(u, (0, 0, 2, 0))
        u = F.silu(sum(padded[:, w : w + 17] * mixer.conv.weight[:, w] for w in range(3)) + mixer.conv.bias)
        dt, B, C = (u @ mixer.x_proj.weight.T).split([2, 4, 4], -1)
        delta = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_bias.double())
        h, rows = x.new_zeros(2, 12, 4), []
        for t in range(17):
            h = torch.exp(delta[:, t, :, None] * -mixer.A_log.double().exp()) * h
            h = h + delta[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
            rows.append((h * C[:, t, None]).sum(-1) + mixer.D.double() * u[:, t])
        reference = (torch.stack(rows, 1) * F.silu(z)) @ mixer.out_proj.weight.T
        assert_close(run_mixer(mixer)(x), reference)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    mixer = ours(16, 8, 4, 4, 128, inner_norms=True)  # 2048 channels
    steps = F.softplus(mixer.dt_bias)
    assert 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1
    assert steps.log().mean().item() == pytest.approx((math.log(1e-3) + math.log(1e-1)) / 2, abs=0.1)
    assert_close(-mixer.A_log.exp(), -torch.arange(1, 9).float().expand(2048, 8))
    assert torch.equal(mixer.D, torch.ones(2048))


@pytest.mark.parametrize("inner_norms", [False, True])
def test_default_sizes(inner_norms):
    config = model_config(hidden_size=24, mixer={"kind": "mamba", "inner_norms": inner_norms})
    resolved = config.layers[0].mixer.config
    assert (resolved.intermediate_size, resolved.dt_rank, resolved.state_size, resolved.conv_kernel) == (48, 2, 16, 4)
    mixer = build_part(config)
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert state.nbytes() == mixer.state_bytes(3, 1000)
