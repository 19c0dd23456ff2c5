"""The transformers classes: outputs, saving and loading, Auto classes, checkpointing, resizing, packing."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.blocks.helpers import assert_close
from tests.models.helpers import PATTERNS, VOCAB, model, realigned, tokens
from zoo import ZooConfig, ZooForCausalLM
from zoo.models import ZooModel


def test_outputs():
    net, ids = model(), tokens(2, 7)
    out = net(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert out.logits.shape == (2, 7, VOCAB)
    assert len(out.hidden_states) == len(net.model.layers) + 1
    assert torch.equal(out.hidden_states[0], net.get_input_embeddings()(ids))
    assert torch.equal(net.lm_head(out.hidden_states[-1]), out.logits)
    for i, layer in enumerate(net.model.layers[:-1]):
        mixed, *_ = layer(out.hidden_states[i], _context(out.hidden_states[i]))
        assert_close(mixed, out.hidden_states[i + 1])
    as_tuple = net(ids, labels=ids, use_cache=True, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(out.to_tuple()) == 6
    assert torch.equal(as_tuple[1], out.logits)
    assert net(ids).past_key_values is None and net(ids).hidden_states is None


def _context(x):
    from zoo.blocks import SequenceContext

    return SequenceContext.of(x)


@pytest.mark.parametrize("keep", [1, 3, 7, 0])
def test_logits_to_keep(keep):
    net, ids = model(), tokens(2, 7)
    assert_close(net(ids, logits_to_keep=keep).logits, net(ids).logits[:, -keep:])


def test_embeddings_instead_of_ids():
    net, ids = model(), tokens(2, 7)
    assert torch.equal(net(inputs_embeds=net.get_input_embeddings()(ids)).logits, net(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": net.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            net(**arguments)


def test_scales_of_embeddings_and_logits():
    plain, ids = model(), tokens(2, 7)
    scaled = model(embedding_scale=3.0, logit_scale=0.7, logit_softcap=2.0)
    logits = plain(inputs_embeds=3.0 * plain.get_input_embeddings()(ids)).logits
    expected = 2 * torch.tanh(0.7 * logits / 2)
    out = scaled(ids, labels=ids)
    assert_close(out.logits, expected)
    assert_close(scaled(inputs_embeds=scaled.get_input_embeddings()(ids)).logits, expected)
    assert_close(out.cross_entropy, F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_are_rows_alone(pattern, side):
    net, ids = model(pattern), tokens(3, 11)
    lefts, rights = ([5, 0, 2] if side != "right" else [0] * 3), ([4, 7, 0] if side != "left" else [0] * 3)
    mask = torch.ones(3, 11, dtype=torch.long)
    for row, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        mask[row, :left] = 0
        mask[row, 11 - right :] = 0
    logits = net(ids, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        assert_close(logits[row, real], net(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_documents_alone(pattern):
    net, ids = model(pattern), tokens(1, 20)
    offsets = torch.tensor([0, 1, 8, 20], dtype=torch.int32)
    logits = net(ids, cu_seqlens=offsets).logits
    for start, end in [(0, 1), (1, 8), (8, 20)]:
        assert_close(logits[:, start:end], net(ids[:, start:end]).logits)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(pattern, reentrant):
    ids, results = tokens(2, 13), []
    for checkpointing in (False, True):
        net = model(pattern).train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        loss = net(ids, labels=ids).loss
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in net.named_parameters()}))
    (loss, gradients), (other_loss, others) = results
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, f"gradient of {name}")


def test_checkpointing_refuses_a_cache():
    net = model().train()
    net.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="pass use_cache=False"):
        net(tokens(1, 5), use_cache=True)
    assert net.eval()(tokens(1, 5), use_cache=True).past_key_values is not None


def test_checkpointing_recomputes_layers():
    """It is on where it says so: a layer's forward runs twice."""
    calls = []
    for checkpointing in (False, True):
        net, count = model("attention").train(), [0]
        if checkpointing:
            net.gradient_checkpointing_enable()
        net.model.layers[0].mixer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        net(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
        calls.append(count[0])
    assert calls == [1, 2]


LOAD = """
import sys, torch, zoo
from tests.models.helpers import realigned
from transformers import AutoModelForCausalLM
net = realigned(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])))
assert type(net) is zoo.ZooForCausalLM and not net.training
ids = torch.load(sys.argv[3])
torch.save({"logits": net(ids).logits, "dtypes": {n: p.dtype for n, p in net.named_parameters()}}, sys.argv[4])
"""


def test_another_process_loads_what_was_saved(tmp_path):
    """Through AutoModelForCausalLM, after `import zoo`: bit-equal logits."""
    net, ids = model(tie_word_embeddings=False), tokens(2, 9)
    net.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [tmp_path / "model", "float32", tmp_path / "ids.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], check=True)
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["logits"], net(ids).logits)
    assert out["dtypes"] == {name: parameter.dtype for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["50GB", "5KB"])
def test_saving_and_loading(pattern, tied, dtype, shard, tmp_path):
    net, ids = model(pattern, tie_word_embeddings=tied).to(dtype), tokens(2, 9)
    net.save_pretrained(tmp_path, max_shard_size=shard)
    files = {file.name for file in tmp_path.iterdir()}
    assert {name for name in files if not name.endswith((".safetensors", ".json"))} == set()
    weights = [file for file in files if file.endswith(".safetensors")]
    assert (len(weights) > 1) == (shard == "5KB")
    saved = {name for file in weights for name in load_file(tmp_path / file)}
    assert ("lm_head.weight" in saved) == (not tied)
    assert not {name for name in saved if "inv_freq" in name or "log_decay" in name}
    for loaded in (
        ZooForCausalLM.from_pretrained(tmp_path, dtype="auto"),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
    ):
        for name, tensor in (dict(net.named_parameters()) | dict(net.named_buffers())).items():
            other = loaded.get_parameter(name) if name in dict(net.named_parameters()) else loaded.get_buffer(name)
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
        assert torch.equal(realigned(loaded)(ids).logits, net(ids).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert torch.equal(
            loaded.generate(ids, max_new_tokens=3, do_sample=False),
            net.generate(ids, max_new_tokens=3, do_sample=False),
        )


def test_a_float32_checkpoint_loads_in_bfloat16(tmp_path):
    """Weights are rounded, rates are not."""
    net = model()
    net.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(net.to(torch.bfloat16).named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name


def test_auto_classes(tmp_path):
    net = model(eos_token_id=3)
    net.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ZooConfig and config.to_mapping() == net.config.to_mapping()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zoo"
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is ZooModel
    ids = tokens(1, 5)
    out = net(ids, output_hidden_states=True)
    assert torch.equal(realigned(body)(ids).last_hidden_state, out.hidden_states[-1])
    assert type(AutoModelForCausalLM.from_config(config)) is ZooForCausalLM


def test_weights_that_are_missing_are_initialised(tmp_path):
    net = model()
    state = {name: tensor for name, tensor in net.state_dict().items() if "layers.1" not in name}
    net.save_pretrained(tmp_path, state_dict=state)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[2] for name in info["missing_keys"]} == {"1"}
    fresh = loaded.model.layers[1].mixer
    assert torch.equal(fresh.D, torch.ones_like(fresh.D))
    assert torch.equal(fresh.A_log.exp().round(), torch.arange(1.0, 5).expand_as(fresh.A_log))
    assert 0 < fresh.in_proj.weight.std() < 0.1
    assert torch.equal(loaded.model.layers[0].mixer.qkv_proj.weight, net.model.layers[0].mixer.qkv_proj.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(tied, tmp_path):
    net, ids = model(tie_word_embeddings=tied), tokens(1, 6)
    with torch.no_grad():
        before = net(ids).logits
        net.resize_token_embeddings(VOCAB + 7)
        after = net(ids).logits
    assert after.shape[-1] == VOCAB + 7 and net.config.vocab_size == VOCAB + 7
    assert_close(after[..., :VOCAB], before)
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied
    net.train()(ids, labels=ids).loss.backward()
    assert net.lm_head.weight.grad.shape[0] == VOCAB + 7
    net.eval().save_pretrained(tmp_path)
    assert torch.equal(realigned(ZooForCausalLM.from_pretrained(tmp_path))(ids).logits, net(ids).logits)


def test_counts():
    net = model("hybrid", tie_word_embeddings=True)
    assert net.num_params() == sum(parameter.numel() for parameter in net.parameters())
    idle = 2 * 2 * 3 * 16 * 16  # two layers, two of four experts, three matrices
    assert net.num_active_params() == net.num_params() - idle
    untied = model("hybrid", tie_word_embeddings=False)
    assert untied.num_params() == net.num_params() + VOCAB * 16


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_can_overfit(pattern):
    """Every part learns together: the loss of one batch falls far."""
    net = model(pattern).train()
    net.model.apply(lambda module: hasattr(module, "reset_parameters") and module.reset_parameters())
    optimizer, ids = torch.optim.AdamW(net.parameters(), lr=1e-2), tokens(2, 16)
    losses = []
    for _ in range(40):
        loss = net(ids, labels=ids).cross_entropy
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
