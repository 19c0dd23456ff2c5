"""Building: on any device, in any dtype, with the right initial weights."""

import math

import pytest
import torch

from tests.models.helpers import MLP, PATTERNS, config, tokens
from zoo import ConfigError, ZooConfig, ZooForCausalLM, build, load_config
from zoo.models import materialize


def tensors(net):
    return dict(net.named_parameters()) | dict(net.named_buffers())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_anything(pattern, tmp_path):
    mapping = config(pattern)
    file = tmp_path / "model.yaml"
    file.write_text(str(mapping).replace("None", "null").replace("True", "true"))
    for source in (mapping, file, str(file), load_config(mapping), ZooConfig(**mapping)):
        net = build(source)
        assert isinstance(net, ZooForCausalLM)
        assert [layer.name for layer in net.config.layers] == PATTERNS[pattern].split()


def test_mistakes_are_config_errors():
    with pytest.raises(ConfigError, match="pattern: unknown block"):
        build(config() | {"pattern": "lightnin"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_meta_then_materialised(pattern, tied):
    """Nothing unwritten, the same shapes and dtypes and constants, ties intact."""
    direct = build(config(pattern, tie_word_embeddings=tied))
    net = build(config(pattern, tie_word_embeddings=tied), device="meta")
    assert all(tensor.is_meta for tensor in tensors(net).values())
    assert net.num_params() == direct.num_params() == sum(p.numel() for p in direct.parameters())
    net = materialize(net, "cpu")
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied
    expected = tensors(direct)
    assert tensors(net).keys() == expected.keys()
    for name, tensor in tensors(net).items():
        assert tensor.isfinite().all() and tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        if len(expected[name].unique()) == 1 or not isinstance(tensor, torch.nn.Parameter):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert tensor.std() > 0, name
    assert net(tokens(1, 5)).logits.isfinite().all()


def test_two_builds_differ_and_a_seed_repeats():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build(config()).model.embed_tokens.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype):
    net = build(config(), dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters()}
    rates = {name for name in dtypes if name.rsplit(".")[-1] in ("A_log", "D", "dt_bias")}
    assert len(rates) == 6
    assert {dtypes[name] for name in rates} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - rates} == {dtype}
    assert net(tokens(1, 5)).logits.dtype == dtype


def test_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = build(config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert net.dtype == torch.bfloat16


def test_initial_scale():
    torch.manual_seed(0)
    block = {"mixer": {"kind": "attention", "num_heads": 4}, "ffn": MLP}
    sizes = {"vocab_size": 500, "hidden_size": 64, "blocks": {"b": block}, "pattern": "b*8", "initializer_range": 0.1}
    net = build(sizes)
    assert net.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert net.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.05)
    for layer in net.model.layers:
        assert layer.mixer.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)
        assert layer.mixer.o_proj.weight.std().item() == pytest.approx(0.1 / math.sqrt(16), rel=0.1)
        assert layer.ffn.down_proj.weight.std().item() == pytest.approx(0.1 / math.sqrt(16), rel=0.1)
    x = tokens(2, 30, vocab=500)
    loss = net(x, labels=x).cross_entropy.item()
    assert loss == pytest.approx(math.log(500), rel=0.2)
