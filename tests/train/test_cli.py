"""train.py: the command line, its errors, and what a run leaves behind."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import zoo
from tests.train.helpers import MODEL, ROOT, column, run, write_run
from zoo.train.cli import main, split_model_overrides
from zoo.train.errors import UserError

LOAD = """
import sys, torch, zoo
from tests.models.helpers import realigned
from transformers import AutoModelForCausalLM, AutoTokenizer
model = realigned(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def main(", return_tensors="pt").input_ids
torch.save((ids, model(ids).logits), sys.argv[2])
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Works in a folder of its own; returns the arguments of a fit there."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", "tiny.yaml"]


def test_a_run_leaves_all_it_promises(tiny, tmp_path, capfd):
    overrides = ["--model.config.blocks.softmax.mixer.num_heads", "4", "--model.config.pattern=(lightning*2 softmax)"]
    assert main([*tiny, *overrides]) == 0
    folder = tmp_path / "runs" / "tiny"
    assert "held-out text after step 12" in capfd.readouterr().err
    assert sorted(column(folder, "train/loss")) == list(range(1, 13))
    assert sorted(column(folder, "val/bpb")) == [6, 12]
    assert (folder / "report.html").exists()
    assert any((folder / "tensorboard").glob("events*"))
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()] == [6, 12]

    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["config"]["blocks"]["softmax"]["mixer"]["num_heads"] == 4
    assert resolved["model"]["config"]["pattern"] == "(lightning*2 softmax)"
    assert resolved["model"]["config"] == yaml.safe_load((folder / "export" / "model.yaml").read_text())
    assert (folder / "export" / "train.yaml").read_text() == (folder / "config.yaml").read_text()

    # Another process loads the export and computes what the checkpoint's weights compute here.
    subprocess.run([sys.executable, "-c", LOAD, str(folder / "export"), "out.pt"], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    ids, logits = torch.load("out.pt")
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = zoo.build(resolved["model"]["config"]).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    assert torch.equal(model(ids).logits, logits)

    # config.yaml repeats the run, in a folder of its own; and validate gives the run's last figure.
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    assert column(tmp_path / "runs" / "tiny-2", "train/loss") == column(folder, "train/loss")
    capfd.readouterr()
    assert main(["validate", "--config", str(folder / "config.yaml"),
                 "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]) == 0  # fmt: skip
    assert column(folder, "val/bpb")[12][:8] in capfd.readouterr().out


def test_mixed_precision_muon_and_accumulation(tiny, tmp_path):
    options = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2", "--model.optimizer=muon"]
    assert main([*tiny, *options, "--model.schedule=wsd", "--trainer.max_steps=4", "--data.batch_size=1"]) == 0
    losses = column(tmp_path / "runs" / "tiny", "train/loss")
    assert sorted(losses) == [1, 2, 3, 4]
    assert sorted(column(tmp_path / "runs" / "tiny", "val/bpb")) == [3, 4]  # after six batches, and after the last step
    assert all(3 < float(loss) < 7 for loss in losses.values())


def test_two_processes_equal_one(tiny, tmp_path):
    """Two ranks with one sequence each take the same steps as one rank with two sequences: each rank reads its own
    part, and the loss is the mean over the tokens of both."""
    options = ["--trainer.max_steps=3", "--model.config.pattern=softmax", "--samples.every_n_steps=0"]
    assert main([*tiny, *options, "--trainer.default_root_dir=one"]) == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1", "--trainer.default_root_dir=two"]
    status, stderr = run([*tiny, *options, *two], tmp_path)
    assert status == 0, stderr
    assert stderr.count("run folder") == 1
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        one, both = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert one.keys() == both.keys() and one
        for step, value in one.items():
            assert float(both[step]) == pytest.approx(float(value), rel=1e-5), (name, step)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny, tmp_path, capfd):
    assert main([*tiny, "--model.learning_rate=1e30", "--trainer.gradient_clip_val=0", "--model.warmup_steps=0"]) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "the loss is nan" in error[0] or "the loss is inf" in error[0] or "gradient is not finite" in error[0]
    assert "model." in error[0] and "step " in error[0]


ERRORS = {
    "no such config": (["--config", "gone.yaml"], "gone.yaml: no such file"),
    "no such model": (["--model.config", "gone.yaml"], "gone.yaml: no such file"),
    "unknown option": (["--model.learning_rte", "1"], "model.learning_rte: unknown option; did you mean model.lear"),
    "wrong type": (["--model.learning_rate", "fast"], "model.learning_rate: Expected a float, got: fast"),
    "unknown choice": (["--model.optimizer", "adam"], "model.optimizer: Expected one of ['adamw', 'muon'], got: adam"),
    "model field of a wrong type": (
        ["--model.config.blocks.lightning.mixer.num_heads", "two"],
        "blocks.lightning.mixer.num_heads",
    ),
    "model field unknown": (["--model.config.blocks.softmax.mixer.heads=2"], "blocks.softmax.mixer.heads: unknown key"),
    "bad pattern": (["--model.config.pattern", "lightning*("], "pattern"),
    "value missing": (["--model.config.pattern"], "--model.config.pattern: a value is missing"),
    "no gpu": (["--trainer.accelerator", "cuda"], "no usable CUDA GPU; write --trainer.accelerator cpu"),
    "no length": (["--trainer.max_steps=-1"], "trainer.max_steps: -1 is not a length of a run"),
    "no such checkpoint": (["--ckpt_path", "gone.ckpt"], "gone.ckpt: no such checkpoint"),
    "nothing to resume": (["--ckpt_path", "last"], "runs/tiny/checkpoints/last.ckpt: no such checkpoint"),
    "broken checkpoint": (["--ckpt_path", "broken.ckpt"], "broken.ckpt: unreadable checkpoint"),
    "other architecture": (
        ["--ckpt_path", "other.ckpt"],
        "other.ckpt: checkpoint of another architecture: hidden_size is 64 in the checkpoint and 32 in the",
    ),
    "vocabulary too small": (
        ["--model.config.vocab_size", "100"],
        "vocab_size: 100 is smaller than the tokenizer's 258 tokens; write --model.config.vocab_size 320",
    ),
    "no such text": (["--data.source", "gone.txt"], "gone.txt"),
    "unknown strategy": (["--trainer.strategy", "magic"], "invalid strategy name"),
    "unknown section": (["--config", "section.yaml"], "trainr.max_steps: unknown option; did you mean trainer.max"),
    "not yaml": (["--config", "broken.yaml"], "broken.yaml: line 2"),
    "sampling": (["--samples.top_p", "2"], "samples.top_p: 2.0 is out of range; give above 0 and at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_line(name, tiny, tmp_path, capfd):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "broken.yaml").write_text("model: {config: [a\n")
    (tmp_path / "section.yaml").write_text("trainr: {max_steps: 3}\n")
    other = zoo.load_config(MODEL | {"hidden_size": 64}).to_mapping()
    torch.save({"state_dict": {}, "zoo_config": other}, tmp_path / "other.ckpt")
    arguments, message = ERRORS[name]
    assert main([*tiny, *arguments]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_the_processs_exit_status_and_stderr(tiny, tmp_path):
    status, stderr = run([*tiny, "--model.config.pattern", "lightning nothing"], tmp_path)
    assert status == 2
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ") and "nothing" in stderr


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, tmp_path, capfd):
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine" / "checkpoints" / "last.ckpt").write_text("precious")
    assert main([*tiny, "--trainer.default_root_dir", "mine"]) == 2
    assert "mine holds a run already; go on with it by --ckpt_path last" in capfd.readouterr().err
    assert (tmp_path / "mine" / "checkpoints" / "last.ckpt").read_text() == "precious"


def test_print_config_can_be_given_back(tiny, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--model.config.pattern", "softmax*2", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["model"]["overrides"] == ["pattern=softmax*2"]
    assert printed["trainer"]["max_steps"] == 12


def test_overrides_are_taken_out_of_the_command_line():
    argv = ["fit", "--model.config", "m.yaml", "--model.config.a.b", "8", "--model.lr=1", "--model.config.c=x=y", "--z"]
    assert split_model_overrides(argv) == [
        "fit", "--model.config", "m.yaml", "--model.lr=1", "--z", '--model.overrides+=["a.b=8", "c=x=y"]'
    ]  # fmt: skip
    assert split_model_overrides(["fit", "--model.config=m.yaml"]) == ["fit", "--model.config=m.yaml"]
    with pytest.raises(UserError, match=r"--model.config.a: a value is missing"):
        split_model_overrides(["--model.config.a", "--other"])


def test_a_patterns_caret_stays_below_its_place(tiny, capfd):
    assert main([*tiny, "--model.config.pattern", "lightning (softmax"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].endswith("pattern: this parenthesis is never closed")
    assert lines[1:] == ["  lightning (softmax", "            ^"]
