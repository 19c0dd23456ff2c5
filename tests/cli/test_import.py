"""`zoo import` and `zoo export`, as a user types them."""

import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.helpers import ENVIRONMENT, ZOO, fails
from tests.models.families.parity import ids, theirs
from zoo.cli import main
from zoo.hub.folders import convert


@pytest.fixture
def llama(tmp_path):
    net = theirs("llama", 1)
    net.save_pretrained(tmp_path / "llama")
    return net


def zoo(*arguments, folder):
    return subprocess.run([*ZOO, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_there_and_back_in_processes_of_their_own(llama, tmp_path):
    done = zoo("import", "llama", "ours", "--shard-size", "10KB", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 layers, hidden size 24, vocabulary 41" in done.stdout
    assert "ours: llama as zoo, " in done.stdout
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    done = zoo("export", "ours", "back", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, tensor in llama.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_llama_becomes_a_hybrid(llama, tmp_path, capsys):
    ours = str(tmp_path / "ours")
    assert main(["import", str(tmp_path / "llama"), ours, "--replace", "softmax@1=lightning"]) == 0
    assert "lightning + mlp" in capsys.readouterr().out
    hybrid = AutoModelForCausalLM.from_pretrained(ours)
    assert [layer.mixer.kind for layer in hybrid.config.layers] == ["attention", "lightning", "attention"]
    assert hybrid(ids(llama)).logits.isfinite().all()
    capsys.readouterr()
    message = fails(["export", ours, str(tmp_path / "back")], capsys)
    assert (
        message.startswith("no family of transformers has this model; of the nearest, it is no ")
        and not (tmp_path / "back").exists()
    )
    assert main(["export", ours, str(tmp_path / "again"), "--format", "zoo"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.to_mapping() == hybrid.config.to_mapping()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in hybrid.state_dict().items())


def test_overrides(llama, tmp_path, capsys):
    ours = str(tmp_path / "ours")
    arguments = ["--override", "blocks.llama.mixer.window=5", "--override", "initializer_range=0.1"]
    assert main(["import", str(tmp_path / "llama"), ours, *arguments]) == 0
    config = AutoModelForCausalLM.from_pretrained(ours).config
    assert config.layers[0].mixer.config.window == 5 and config.initializer_range == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "out"], "nowhere: has no config.json; give the folder of a transformers checkpoint"),
        (["import", "llama"], "DST is missing; `zoo COMMAND --help` says what it is"),
        (["import", "llama", "llama"], "llama: is there already; give a folder that is not"),
        (["import", "llama", "out", "--shard-size", "none"], "--shard-size: must be a size such as 5GB or"),
        (["import", "llama", "out", "--shard-size", "0"], "--shard-size: must be a size such as 5GB or 200MB, got '0'"),
        (["import", "llama", "out", "--replace", "mamba=lightning"], "'mamba=lightning': no layer has 'mamba'; "),
        (["import", "llama", "out", "--override", "window=5"], "window: unknown key; "),
        (["export", "llama", "out", "--format", "gguf"], "--format: must be one of zoo, native, got 'gguf'"),
    ],
)  # fmt: skip
def test_mistakes(arguments, message, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails(arguments, capsys).startswith(message)
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_progress(llama, tmp_path, capsys):
    convert(tmp_path / "llama", tmp_path / "quiet", "zoo")
    assert capsys.readouterr().err == ""
    convert(tmp_path / "llama", tmp_path / "loud", "zoo", progress=True)
    assert "100%" in capsys.readouterr().err
