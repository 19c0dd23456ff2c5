"""Kimi Delta Attention against transformers' mixer, whole and a token at a time."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BailingHybridConfig, DynamicCache
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

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
from tests.ops.helpers import in_torch
from zoo import ConfigError
from zoo.blocks import SequenceContext

WEIGHTS = {
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvbo"},
    **{f"f_{each}_proj.weight": f"forget_gate.f_{each}_proj.weight" for each in "ab"},
    **{f"gate_{each}_proj.weight": f"g_{each}_proj.weight" for each in "ab"},
    "conv.weight": ("conv1d.weight", lambda weight: weight.squeeze(1)),
    "A_log": ("forget_gate.A_log", torch.flatten),
    "dt_bias": "forget_gate.dt_bias",
    "norm_weight": "o_norm.weight",
}
BOUNDED_WEIGHTS = {name: theirs for name, theirs in WEIGHTS.items() if "_a_" not in name and "_b_" not in name} | {
    "A_log": "forget_gate.A_log",
    "f_proj.weight": "forget_gate.f_proj.weight",
    "gate_proj.weight": "g_proj.weight",
}
SIZES = [(16, 4, 8, 4), (12, 3, 5, 3), (10, 1, 6, 2)]  # hidden, heads, head_dim, kernel


def both(hidden, heads, dim, kernel):
    config = KimiLinearConfig(
        hidden_size=hidden,
        linear_num_heads=heads,
        linear_head_dim=dim,
        linear_conv_kernel_dim=kernel,
        num_hidden_layers=1,
        rms_norm_eps=1e-2,
    )
    mixer = {"kind": "kda", "num_heads": heads, "head_dim": dim, "conv_kernel": kernel}
    ours = build_part(model_config(hidden_size=hidden, mixer=mixer, norm={"eps": 1e-2}))
    theirs = in_torch(modeling_kimi_linear).KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        for name in ("A_log", "dt_bias"):
            getattr(theirs.forget_gate, name).zero_()  # torch.empty until the model initialises it
    return ours, theirs, config


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_transformers(sizes):
    ours, theirs, _ = both(*sizes)
    assert_parity(ours, run_mixer(ours), theirs, lambda x: theirs(x), WEIGHTS, random_input(2, 70, sizes[0]))


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_decodes_as_transformers_does(sizes):
    ours, theirs, config = both(*sizes)
    perturb(theirs)
    copy_weights(ours, theirs, WEIGHTS)
    x, cache = random_input(2, 20, sizes[0]), DynamicCache(config=config)
    state = ours.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for chunk in x.split([11] + [1] * 9, dim=1):
            assert_close(ours(chunk, SequenceContext.of(chunk), state), theirs(chunk, cache))
    assert_close(state["S"], cache.get_recurrent_state(0), "state")


@pytest.mark.parametrize("bound", [-5.0, -0.3, None])
@pytest.mark.parametrize("sizes", SIZES)
def test_with_one_matrix_and_a_bound_equals_ling(sizes, bound):
    hidden, heads, dim, kernel = sizes
    config = BailingHybridConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=dim,
        short_conv_kernel_size=kernel,
        num_hidden_layers=1,
        rms_norm_eps=1e-2,
        kda_safe_gate=bound is not None,
        kda_lower_bound=bound or -1.0,
    )
    mixer = {"kind": "kda", "num_heads": heads, "head_dim": dim, "conv_kernel": kernel}
    mixer |= {"low_rank": False, "lower_bound": bound}
    ours = build_part(model_config(hidden_size=hidden, mixer=mixer, norm={"eps": 1e-2}))
    theirs = in_torch(modeling_bailing_hybrid).BailingHybridDeltaAttention(config, 0)
    with torch.no_grad():
        for name in ("A_log", "dt_bias"):
            getattr(theirs.forget_gate, name).zero_()  # torch.empty until the model initialises it
    assert_parity(ours, run_mixer(ours), theirs, lambda x: theirs(x), BOUNDED_WEIGHTS, random_input(2, 70, hidden))


def test_initialisation_default_sizes_and_mistakes():
    torch.manual_seed(0)
    config = model_config(hidden_size=512, mixer={"kind": "kda", "num_heads": 256})
    assert config.layers[0].mixer.config.head_dim == 2
    mixer = build_part(config)
    steps, rates = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1 and len(steps) == 512
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16 and len(rates) == 256
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert state.nbytes() == mixer.state_bytes(3, 1000)
    with pytest.raises(ConfigError, match=r"num_heads: must divide hidden_size \(10\), got 4; or give head_dim"):
        model_config(hidden_size=10, mixer={"kind": "kda", "num_heads": 4})
    with pytest.raises(ConfigError, match=r"lower_bound: must be a number < 0, got 0.5"):
        model_config(hidden_size=8, mixer={"kind": "kda", "num_heads": 4, "lower_bound": 0.5})
