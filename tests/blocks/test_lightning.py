"""Lightning attention against transformers' MiniMaxLightningAttention, and against the recurrence it stands for."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MiniMaxConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from tests.blocks.helpers import assert_close, assert_parity, build_part, model_config, perturb, random_input, run_mixer
from zoo.blocks import SequenceContext
from zoo.blocks.lightning import decay_slopes

WEIGHTS = {
    "qkv_proj.weight": "qkv_proj.weight",
    "gate_proj.weight": "output_gate.weight",
    "norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}


def minimax(num_heads, head_dim, hidden_size, layer_idx, num_layers):
    config = MiniMaxConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        num_hidden_layers=num_layers,
        layer_types=["linear_attention"] * num_layers,
        block_size=16,
    )
    return MiniMaxLightningAttention(config, layer_idx)


def lightning(num_heads, head_dim, hidden_size, layer_idx, num_layers, slopes="geometric"):
    mixer = {"kind": "lightning", "num_heads": num_heads, "head_dim": head_dim, "slopes": slopes}
    # The layer's own norm has a fixed eps, whatever the model's.
    config = model_config(hidden_size=hidden_size, mixer=mixer, num_layers=num_layers, norm={"eps": 1e-3})
    return build_part(config, layer_idx=layer_idx)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "hidden_size", "layer_idx", "num_layers"),
    [(4, 8, 32, 0, 4), (4, 8, 24, 2, 4), (8, 6, 20, 3, 4), (3, 10, 18, 1, 5), (2, 16, 8, 0, 1)],
)
def test_equals_minimax(num_heads, head_dim, hidden_size, layer_idx, num_layers):
    sizes = (num_heads, head_dim, hidden_size, layer_idx, num_layers)
    theirs, ours = minimax(*sizes), lightning(*sizes)
    x = random_input(2, 53, hidden_size)
    assert_parity(ours, run_mixer(ours), theirs, lambda x: theirs(x, None, None)[0], WEIGHTS, x)


@pytest.mark.parametrize("num_heads", [4, 8, 6])
def test_equals_the_recurrence_in_float64(num_heads):
    head_dim, hidden_size, layer_idx, num_layers = 5, 12, 2, 6
    mixer = perturb(lightning(num_heads, head_dim, hidden_size, layer_idx, num_layers, "alibi").double())
    x = random_input(2, 37, hidden_size, dtype=torch.float64).requires_grad_()
    qkv = F.silu(x @ mixer.qkv_proj.weight.T)
    S = x.new_zeros(2, num_heads, head_dim, head_dim)
    decay = torch.exp(-decay_slopes(num_heads, layer_idx, num_layers).double())[:, None, None]
    heads = []
    for t in range(37):
        # Head h owns columns 3dh to 3d(h+1): its q, then its k, then its v.
        per_head = [qkv[:, t, 3 * head_dim * h : 3 * head_dim * (h + 1)] for h in range(num_heads)]
        q, k, v = (torch.stack([p[:, i * head_dim : (i + 1) * head_dim] for p in per_head], 1) for i in range(3))
        S = decay * S + k[..., :, None] * v[..., None, :]
        heads.append((q[..., None, :] @ S).reshape(2, -1))
    out = torch.stack(heads, 1)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    reference = (out * torch.sigmoid(x @ mixer.gate_proj.weight.T)) @ mixer.o_proj.weight.T
    y = run_mixer(mixer)(x)
    assert_close(y, reference)
    weight = random_input(*y.shape, dtype=torch.float64, seed=2)
    for name, tensor in [("x", x), *mixer.named_parameters()]:
        ours = torch.autograd.grad((y * weight).sum(), tensor, retain_graph=True)[0]
        theirs = torch.autograd.grad((reference * weight).sum(), tensor, retain_graph=True)[0]
        assert_close(ours, theirs, f"gradient of {name}")


def test_decodes_as_minimax_does():
    """Prefill, then token by token, on both sides."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    sizes = (4, 8, 24, 1, 3)
    theirs, ours = perturb(minimax(*sizes)), lightning(*sizes)
    ours.load_state_dict({our: theirs.state_dict()[their] for our, their in WEIGHTS.items()})
    x, cache, state = random_input(2, 30, 24), MiniMaxCache(), ours.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for chunk in x.split([21] + [1] * 9, dim=1):
            assert_close(ours(chunk, SequenceContext.of(chunk), state), theirs(chunk, None, None, cache)[0])
    assert_close(state["S"], cache.get_linear_cache(1), "state")


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 20, 24, 64])
def test_alibi_slopes(num_heads):
    """Bloom's implementation of the ALiBi rule is that of the original code."""
    mask = torch.ones(1, 2, dtype=torch.long)
    alibi = build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    for layer_idx, num_layers in [(0, 1), (0, 8), (5, 8), (7, 8)]:
        depth = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
        assert_close(decay_slopes(num_heads, layer_idx, num_layers), alibi * depth)


@pytest.mark.parametrize("num_heads", [3, 8, 12])
def test_geometric_slopes(num_heads):
    for layer_idx in range(3):
        theirs = minimax(num_heads, 4, 8, layer_idx, 3).slope_rate.flatten()
        assert_close(decay_slopes(num_heads, layer_idx, 3, "geometric"), theirs)


def test_slopes_differ_where_the_rules_do():
    for num_heads in (2, 16):
        assert torch.equal(decay_slopes(num_heads, 0, 2), decay_slopes(num_heads, 0, 2, "geometric"))
    assert not torch.allclose(decay_slopes(12, 0, 2), decay_slopes(12, 0, 2, "geometric"), rtol=0.1)


def test_the_state_decays_by_the_slopes():
    """Zero input afterwards leaves only the decay to act."""
    mixer = perturb(lightning(4, 4, 8, 1, 4))
    state = mixer.new_state(1, torch.device("cpu"), torch.float32)
    mixer(x := random_input(1, 3, 8), SequenceContext.of(x), state)
    before = state["S"]
    mixer(x := torch.zeros(1, 10, 8), SequenceContext.of(x), state)
    slopes = [2 ** (-8 * (h + 1) / 4) * (1 - 1 / (3 + 1e-5) + 1e-5) for h in range(4)]
    expected = before * torch.tensor([math.exp(-10 * s) for s in slopes])[:, None, None]
    assert_close(state["S"], expected)
