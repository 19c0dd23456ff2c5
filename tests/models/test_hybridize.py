"""Other mixers in a model that has its weights."""

import pytest
import torch

import zoo
from tests.models.families.parity import ids, theirs
from tests.ops.helpers import relative_error
from zoo.config import ConfigError
from zoo.models.hybridize import hybridize


def llama(layers=6, **fields):
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "intermediate_size": 24}}
    return {"vocab_size": 40, "hidden_size": 32, "blocks": {"llama": block}, "pattern": f"llama*{layers}"} | fields


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("softmax@1,3,5=lightning", (1, 3, 5)),
        ("attention@0-2=lightning", (0, 1, 2)),
        ("llama@ 4 , 0-1 = lightning", (0, 1, 4)),
        ("softmax=lightning", (0, 1, 2, 3, 4, 5)),
        ("softmax@5={kind: mamba2, head_dim: 8, state_size: 8, num_heads: 4, num_groups: 4}", (5,)),
    ],
)
def test_what_is_replaced(text, layers):
    before = zoo.load_config(llama())
    hybrid = hybridize(before, [text])
    assert hybrid.replaced == layers
    for i, (old, new) in enumerate(zip(before.layers, hybrid.config.layers, strict=True)):
        assert (new.mixer.kind == "attention") == (i not in layers)
        assert new.ffn == old.ffn and (i in layers or new == old)


def test_one_after_the_other():
    hybrid = hybridize(zoo.load_config(llama()), ["softmax@1=lightning", "softmax@2-3=mamba2"])
    assert hybrid.replaced == (1, 2, 3)
    kinds = [layer.mixer.kind for layer in hybrid.config.layers]
    assert kinds == ["attention", "lightning", "mamba2", "mamba2", "attention", "attention"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("softmax", "'softmax': is no replacement; write WHAT@LAYERS=MIXER, such as softmax@1,3,5=lightning"),
        ("softmax@=lightning", "is no replacement"),
        ("@1=lightning", "is no replacement"),
        ("softmax@1,x=lightning", "'x' is no layer; write numbers and ranges such as 1,3,8-15"),
        ("softmax@6=lightning", "layers 6 are not there; the model has 0 to 5"),
        ("softmax@3-2=lightning", "layers 3-2 are not there"),
        ("mamba@1=lightning", "no layer has 'mamba'; .*llama"),
        ("softmax@1=lightening", "unknown mixer 'lightening'; did you mean 'lightning'"),
        ("softmax@1={num_heads: 4}", "is no mixer; write its kind"),
        ("softmax@1={", "softmax@1={"),
        ("softmax@1=none", "takes the mixer away; name the one to put there"),
        ("softmax@1={kind: lightning, heads: 4}", "mixer.heads: unknown key"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ConfigError, match=message):
        hybridize(zoo.load_config(llama()), [text])


def test_a_layer_of_another_kind_is_refused():
    config = hybridize(zoo.load_config(llama()), ["softmax@1=lightning"]).config
    with pytest.raises(ConfigError, match="layer 1 has lightning, not softmax; it stands at 0, 2-5"):
        hybridize(config, ["softmax@0-1=mamba2"])


def test_untouched_layers_stay_equal():
    net = theirs("llama", 1)
    ours, hybrid = zoo.from_hf(net), zoo.from_hf(net, replace=["softmax@1=lightning"])
    before, after = ours.state_dict(), hybrid.state_dict()
    for name, tensor in before.items():
        if not name.startswith("model.layers.1.mixer."):
            assert torch.equal(after[name], tensor), name
    tokens = ids(net)
    one, other = (model(tokens, output_hidden_states=True).hidden_states for model in (ours, hybrid))
    assert torch.equal(one[1], other[1]) and not torch.equal(one[2], other[2])
    hybrid.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hybrid.parameters())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_lightning_takes_q_k_v_and_o(kv_heads):
    """Without SiLU, decay and norm it would be unnormalised linear attention over the same q, k and v."""
    config = llama(2)
    config["blocks"]["llama"]["mixer"]["num_kv_heads"] = kv_heads
    ours = zoo.build(config)
    hybrid = _hybrid(ours, "softmax@1=lightning")
    old, new = ours.model.layers[1].mixer, hybrid.model.layers[1].mixer
    x = torch.randn(2, 5, 32)
    q, k, v = new.qkv_proj(x).unflatten(-1, (4, 24)).split(8, dim=-1)
    for part, projection in ((q, old.q_proj), (k, old.k_proj), (v, old.v_proj)):
        expected = projection(x).unflatten(-1, (-1, 8))
        assert relative_error(part, expected.repeat_interleave(4 // expected.shape[2], 2)) < 1e-6
    assert torch.equal(new.o_proj.weight, old.o_proj.weight)


def test_mamba2_takes_q_k_v_and_o():
    ours = zoo.build(llama(2))
    hybrid = _hybrid(ours, "softmax@0=mamba2")
    old, new = ours.model.layers[0].mixer, hybrid.model.layers[0].mixer
    x = torch.randn(2, 5, 32)
    _, values, B, C, _ = new.in_proj(x).split([32, 32, 32, 32, 4], dim=-1)
    for part, projection, repeats in ((C, old.q_proj, 1), (B, old.k_proj, 2), (values, old.v_proj, 2)):
        expected = projection(x).unflatten(-1, (-1, 8)).repeat_interleave(repeats, 2).flatten(-2)
        assert relative_error(part, expected) < 1e-6
    assert torch.equal(new.out_proj.weight, old.o_proj.weight)
    assert torch.equal(new.conv.weight[:, -1], torch.ones(96)) and not new.conv.weight[:, :-1].any()


def test_tensors_of_the_same_name_and_shape_are_kept():
    """Another window, and half of the key heads: q and o fit, k and v do not."""
    ours = zoo.build(llama(2))
    same = _hybrid(ours, "softmax@0={kind: attention, window: 4}")
    tokens = torch.randint(0, 40, (1, 4))
    assert torch.equal(same.eval()(tokens).logits, ours.eval()(tokens).logits)
    half = _hybrid(ours, "softmax@0={kind: attention, num_kv_heads: 1}").model.layers[0].mixer
    old = ours.model.layers[0].mixer
    assert torch.equal(half.q_proj.weight, old.q_proj.weight) and torch.equal(half.o_proj.weight, old.o_proj.weight)
    assert half.k_proj.weight.shape == (8, 32) and half.k_proj.weight.std() > 0


def test_the_landmark_token_comes_and_goes_with_its_mixers(tmp_path):
    tokens = torch.randint(0, 40, (1, 9))
    with_landmarks = _hybrid(zoo.build(llama(2)), "softmax@1={kind: landmark, block_size: 4}")
    assert with_landmarks.model.landmark.weight.std() > 0 and with_landmarks(tokens).logits.isfinite().all()
    with_landmarks.save_pretrained(tmp_path)
    kept = zoo.from_hf(tmp_path, replace=["softmax=lightning"])
    assert torch.equal(kept.model.landmark.weight, with_landmarks.model.landmark.weight)
    assert zoo.from_hf(tmp_path, replace=["landmark=lightning"]).model.landmark is None


@pytest.mark.parametrize(
    ("family", "index"), [("qwen3", 0), ("olmo2", 0), ("gemma2", 0), ("gpt_oss", 0), ("smollm3", 0)]
)
def test_a_mixer_of_the_same_kind_keeps_what_is_not_said(family, index):
    """Norms, windows, scales, caps, sinks and the lack of positions."""
    net = theirs(family, index)
    tokens = ids(net)
    same = zoo.from_hf(net, replace=["softmax=attention"])
    assert torch.equal(same(tokens).logits, zoo.from_hf(net)(tokens).logits)
    narrow = zoo.from_hf(net, replace=["softmax={kind: attention, window: 3}"])
    assert {layer.mixer.config.window for layer in narrow.config.layers} == {3}


def test_what_shares_its_weights_is_refused():
    with pytest.raises(ConfigError, match="layer 0 shares its weights or reads the embeddings; leave it out"):
        zoo.from_hf(theirs("zamba2", 0), replace=["softmax=lightning"])


def test_rates_stay_float32():
    net = theirs("llama", 0, torch.bfloat16)
    hybrid = zoo.from_hf(net, replace=["softmax@0=mamba2"])
    mixer = hybrid.model.layers[0].mixer
    assert mixer.A_log.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16


def _hybrid(model, text):
    """The same weights with other mixers, through a folder of transformers' as the user would."""
    return zoo.from_hf(zoo.to_hf(model), replace=[text])
