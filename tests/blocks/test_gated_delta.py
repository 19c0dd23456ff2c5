"""Gated DeltaNet against the mixers of Qwen3-Next and OLMo-Hybrid in transformers, and against its recurrence."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_next import modeling_qwen3_next

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

# hidden, heads of q and k, of v, head_dim, v_head_dim, kernel
SIZES = [(16, 4, 4, 8, 8, 4), (12, 2, 6, 5, 7, 3), (10, 1, 2, 4, 6, 2), (12, 3, 3, 6, 4, 4)]


def ours(hidden, heads, v_heads, dim, v_dim, kernel, **options):
    mixer = {
        "kind": "gated_delta",
        "num_heads": heads,
        "num_v_heads": v_heads,
        "head_dim": dim,
        "v_head_dim": v_dim,
        "conv_kernel": kernel,
        **options,
    }
    return build_part(model_config(hidden_size=hidden, mixer=mixer, norm={"eps": 1e-2}))


def taps(weight):
    return weight.squeeze(1)


def of_group(heads, sizes, part):
    """One of the parts that follow each other within each head of `in_proj_*`."""
    return lambda weight: weight.unflatten(0, (heads, -1)).split(sizes, 1)[part].flatten(0, 1)


def qwen_weights(heads, v_heads, dim, v_dim):
    shared = v_heads // heads
    qkvz, ba = (dim, dim, shared * v_dim, shared * v_dim), (shared, shared)
    parts = [("in_proj_qkvz.weight", qkvz, i) for i in range(4)] + [("in_proj_ba.weight", ba, i) for i in range(2)]
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "b_proj", "a_proj")
    return {
        **{
            f"{name}.weight": (their, of_group(heads, sizes, i))
            for name, (their, sizes, i) in zip(names, parts, strict=True)
        },
        "conv.weight": ("conv1d.weight", taps),
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm_weight": "norm.weight",
        "o_proj.weight": "out_proj.weight",
    }


def qwen(hidden, heads, v_heads, dim, v_dim, kernel):
    config = Qwen3NextConfig(
        hidden_size=hidden,
        linear_num_key_heads=heads,
        linear_num_value_heads=v_heads,
        linear_key_head_dim=dim,
        linear_value_head_dim=v_dim,
        linear_conv_kernel_dim=kernel,
        num_hidden_layers=1,
        rms_norm_eps=1e-2,
    )
    return in_torch(modeling_qwen3_next).Qwen3NextGatedDeltaNet(config, 0), config


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_qwen3_next(sizes):
    (theirs, _), mixer = qwen(*sizes), ours(*sizes)
    assert_parity(
        mixer, run_mixer(mixer), theirs, lambda x: theirs(x), qwen_weights(*sizes[1:5]), random_input(2, 70, sizes[0])
    )


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_decodes_as_qwen3_next_does(sizes):
    (theirs, config), mixer = qwen(*sizes), ours(*sizes)
    perturb(theirs)
    copy_weights(mixer, theirs, qwen_weights(*sizes[1:5]))
    x, cache = random_input(2, 20, sizes[0]), DynamicCache(config=config)
    state = mixer.new_state(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for chunk in x.split([11] + [1] * 9, dim=1):
            assert_close(mixer(chunk, SequenceContext.of(chunk), state), theirs(chunk, cache))
    assert_close(state["S"], cache.get_recurrent_state(0), "state")


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_olmo_hybrid(sizes, negative):
    hidden, heads, v_heads, dim, v_dim, kernel = sizes
    config = OlmoHybridConfig(
        hidden_size=hidden,
        linear_num_key_heads=heads,
        linear_num_value_heads=v_heads,
        linear_key_head_dim=dim,
        linear_value_head_dim=v_dim,
        linear_conv_kernel_dim=kernel,
        linear_allow_neg_eigval=negative,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        rms_norm_eps=1e-2,
    )
    theirs = in_torch(modeling_olmo_hybrid).OlmoHybridGatedDeltaNet(config, 0)
    mixer = ours(*sizes, negative_eigenvalues=negative, norm_eps=1e-5)
    weights = {f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvabo"} | {
        "gate_proj.weight": "g_proj.weight",
        "conv.weight": ("conv1d.weight", taps),
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm_weight": "o_norm.weight",
    }
    assert_parity(mixer, run_mixer(mixer), theirs, lambda x: theirs(x), weights, random_input(2, 41, hidden))


def test_equals_the_recurrence_in_float64():
    """Heads of q and k shared by consecutive heads of v; the conv before the norm to unit length."""
    hidden, heads, v_heads, dim, v_dim, kernel = SIZES[1]
    mixer = perturb(ours(*SIZES[1], negative_eigenvalues=True).double())
    for tensor in (mixer.A_log, mixer.dt_bias):
        tensor.data = tensor.data.double()
    x, length = random_input(2, 19, hidden, dtype=torch.float64), 19
    with torch.no_grad():
        qkv = torch.cat([x @ part.weight.T for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], -1)
        padded = F.pad(qkv, (0, 0, kernel - 1, 0))
        qkv = F.silu(sum(padded[:, w : w + length] * mixer.conv.weight[:, w] for w in range(kernel)))
        q, k, v = qkv.split([heads * dim, heads * dim, v_heads * v_dim], -1)
        beta = 2 * (x @ mixer.b_proj.weight.T).sigmoid()
        g = -mixer.A_log.exp() * F.softplus(x @ mixer.a_proj.weight.T + mixer.dt_bias)
        out = x.new_zeros(2, length, v_heads, v_dim)
        for h in range(v_heads):
            group = slice(h // 3 * dim, (h // 3 + 1) * dim)
            S = x.new_zeros(2, dim, v_dim)
            for t in range(length):
                q_t, k_t = (part[:, t, group, None] for part in (q, k))
                q_t, k_t = (part / (part.square().sum(1, keepdim=True) + 1e-6).sqrt() for part in (q_t, k_t))
                S = g[:, t, h, None, None].exp() * S
                error = v[:, t, None, h * v_dim : (h + 1) * v_dim] - k_t.mT @ S
                S = S + beta[:, t, h, None, None] * k_t @ error
                out[:, t, h] = (q_t.mT @ S)[:, 0] / dim**0.5
        out = out / (out.square().mean(-1, keepdim=True) + 1e-2).sqrt() * mixer.norm_weight
        reference = (out.flatten(-2) * F.silu(x @ mixer.gate_proj.weight.T)) @ mixer.o_proj.weight.T
        assert_close(run_mixer(mixer)(x), reference)


def test_initialisation():
    torch.manual_seed(0)
    mixer = ours(8, 1, 512, 1, 1, 4)
    steps, rates = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert torch.equal(mixer.norm_weight, torch.ones(1))


def test_default_sizes_and_mistakes():
    config = model_config(hidden_size=64, mixer={"kind": "gated_delta", "num_heads": 4}, norm={"eps": 1e-3})
    fields = config.layers[0].mixer.config
    assert (fields.num_v_heads, fields.head_dim, fields.v_head_dim, fields.norm_eps) == (4, 16, 16, 1e-3)
    mixer = build_part(config)
    state = mixer.new_state(3, torch.device("cpu"), torch.bfloat16)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert state.nbytes() == mixer.state_bytes(3, 1000)
    with pytest.raises(
        ConfigError, match=r"blocks\.b\.mixer\.num_v_heads: must be a multiple of num_heads \(4\), got 6"
    ):
        model_config(hidden_size=64, mixer={"kind": "gated_delta", "num_heads": 4, "num_v_heads": 6})
    with pytest.raises(ConfigError, match=r"num_heads: must divide hidden_size \(10\), got 4; or give head_dim"):
        model_config(hidden_size=10, mixer={"kind": "gated_delta", "num_heads": 4})
