"""Retention against the parallel form of its paper (equation 5), with rotations written as complex numbers."""

from __future__ import annotations

import pytest
import torch

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext
from zoo.blocks.retention import log_decays


def mixer(**fields):
    config = model_config(hidden_size=16, mixer={"kind": "retention", "num_heads": 2} | fields)
    return perturb(build_part(config)).double()


@pytest.mark.parametrize("fields", [{}, {"rope": None}, {"head_dim": 6, "v_head_dim": 5}])
def test_equals_the_parallel_form(fields: dict) -> None:
    layer, length = mixer(**fields), 40
    x = random_input(2, length, 16, dtype=torch.float64).requires_grad_()
    dim = layer.head_dim
    q, k = (p(x).unflatten(-1, (-1, dim)) for p in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).unflatten(-1, (-1, layer.v_head_dim))
    position = torch.arange(length, dtype=torch.float64)
    distance = position[:, None] - position
    if "rope" not in fields:  # Re(q e^(it theta) conj(k e^(ij theta))), pairs half a head apart
        theta = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        q, k = (torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) for x in (q, k))
        turned = torch.polar(torch.ones(1, dtype=torch.float64), distance[..., None] * theta)
        logits = torch.einsum("bqhd,bkhd,qkd->bhqk", q, k.conj(), turned).real
    else:
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k)
    gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))
    decay = (gamma[:, None, None] ** distance.clamp_min(0)).tril()
    out = torch.einsum("bhqk,bkhd->bqhd", logits * dim**-0.5 * decay, v)
    out = (out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(2) * layer.norm.weight
    expected = layer.o_proj(torch.nn.functional.silu(layer.gate_proj(x)) * out)
    y = layer(x, SequenceContext.of(x))
    assert_close(y, expected, tolerance=1e-5)  # decays and angles are float32
    probe = random_input(*y.shape, dtype=torch.float64, seed=3)
    for ours, theirs in zip(*(torch.autograd.grad((each * probe).sum(), [x, *layer.parameters()], retain_graph=True)
                              for each in (y, expected)), strict=True):  # fmt: skip
        assert_close(ours, theirs, tolerance=1e-5)


def test_decays() -> None:
    """Of the first and last heads of RetNet-6.7B's 16."""
    decays = log_decays(16).double().exp()
    assert torch.allclose(decays[[0, 15]], torch.tensor([1 - 1 / 32, 1 - 2.0**-20], dtype=torch.float64), atol=1e-9)


def test_longrope_is_refused() -> None:
    rope = {"type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
    with pytest.raises(ValueError, match="longrope would turn what the state holds; choose another"):
        mixer(rope=rope)
