"""Griffin's recurrent block: against transformers' RecurrentGemma layer, and token by token."""

import pytest
import torch
import torch.nn.functional as F
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from tests.blocks.helpers import assert_close, assert_parity, build_part, model_config, perturb, random_input, run_mixer
from zoo import ConfigError
from zoo.blocks import SequenceContext

WEIGHTS = {
    "x_proj.weight": "linear_x.weight",
    "x_proj.bias": "linear_x.bias",
    "y_proj.weight": "linear_y.weight",
    "y_proj.bias": "linear_y.bias",
    "conv.weight": ("conv_1d.weight", lambda weight: weight.squeeze(1)),
    "conv.bias": "conv_1d.bias",
    "recurrence_gate.weight": "rg_lru.recurrent_gate_weight",
    "recurrence_gate.bias": "rg_lru.recurrent_gate_bias",
    "input_gate.weight": "rg_lru.input_gate_weight",
    "input_gate.bias": "rg_lru.input_gate_bias",
    "a_param": "rg_lru.recurrent_param",
    "out_proj.weight": "linear_out.weight",
    "out_proj.bias": "linear_out.bias",
}
SIZES = [(12, 12, 3, 4), (12, 20, 2, 2), (8, 6, 1, 3)]  # hidden, width, heads, kernel


def ours(hidden, width, heads, kernel):
    mixer = {"kind": "rglru", "num_heads": heads, "width": width, "conv_kernel": kernel}
    return build_part(model_config(hidden_size=hidden, mixer=mixer))


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_transformers(sizes):
    hidden, width, heads, kernel = sizes
    config = RecurrentGemmaConfig(
        hidden_size=hidden, lru_width=width, num_attention_heads=heads, conv1d_width=kernel, num_hidden_layers=1
    )
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    positions = torch.arange(37)[None]
    mixer, x = ours(*sizes), random_input(2, 37, hidden)
    torch.nn.init.zeros_(theirs.rg_lru.recurrent_param)  # torch.empty
    assert_parity(mixer, run_mixer(mixer), theirs, lambda x: theirs(x, positions, None, use_cache=False)[0], WEIGHTS, x)


def recurrence(mixer, x, first=None):
    """Equations 1 to 4 of the paper, token by token; `first` marks tokens that enter whole."""
    W, b = mixer.conv.weight, mixer.conv.bias
    kernel = W.shape[1]
    u = F.pad(mixer.x_proj(x), (0, 0, kernel - 1, 0))
    u = sum(u[:, w : w + x.shape[1]] * W[:, w] for w in range(kernel)) + b

    def gate(module):
        blocks = torch.block_diag(*module.weight)
        return torch.sigmoid(u @ blocks + module.bias.flatten())

    a = torch.exp(-8 * F.softplus(mixer.a_param.to(x.dtype)) * gate(mixer.recurrence_gate))
    room = torch.sqrt(1 - a**2)
    room[:, 0] = 1
    entering = room * gate(mixer.input_gate) * u
    h, rows = torch.zeros_like(a[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + entering[:, t]
        rows.append(h)
    return mixer.out_proj(torch.stack(rows, 1) * F.gelu(mixer.y_proj(x), approximate="tanh")), h


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_equations_in_float64(sizes):
    mixer = perturb(ours(*sizes).double())
    x = random_input(2, 41, sizes[0], dtype=torch.float64)
    state = mixer.new_state(2, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        expected, h = recurrence(mixer, x)
        assert_close(run_mixer(mixer)(x), expected)
        assert_close(mixer(x, SequenceContext.of(x), state), expected)
        # a_param stays float32, and a float64 model has the same one
        assert_close(state["h"][..., 0], h, "state")


def test_gates_that_are_shut_or_wide_open_have_finite_gradients():
    """a rounds to 1 or underflows to 0; 1 - a^2 and its square root lose every digit or their derivative."""
    mixer = perturb(ours(12, 12, 3, 4))
    x = random_input(1, 30, 12)
    for bias, rate in ((-200.0, 0.0), (200.0, 20.0), (0.0, -200.0), (-30.0, -30.0)):
        with torch.no_grad():
            mixer.recurrence_gate.bias.fill_(bias)
            mixer.a_param.fill_(rate)
        mixer.zero_grad()
        y = run_mixer(mixer)(x)
        y.square().sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())
    with torch.no_grad():
        mixer.recurrence_gate.bias.fill_(-15.0)
        mixer.a_param.fill_(0.5)
        # float32 against float64, where 1 - a^2 is 5e-6: computed as it stands it would be wrong by a percent.
        assert_close(run_mixer(mixer)(x), recurrence(mixer.double(), x.double())[0].float())


def test_initial_decays_are_the_papers():
    torch.manual_seed(0)
    mixer = ours(8, 4096, 4, 4)
    a = torch.exp(-F.softplus(mixer.a_param))
    assert 0.9 <= a.min() < 0.91 and 0.99 < a.max() <= 0.9991
    assert a.square().mean().item() == pytest.approx((0.81 + 0.998) / 2, abs=0.01)
    assert not mixer.recurrence_gate.bias.any() and not mixer.input_gate.bias.any()


def test_sizes_and_what_does_not_divide():
    config = model_config(hidden_size=24, mixer={"kind": "rglru", "num_heads": 3})
    assert (config.layers[0].mixer.config.width, config.layers[0].mixer.config.conv_kernel) == (24, 4)
    mixer = build_part(config).bfloat16()
    assert mixer.a_param.dtype == torch.float32
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert state.nbytes() == mixer.state_bytes(3, 1000) == 3 * 24 * 4 * 4
    with pytest.raises(ConfigError, match=r"num_heads: must divide the width \(20\), got 3"):
        model_config(hidden_size=24, mixer={"kind": "rglru", "num_heads": 3, "width": 20})
