"""Folders in and out: what is written loads, here and in transformers, and a failure leaves nothing."""

import json
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from tests.models.families.parity import CASES, ids, theirs
from zoo.hub.folders import convert
from zoo.models.families import FAMILIES, FamilyError


def saved(folder, family="mixtral", index=0, dtype=torch.float32, **arguments):
    net = theirs(family, index, dtype)
    net.save_pretrained(folder, **arguments)
    return net


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "index"), CASES)
def test_in_and_out_again(family, index, dtype, tmp_path):
    """The folder that comes out holds what went in, and both are models."""
    net = saved(tmp_path / "theirs", family, index, dtype, max_shard_size="20KB")
    result = convert(tmp_path / "theirs", tmp_path / "ours", "zoo", shard_bytes=30_000)
    assert (result.source, result.target) == (family, "zoo") and result.bytes > 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    direct = zoo.from_hf(net)
    assert ours.dtype == dtype and ours.config.to_mapping() == direct.config.to_mapping()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    convert(tmp_path / "ours", tmp_path / "back", "native", family=family, shard_bytes=30_000)
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "back")
    assert set(after) == set(before)
    if family == "olmo_hybrid":  # transformers cuts it into equal parts, whatever the sizes (cases/olmo_hybrid.yaml)
        before, after = _joined(before), _joined(after)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert type(again) is type(net) and not any(report.values())
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def _joined(tensors):
    """With the convolutions of q, k and v of each layer as one tensor."""
    layers = {name.partition("q_conv1d")[0] for name in tensors if "q_conv1d" in name}
    rest = {name: tensor for name, tensor in tensors.items() if "_conv1d." not in name}
    return rest | {layer: torch.cat([tensors[f"{layer}{part}_conv1d.weight"] for part in "qkv"]) for layer in layers}


def test_shards(tmp_path):
    saved(tmp_path / "theirs")
    for size, files in ((10**9, ["model.safetensors"]), (20_000, None)):
        target = tmp_path / str(size)
        convert(tmp_path / "theirs", target, "zoo", shard_bytes=size)
        names = sorted(file.name for file in target.glob("*.safetensors"))
        assert names == files or (len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors")
        for file in target.glob("*.safetensors"):
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= size
        if files is None:
            index = json.loads((target / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"].values()) == set(names)
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(target).values())


def test_tokenizer_and_generation_settings_are_carried_over_and_code_is_not(tmp_path):
    saved(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "theirs" / name).write_text("{}")
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / "theirs" / name).write_text("import os")
    convert(tmp_path / "theirs", tmp_path / "ours", "zoo")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip


def test_overrides_and_replacements(tmp_path):
    net = saved(tmp_path / "theirs", "llama", 1)
    convert(tmp_path / "theirs", tmp_path / "ours", "zoo", overrides=["blocks.llama.mixer.window=7"],
            replace=["softmax@1=lightning"], shard_bytes=5_000)  # fmt: skip
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert [layer.mixer.kind for layer in ours.config.layers] == ["attention", "lightning", "attention"]
    assert ours.config.layers[0].mixer.config.window == 7
    assert torch.equal(ours.model.layers[2].mixer.q_proj.weight, net.model.layers[2].self_attn.q_proj.weight)
    assert ours(ids(net)).logits.isfinite().all()
    # And ours, replaced again.
    convert(tmp_path / "ours", tmp_path / "more", "zoo", replace=["softmax@0=mamba2"])
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert [layer.mixer.kind for layer in more.config.layers] == ["mamba2", "lightning", "attention"]
    assert torch.equal(more.model.layers[1].mixer.qkv_proj.weight, ours.model.layers[1].mixer.qkv_proj.weight)
    with pytest.raises(FamilyError, match="no family of transformers has this model"):
        convert(tmp_path / "ours", tmp_path / "native", "native")
    assert not (tmp_path / "native").exists()


def broken(change, folder):
    """A folder with a mistake in it."""
    saved(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    if change == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-500])
    elif change == "no index":
        (folder / "model.safetensors.index.json").unlink()
    elif change == "no shard":
        shards[-1].unlink()
    elif change == "shape":
        tensors = load_file(shards[-1])
        name = next(reversed(tensors))
        save_file(tensors | {name: torch.zeros(3, 5)}, shards[-1], metadata={"format": "pt"})
    elif change == "pickle":
        for file in [*shards, folder / "model.safetensors.index.json"]:
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif change == "unknown":
        (folder / "config.json").write_text('{"model_type": "mixtrol"}')
    elif change in ("int8", "head"):
        tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
        for file in [*shards, folder / "model.safetensors.index.json"]:
            file.unlink()
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.int8) if change == "int8" else tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if change == "head":
            (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    elif change == "outside":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: f"../theirs/{file}" for name, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (folder / "config.json").write_text(json.dumps(config | json.loads(change)))


@pytest.mark.parametrize("format", ["zoo", "native"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", r"theirs/model-\d+-of-\d+.safetensors: cannot be read"),
        ("no index", r"theirs: has neither model.safetensors nor model.safetensors.index.json"),
        ("no shard", r"theirs/model-\d+-of-\d+.safetensors: cannot be read"),
        ("shape", r": is \[3, 5\], the configuration says \["),
        ("pickle", r"pytorch_model.bin is a pickle and is not read"),
        (
            "int8",
            r"model.layers.0.self_attn.q_proj.weight is int8; supported are float32, bfloat16, float16 and float64",
        ),
        ("head", r"lm_head.weight is not the embedding, which tie_word_embeddings says it is"),
        ("outside", r"is in '../theirs/model-.*'; a shard must lie beside the index"),
        ('{"num_hidden_layers": "x"}', r"config.json: .*num_hidden_layers"),
        ('{"num_hidden_layers": 0}', r"mixtral: num_hidden_layers is 0; give 1 to 10000"),
        ('{"num_attention_heads": 0}', r"(config.json|mixtral): "),
        ('{"num_attention_heads": 31}', r"(config.json|mixtral): "),
        ('{"tie_word_embeddings": null}', r"(config.json|mixtral): "),
        ('{"model_type": ["a"]}', r"unknown model_type \['a'\]"),
        ('{"rope_parameters": {"rope_type": "llama3"}}', r"(config.json|mixtral): "),
        ("unknown", r"config.json: unknown model_type 'mixtrol'; did you mean 'mixtral'"),
    ],
)
def test_a_broken_source_is_one_line_and_nothing_is_left(change, message, format, tmp_path):
    broken(change, tmp_path / "theirs")
    with pytest.raises(FamilyError, match=message) as error:
        convert(tmp_path / "theirs", tmp_path / "out", format, shard_bytes=10_000)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_a_target_that_is_there(tmp_path):
    saved(tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "theirs", tmp_path / "empty", "zoo")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FamilyError, match=r"empty: is there already; give a folder that is not"):
        convert(tmp_path / "theirs", tmp_path / "empty", "zoo")
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/inside"):
        with pytest.raises(FamilyError, match=r"file.*: (is there already|cannot be written)"):
            convert(tmp_path / "theirs", tmp_path / target, "zoo")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])


def peak_of_import(source: str, target: str, queue) -> None:
    """Bytes of the process's own memory (not of files it maps), at its peak, above what they were before."""
    import threading
    import time

    def anonymous() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    start, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(source, target, "zoo", shard_bytes=8_000_000)
    done.set()
    thread.join()
    queue.put(peak - start)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_memory_is_a_shard_and_a_layer(kind, tmp_path):
    """A model of more than 100 MB in shards of 8 MB."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8
    )
    if kind == "experts":
        config = transformers.MixtralConfig(
            vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=8, num_local_experts=16,
        )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config)
    net.save_pretrained(tmp_path / "theirs")
    size = sum(parameter.nbytes for parameter in net.parameters())
    layer = sum(parameter.nbytes for parameter in net.model.layers[0].parameters())
    assert size > 100e6
    queue = (context := multiprocessing.get_context("spawn")).Queue()
    process = context.Process(target=peak_of_import, args=(str(tmp_path / "theirs"), str(tmp_path / "ours"), queue))
    process.start()
    peak = queue.get(timeout=300)
    process.join()
    assert peak < 8e6 + layer + 15e6  # and what Python needs
    assert peak > layer / 2 or kind == "dense"  # whose tensors go from one mapped file to the next


def test_what_is_rounded_is_said(tmp_path):
    net = theirs("mixtral", 0, torch.bfloat16)
    router = net.model.layers[0].mlp.gate.weight
    router.data = router.data.float() + 1e-4 * torch.rand(router.shape)
    net.save_pretrained(tmp_path / "theirs")
    notes = convert(tmp_path / "theirs", tmp_path / "ours", "zoo").notes
    assert notes == ("model.layers.0.block_sparse_moe.gate.weight is rounded from float32 to bfloat16, the model's",)
    with pytest.warns(UserWarning, match="is rounded from float32 to bfloat16"):
        zoo.from_hf(net)


def test_an_index_of_an_earlier_model_is_not_read(tmp_path):
    saved(tmp_path / "theirs", max_shard_size="20KB")
    net = theirs("mixtral", 0)
    save_file(
        {name: tensor.clone() for name, tensor in net.state_dict().items()}, tmp_path / "theirs/model.safetensors"
    )
    for file in (tmp_path / "theirs").glob("model-*"):
        file.unlink()
    assert zoo.from_hf(tmp_path / "theirs").num_params() == zoo.from_hf(net).num_params()


def test_a_terminated_import_leaves_nothing(tmp_path):
    saved(tmp_path / "theirs")
    code = ("import os, signal, zoo.hub.folders as f\n"
            "f.ShardWriter.close = lambda self: os.kill(os.getpid(), signal.SIGTERM)\n"
            "f.convert('theirs', 'deep/er/ours', 'zoo')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 128 + 15
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_targets_by_another_name(tmp_path, monkeypatch):
    saved(tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(tmp_path / "theirs", tmp_path / "link", "zoo")
    assert (tmp_path / "empty" / "config.json").is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(FamilyError, match="family says as which a native folder is written"):
        convert(tmp_path / "theirs", tmp_path / "more", "zoo", family="llama")


def test_every_family_is_in_the_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FamilyError) as error:
        zoo.from_hf(tmp_path)
    assert all(family in str(error.value) for family in FAMILIES)
