"""linear: each feature map against the quadratic form of its paper; lengths and mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext
from zoo.schema import FieldError


def mixer(**fields):
    return perturb(build_part(model_config(hidden_size=16, mixer={"kind": "linear", "num_heads": 2} | fields))).double()


def similarity(feature_map: str, q: Tensor, k: Tensor, max_length: int) -> Tensor:
    """`[batch, heads, queries, keys]`, by the papers' pairwise formulas."""
    if feature_map == "elu":
        return torch.einsum("bqhd,bkhd->bhqk", torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp()))
    products = torch.einsum("bqhd,bkhd->bhqk", q.clamp_min(0), k.clamp_min(0))
    if feature_map == "relu":
        return products
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    return products * torch.cos(math.pi / 2 * distance.double() / max_length)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "cosformer"])
def test_equals_the_quadratic_form(feature_map: str) -> None:
    length = 50
    layer = mixer(feature_map=feature_map, max_length=length if feature_map == "cosformer" else None)
    x = random_input(2, length, 16, dtype=torch.float64).requires_grad_()
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = similarity(feature_map, q, k, length).tril()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total.masked_fill(total == 0, 1), v).flatten(2)
    expected, y = layer.o_proj(out), layer(x, SequenceContext.of(x))
    assert_close(y, expected, tolerance=1e-10)
    probe = random_input(*y.shape, dtype=torch.float64, seed=3)
    for ours, theirs in zip(*(torch.autograd.grad((each * probe).sum(), [x, *layer.parameters()], retain_graph=True)
                              for each in (y, expected)), strict=True):  # fmt: skip
        assert_close(ours, theirs, tolerance=1e-9)


def test_elu_of_what_is_far_below_0() -> None:
    """e^x to the last digit, where 1 + (e^x - 1) rounds to 0."""
    layer = mixer().float()
    q, k = random_input(2, 9, 2, 8) - 20, random_input(2, 9, 2, 8, seed=1) - 12
    for ours, x in zip(layer.features(q, k, torch.arange(9)[None]), (q, k), strict=True):
        assert_close(ours.double(), x.double().exp(), tolerance=1e-6)


def test_weights_too_small_to_divide_by_are_none() -> None:
    layer = mixer(feature_map="relu").float()
    x = (random_input(1, 7, 16) * torch.logspace(0, -22, 23)[:, None, None]).requires_grad_()
    y = layer(x, SequenceContext.of(x))
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert (y[0] != 0).any() and (y[-1] == 0).all() and all(each.isfinite().all() for each in gradients)


def test_a_query_without_any_weight_gives_0() -> None:
    layer = mixer(feature_map="relu")
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    x = random_input(1, 7, 16, dtype=torch.float64).requires_grad_()
    y = layer(x, SequenceContext.of(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all() and gradient.isfinite().all()


def test_cosformer_beyond_its_length_is_refused() -> None:
    layer, x = mixer(feature_map="cosformer", max_length=8), random_input(1, 8, 16, dtype=torch.float64)
    state = layer.new_state(1, x.device, x.dtype)
    layer(x, SequenceContext.of(x), state)
    one = x[:, :1]
    with pytest.raises(ValueError, match=r"cosformer is for 8 tokens \(max_length\), got a text of 9"):
        layer(one, SequenceContext.of(one, seen=torch.tensor([8])), state)
    packed = SequenceContext.of(torch.cat([x, x], 1), cu_seqlens=torch.tensor([0, 8, 16], dtype=torch.int32))
    layer(torch.cat([x, x], 1), packed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_map": "cosformer"}, "max_length: is missing; cosformer needs it"),
        ({"max_length": 8}, "max_length: is for cosformer; remove it"),
        ({"num_heads": 3}, "num_heads: must divide hidden_size"),
        ({"feature_map": "exp"}, "feature_map: must be one of elu, relu, cosformer"),
    ],
)
def test_mistakes_are_named(fields: dict, message: str) -> None:
    with pytest.raises((FieldError, ValueError), match=message):
        mixer(**fields)
