"""Performer: its estimate of softmax attention gets better with more features, and the draw is fixed and saved."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.blocks.helpers import assert_close, build_part, model_config, random_input
from zoo.blocks import SequenceContext
from zoo.blocks.performer import orthogonal_features


def mixer(**fields):
    torch.manual_seed(0)
    config = model_config(
        hidden_size=16, num_layers=2, mixer={"kind": "performer", "num_heads": 2} | fields, initializer_range=0.15
    )
    return build_part(config).double()


def test_more_features_come_nearer_to_softmax_attention() -> None:
    x = random_input(2, 60, 16, dtype=torch.float64)
    errors = []
    for num_features in (16, 256, 4096):
        layer = mixer(num_features=num_features)
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        exact = layer.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        errors.append(float((layer(x, SequenceContext.of(x)) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > 4 * errors[2] and errors[2] < 0.06, errors


def test_equals_the_quadratic_form() -> None:
    layer, x = mixer(num_features=21), random_input(1, 40, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))

    def phi(x):
        x = x / 8**0.25
        w = layer.directions.double()
        return torch.exp(torch.einsum("bthd,hfd->bthf", x, w) - (x * x).sum(-1, keepdim=True) / 2)

    weights = torch.einsum("bqhf,bkhf->bhqk", phi(q), phi(k)).tril()
    out = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    assert_close(layer(x, SequenceContext.of(x)), layer.o_proj(out), tolerance=1e-10)


def test_directions() -> None:
    w = orthogonal_features(2, 20, 8, seed=5)
    for block in (w[:, :8], w[:, 8:16], w[:, 16:]):
        unit = block / block.norm(dim=-1, keepdim=True)
        assert torch.allclose(unit @ unit.mT, torch.eye(block.shape[1]).expand(2, -1, -1), atol=1e-5)
    many = orthogonal_features(64, 64, 8, seed=1)
    assert abs(many.mean()) < 0.02 and abs(many.var() - 1) < 0.02  # as of N(0, I)
    assert torch.equal(w, orthogonal_features(2, 20, 8, seed=5))
    assert not torch.equal(w, orthogonal_features(2, 20, 8, seed=6))


def test_the_draw_is_saved_and_its_own_in_every_layer() -> None:
    config = model_config(hidden_size=16, num_layers=2, mixer={"kind": "performer", "num_heads": 2, "seed": 4})
    first, second = build_part(config, layer_idx=0), build_part(config, layer_idx=1)
    assert not torch.equal(first.directions, second.directions)
    assert torch.equal(second.directions, orthogonal_features(2, 16, 8, seed=5))
    assert "directions" in first.state_dict()
    before = first.directions.clone()
    first.reset_parameters()
    assert torch.equal(first.directions, before)


def test_large_queries_do_not_overflow() -> None:
    layer, x = mixer(), 40 * random_input(1, 30, 16)
    layer.float()
    y = layer(x, SequenceContext.of(x))
    assert y.isfinite().all()


def test_one_heavy_token_leaves_finite_gradients() -> None:
    """A first token that no query gives a weight worth dividing by."""
    layer = mixer(num_features=32).float()
    for heavy in torch.linspace(1, 40, 40).tolist():
        x = random_input(1, 6, 16)
        x[:, 0] *= heavy
        x.requires_grad_()
        y = layer(x, SequenceContext.of(x))
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        assert y.isfinite().all() and all(each.isfinite().all() for each in gradients), heavy
