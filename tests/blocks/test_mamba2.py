"""Mamba-2 against transformers' Mamba2Mixer, and against the recurrence it stands for."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, FalconH1Config, Mamba2Config
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

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
from zoo import ConfigError
from zoo.blocks import SequenceContext

WEIGHTS = {
    "in_proj.weight": "in_proj.weight",
    "conv.weight": ("conv1d.weight", lambda weight: weight.squeeze(1)),
    "conv.bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm_weight": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}


def transformers_mixer(hidden, num_heads, head_dim, state_size, num_groups, kernel):
    config = Mamba2Config(
        hidden_size=hidden,
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=state_size,
        n_groups=num_groups,
        conv_kernel=kernel,
        expand=num_heads * head_dim // hidden,
        chunk_size=16,
        layer_norm_epsilon=1e-2,
        num_hidden_layers=1,
    )
    return Mamba2Mixer(config, 0), config


def ours(hidden, num_heads, head_dim, state_size, num_groups, kernel, **options):
    mixer = {
        "kind": "mamba2",
        "num_heads": num_heads,
        "head_dim": head_dim,
        "state_size": state_size,
        "num_groups": num_groups,
        "conv_kernel": kernel,
        **options,
    }
    return build_part(model_config(hidden_size=hidden, mixer=mixer, norm={"eps": 1e-2}))


SIZES = [(16, 4, 8, 8, 1, 4), (16, 4, 8, 8, 2, 4), (12, 6, 4, 5, 3, 2), (8, 8, 4, 16, 8, 3), (12, 3, 4, 6, 1, 4)]


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_transformers(sizes):
    theirs, _ = transformers_mixer(*sizes)
    mixer = ours(*sizes)
    x = random_input(2, 41, sizes[0])
    assert_parity(mixer, run_mixer(mixer), theirs, lambda x: theirs(x), WEIGHTS, x)


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_decodes_as_transformers_does(sizes):
    theirs, config = transformers_mixer(*sizes)
    mixer = ours(*sizes)
    perturb(theirs)
    copy_weights(mixer, theirs, WEIGHTS)
    x, cache = random_input(2, 20, 16), DynamicCache(config=config)
    state = mixer.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for chunk in x.split([11] + [1] * 9, dim=1):
            assert_close(mixer(chunk, SequenceContext.of(chunk), state), theirs(chunk, cache))
    assert_close(state["S"].transpose(2, 3), cache.get_recurrent_state(0), "state")


@pytest.mark.parametrize("norm", ["gate_first", "norm_first", "none"])
@pytest.mark.parametrize("multipliers", [None, [0.5, 1.5, 0.7, 1.3, 2.5]])
def test_equals_falcon_h1(norm, multipliers):
    """With the norm behind the gate, before it, or absent, and the parts of the projection multiplied."""
    hidden, num_heads, head_dim, state_size, num_groups, kernel = SIZES[2]
    config = FalconH1Config(
        hidden_size=hidden,
        mamba_d_ssm=num_heads * head_dim,
        mamba_n_heads=num_heads,
        mamba_d_head=head_dim,
        mamba_n_groups=num_groups,
        mamba_d_state=state_size,
        mamba_d_conv=kernel,
        mamba_chunk_size=16,
        mamba_rms_norm=norm != "none",
        mamba_norm_before_gate=norm == "norm_first",
        ssm_multipliers=multipliers,
        rms_norm_eps=1e-2,
        num_hidden_layers=1,
    )
    theirs = FalconH1Mixer(config, 0)
    theirs.register_buffer("mup_vector", compute_mup_vector(config))
    mixer = ours(*SIZES[2], norm=norm, multipliers=multipliers)
    weights = {name: their for name, their in WEIGHTS.items() if norm != "none" or name != "norm_weight"}
    assert_parity(mixer, run_mixer(mixer), theirs, lambda x: theirs(x), weights, random_input(2, 41, hidden))


def test_multipliers_are_float32_and_never_saved():
    mixer = ours(*SIZES[2], multipliers=[0.1, 0.2, 0.3, 0.4, 0.5])
    factors = torch.tensor([0.1] * 24 + [0.2] * 24 + [0.3] * 15 + [0.4] * 15 + [0.5] * 6)
    assert torch.equal(mixer.multiply.factors, factors) and not any("factors" in name for name in mixer.state_dict())
    assert torch.equal(mixer.bfloat16().multiply.factors, factors)
    with pytest.raises(ConfigError, match=r"multipliers: must be five numbers, for z, x, B, C and dt, got 4"):
        ours(*SIZES[2], multipliers=[1, 1, 1, 1])


def test_equals_the_recurrence_in_float64():
    """Any width (30 here, of a hidden size of 7), groups of consecutive heads, one gated norm per group."""
    heads, head_dim, N, groups, length = 6, 5, 4, 2, 19
    mixer = perturb(ours(7, heads, head_dim, N, groups, 3).double())
    x = random_input(2, length, 7, dtype=torch.float64)
    with torch.no_grad():
        z, xBC, dt = (x @ mixer.in_proj.weight.T).split([30, 30 + 2 * groups * N, heads], -1)
        padded = F.pad(xBC, (0, 0, 2, 0))
        xBC = F.silu(sum(padded[:, w : w + length] * mixer.conv.weight[:, w] for w in range(3)) + mixer.conv.bias)
        values, B, C = xBC.split([30, groups * N, groups * N], -1)
        dt = F.softplus(dt + mixer.dt_bias.double())
        out = x.new_zeros(2, length, heads, head_dim)
        for h in range(heads):
            group = slice(h // 3 * N, (h // 3 + 1) * N)
            rate, S = -mixer.A_log[h].double().exp(), x.new_zeros(2, N, head_dim)
            for t in range(length):
                v = values[:, t, h * head_dim : (h + 1) * head_dim]
                step = dt[:, t, h, None, None]
                S = torch.exp(step * rate) * S + step * B[:, t, group, None] * v[:, None]
                out[:, t, h] = (C[:, t, None, group] @ S).squeeze(1) + mixer.D[h].double() * v
        gated = (out.flatten(-2) * F.silu(z)).unflatten(-1, (groups, 15))
        normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-2).sqrt()
        reference = (normed.flatten(-2) * mixer.norm_weight) @ mixer.out_proj.weight.T
        assert_close(run_mixer(mixer)(x), reference)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    mixer = ours(8, 512, 1, 4, 1, 4)
    steps, rates = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert torch.equal(mixer.D, torch.ones(512)) and torch.equal(mixer.norm_weight, torch.ones(512))


def test_default_sizes_and_mistakes():
    config = model_config(hidden_size=64, mixer={"kind": "mamba2"})
    assert config.layers[0].mixer.config.num_heads == 2
    mixer = build_part(config)
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert state.nbytes() == mixer.state_bytes(3, 1000)
    with pytest.raises(ConfigError, match=r"blocks\.b\.mixer\.head_dim: must divide 2 \* hidden_size \(20\), got 64"):
        model_config(hidden_size=10, mixer={"kind": "mamba2"})
    with pytest.raises(ConfigError, match=r"num_groups: must divide num_heads \(6\), got 4"):
        model_config(hidden_size=10, mixer={"kind": "mamba2", "num_heads": 6, "num_groups": 4})
