"""Residual rules against their formulas, in a decoder layer with real sublayers."""

import pytest
import torch

from tests.blocks.helpers import assert_close, perturb, random_input
from zoo import load_config
from zoo.blocks import SequenceContext
from zoo.models.decoder import DecoderLayer

MIXER = {"kind": "attention", "num_heads": 2}
FFN = {"kind": "mlp", "intermediate_size": 16}


def layer(residual, mixer=MIXER, ffn=FFN, num_layers=8):
    blocks = {"b": {"mixer": mixer, "ffn": ffn, "residual": residual, "norm": {"kind": "layer", "eps": 1e-2}}}
    config = load_config({"vocab_size": 8, "hidden_size": 8, "blocks": blocks, "pattern": f"b*{num_layers}"})
    return perturb(DecoderLayer(config.layers[0], config, 0).double())


def formula(kind, x, part, norm, second_norm, alpha, beta, scale):
    """One sublayer, as its paper writes it."""
    return {
        "pre": lambda: x + scale * part(norm(x)),
        "post": lambda: norm(x + part(x)),
        "reordered": lambda: x + norm(part(x)),
        "sandwich": lambda: x + second_norm(part(norm(x))),
        "normalized": lambda: alpha * norm(x) + beta * part(norm(x)),
    }[kind]()


@pytest.mark.parametrize("sublayers", ["both", "mixer", "ffn"])
@pytest.mark.parametrize(
    "residual",
    [
        {"kind": "pre"},
        {"kind": "pre", "mixer_scale": 0.3, "ffn_scale": -1.2},
        {"kind": "post"},
        {"kind": "reordered"},
        {"kind": "sandwich"},
        {"kind": "normalized"},
        {"kind": "normalized", "mixer_alpha": 1.3, "mixer_beta": 0.7, "ffn_alpha": 0.4, "ffn_beta": 1.9},
    ],
    ids=lambda residual: f"{residual['kind']}-{len(residual)}",
)
def test_equals_the_formula(residual, sublayers):
    kind = residual["kind"]
    module = layer(
        residual, MIXER if sublayers != "ffn" else {"kind": "none"}, FFN if sublayers != "mixer" else {"kind": "none"}
    )
    x = random_input(2, 5, 8, dtype=torch.float64)
    context = SequenceContext.of(x)
    y = x
    if sublayers != "ffn":
        alpha, beta = residual.get("mixer_alpha", 16**0.25), residual.get("mixer_beta", 1.0)
        norms = module.mixer_norm, module.mixer_second_norm
        scale = residual.get("mixer_scale", 1.0)
        y = formula(kind, y, lambda h: module.mixer(h, context), *norms, alpha, beta, scale)
    if sublayers != "mixer":
        alpha, beta = residual.get("ffn_alpha", 16**0.25), residual.get("ffn_beta", 1.0)
        norms, scale = (module.ffn_norm, module.ffn_second_norm), residual.get("ffn_scale", 1.0)
        y = formula(kind, y, lambda h: module.ffn(h, context)[0], *norms, alpha, beta, scale)
    assert_close(module(x, context)[0], y)


def test_parallel_reads_one_stream():
    module, x = layer({"kind": "parallel"}), random_input(2, 5, 8, dtype=torch.float64)
    context = SequenceContext.of(x)
    mixed = module.mixer(module.mixer_norm(x), context)
    assert_close(module(x, context)[0], x + mixed + module.ffn(module.ffn_norm(x), context)[0])


def test_serial_is_one_behind_the_other():
    module, x = layer({"kind": "serial"}), random_input(2, 5, 8, dtype=torch.float64)
    context = SequenceContext.of(x)
    mixed = module.mixer(module.mixer_norm(x), context)
    assert_close(module(x, context)[0], x + module.ffn(module.ffn_norm(mixed), context)[0])


def test_skip_goes_on_from_the_stream_below():
    x, below = (random_input(2, 5, 8, dtype=torch.float64, seed=seed) for seed in (1, 2))
    config = {"vocab_size": 8, "hidden_size": 8, "pattern": "first second", "blocks": {
        "first": {"mixer": MIXER}, "second": {"mixer": MIXER, "ffn": FFN, "residual": {"kind": "skip"}},
    }}  # fmt: skip
    config = load_config(config)
    module, context = perturb(DecoderLayer(config.layers[1], config, 1).double()), SequenceContext.of(x)
    mixed = below + module.mixer(module.mixer_norm(x), context)
    expected = mixed + module.ffn(module.ffn_norm(mixed), context)[0]
    assert_close(module(x, context, None, None, below)[0], expected)


@pytest.mark.parametrize("kind", ["pre", "post", "reordered", "sandwich", "normalized", "parallel", "serial"])
def test_norms_are_there_where_they_are_used(kind):
    module = layer({"kind": kind}, ffn={"kind": "none"})
    assert module.ffn is module.ffn_norm is module.ffn_second_norm is None
    assert (module.mixer_second_norm is not None) == (kind == "sandwich")
    x = random_input(1, 3, 8, dtype=torch.float64)
    module(x, SequenceContext.of(x))[0].square().sum().backward()
    unused = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []
