"""Rotary positions against transformers' LlamaRotaryEmbedding."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.blocks.helpers import assert_close, random_input
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.schema import FieldError

TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with its own ramp": {
        "factor": 3.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    "yarn over fractions of dimensions": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def rotary(name, head_dim, theta=500.0, **more):
    return RotaryEmbedding(RopeConfig(type=name.split()[0], theta=theta, **TYPES[name], **more).resolve(head_dim))


def llama(name, head_dim, theta=500.0):
    parameters = {"rope_type": name.split()[0], "rope_theta": theta, **TYPES[name]}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=512)
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("head_dim", [2, 16, 40])
def test_equals_llama(name, head_dim):
    q, k = random_input(2, 30, 3, head_dim, seed=1), random_input(2, 30, 2, head_dim, seed=2)
    positions = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    cos, sin = llama(name, head_dim)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for ours, theirs in zip(rotary(name, head_dim)(q, k, positions), expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("head_dim", [2, 16, 40])
def test_interleaved_equals_deepseek(head_dim):
    q, k = random_input(2, 30, 3, head_dim, seed=1), random_input(2, 30, 1, head_dim, seed=2)
    positions = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    cos, sin = llama("yarn", head_dim)(q, positions)
    expected = apply_rotary_pos_emb_interleave(q, k, cos, sin, unsqueeze_dim=2)
    for ours, theirs in zip(rotary("yarn", head_dim, interleaved=True)(q, k, positions), expected, strict=True):
        assert_close(ours, theirs)


def longrope(head_dim, **more):
    """Six pairs that are all scaled otherwise."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.5, 2.0, 4.0, 9.0, 16.0, 31.0]}
    fields = {"factor": 4.0, "original_max_position_embeddings": 16} | factors | more
    theirs = LlamaConfig(head_dim=12, rope_parameters={"rope_type": "longrope", "rope_theta": 500.0, **fields})
    ours = RopeConfig(type="longrope", theta=500.0, **fields).resolve(head_dim)
    return RotaryEmbedding(ours), LlamaRotaryEmbedding(theirs)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.7}])
def test_longrope_equals_llama_on_both_sides_of_the_switch(length, more):
    ours, theirs = longrope(12, **more)
    q, k = random_input(2, length, 3, 12, seed=1), random_input(2, length, 2, 12, seed=2)
    positions = torch.arange(length).expand(2, length)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions), unsqueeze_dim=2)
    for mine, their in zip(ours(q, k, positions), expected, strict=True):
        assert_close(mine, their)


def test_longrope_goes_by_the_length_of_each_row_and_document():
    ours, _ = longrope(12)
    q = random_input(1, 30, 2, 12)
    rows = [torch.arange(20), torch.cat([torch.zeros(6, dtype=torch.long), torch.arange(14)])]  # the second left-padded
    packed = torch.cat([torch.arange(9), torch.arange(1), torch.arange(17), torch.arange(3)])[None]
    for start, stop in ((0, 9), (9, 10), (10, 27), (27, 30)):
        alone = ours(q[:, start:stop], q[:, start:stop], torch.arange(stop - start)[None])[0]
        assert torch.equal(ours(q, q, packed)[0][:, start:stop], alone)
    both = ours(q[:, :20].expand(2, -1, -1, -1), q[:, :20].expand(2, -1, -1, -1), torch.stack(rows))[0]
    assert torch.equal(both[:1], ours(q[:, :20], q[:, :20], rows[0][None])[0])
    assert torch.equal(both[1:, 6:], ours(q[:, 6:20], q[:, 6:20], torch.arange(14)[None])[0])
    assert not torch.equal(both[0, 6:], ours(q[:, 6:20], q[:, 6:20], rows[0][None, 6:] - 6)[0][0])


def test_longrope_of_a_chunk_goes_by_the_length_so_far():
    ours, _ = longrope(12)
    q = random_input(1, 20, 2, 12)
    whole = ours(q, q, torch.arange(20)[None])[0]
    assert torch.equal(ours(q[:, 18:], q[:, 18:], torch.arange(18, 20)[None])[0], whole[:, 18:])


@pytest.mark.parametrize("name", TYPES)
def test_partial_rotation_leaves_the_rest_alone(name):
    q = random_input(1, 5, 2, 20)
    turned, _ = rotary(name, 20, rotary_dim=8)(q, q, torch.arange(5)[None])
    whole, _ = rotary(name, 8)(q[..., :8], q[..., :8], torch.arange(5)[None])
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert_close(turned[..., :8], whole)


def test_yarn_scales_cos_and_sin():
    assert rotary("yarn", 16).attention_factor == pytest.approx(0.1 * math.log(8) + 1)


def test_frequencies_are_float32_and_never_saved():
    module = rotary("yarn", 16)
    before = module.inv_freq.clone()
    module.to(torch.bfloat16)
    assert module.inv_freq.dtype == torch.float32
    assert torch.equal(module.inv_freq, before)
    assert module.state_dict() == {}


def test_reset_parameters_fills_a_meta_module():
    with torch.device("meta"):
        module = longrope(12)[0]
    module.to_empty(device="cpu").reset_parameters()
    assert module.inv_freq.shape == (2, 6) and torch.equal(module.inv_freq, longrope(12)[0].inv_freq)
    for name in TYPES:
        with torch.device("meta"):
            module = rotary(name, 16)
        module.to_empty(device="cpu").reset_parameters()
        assert torch.equal(module.inv_freq, rotary(name, 16).inv_freq)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 5}, "rotary_dim: must be even"),
        ({"rotary_dim": 18}, r"rotary_dim: .*at most head_dim \(16\), got 18"),
        ({"factor": 2.0}, "factor: does not belong to rope type default"),
        ({"type": "linear"}, "factor: is missing; rope type linear"),
        ({"type": "yarn", "factor": 2.0}, "original_max_position_embeddings: is missing"),
        ({"type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8}, "short_factor: is missing"),
        (
            {
                "type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 7,
            },
            "long_factor: must have 8 numbers, half of rotary_dim; got 7",
        ),
        (TYPES["llama3"] | {"type": "llama3", "beta_fast": 1.0}, "beta_fast: does not belong"),
        (TYPES["yarn"] | {"type": "yarn", "beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast: must be above beta_slow"),
        (TYPES["yarn"] | {"type": "yarn", "mscale": 1.0}, "mscale: does nothing without mscale_all_dim"),
        (
            {
                "type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 1,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
            },
            "original_max_position_embeddings: must be at least 2",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(FieldError, match=message):
        RopeConfig(**fields).resolve(16)


def test_layers_share_what_one_has_computed():
    """Of the same configuration and dtype only, and with the same result."""
    q, known, positions = torch.randn(2, 5, 3, 16), {}, torch.arange(5).expand(2, 5)
    one, same, other = rotary("default", 16), rotary("default", 16), rotary("default", 16, theta=1e4)
    expected = one(q, q, positions)
    for module in (one, same):
        assert all(torch.equal(a, b) for a, b in zip(module(q, q, positions, known), expected, strict=True))
        assert len(known) == 1
    same.inv_freq = None  # not needed any more
    assert torch.equal(same(q, q, positions, known)[0], expected[0])
    assert not torch.equal(other(q, q, positions, known)[0], expected[0])
    half = one(q.bfloat16(), q.bfloat16(), positions, known)[0]
    assert len(known) == 3 and half.dtype == torch.bfloat16
