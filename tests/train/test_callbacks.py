"""zoo/train/callbacks and zoo/train/logger.py."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zoo
from tests.train.helpers import MODEL, ROOT
from zoo.data import load_tokenizer
from zoo.train.callbacks import Progress, SafeCheckpointIO, Samples, SequenceLength, Throughput
from zoo.train.callbacks.checkpoint import load_checkpoint
from zoo.train.callbacks.finite import first_module_not_finite
from zoo.train.callbacks.samples import read_samples, undisturbed
from zoo.train.callbacks.sequence_length import Stage
from zoo.train.callbacks.throughput import measure_matmul_peak, training_dtype
from zoo.train.errors import RunError, UserError
from zoo.train.logger import CsvLog, read_metrics

BATCH = {"input_ids": torch.arange(20)[None], "labels": torch.arange(20)[None]}


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(3)}, "global_step": 5}, path)
    assert load_checkpoint(path)["state_dict"]["w"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 5}, path)
    before = path.read_bytes()

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"last.ckpt: checkpoint of step 6 not written: no space left .* is as it was$"):
        SafeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 6, "x": Unwritable()}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


FULL_DISK = """
mount -t tmpfs -o size=300k tmpfs "$1" && exec "$2" -c '
import sys, torch
from pathlib import Path
from zoo.train.callbacks import SafeCheckpointIO
from zoo.train.errors import RunError
path = Path(sys.argv[1]) / "last.ckpt"
SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(40000)}, "global_step": 1}, path)
try:
    SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(40000)}, "global_step": 2}, path)
except RunError as error:
    print(error)
print([p.name for p in path.parent.iterdir()], torch.load(path)["state_dict"]["w"].sum().item())
' "$1"
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="a small tmpfs needs user namespaces",
)
def test_a_really_full_disk_leaves_the_previous_checkpoint(tmp_path):
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(tmp_path), sys.executable],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert "checkpoint of step 2 not written: no space left on the disk" in lines[0], done.stderr
    assert lines[0].endswith("the previous one is as it was")
    assert lines[1] == "['last.ckpt'] 40000.0"


def test_damaged_checkpoints_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"w": torch.ones(5000)}}, whole)
    cut, text, code, plain = (tmp_path / f"{name}.ckpt" for name in ("cut", "text", "code", "plain"))
    cut.write_bytes(whole.read_bytes()[:9000])
    text.write_text("not a checkpoint")
    torch.save({"state_dict": Code()}, code)
    plain.write_bytes(pickle.dumps(Code()))
    for path in (cut, text, code, plain):
        with pytest.raises(UserError, match=rf"^{path}: unreadable checkpoint, .*use another one$"):
            load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match="no such checkpoint; leave --ckpt_path out"):
        load_checkpoint(tmp_path / "gone.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="it holds no state_dict"):
        load_checkpoint(tmp_path / "list.ckpt")


def test_the_first_module_with_a_bad_output_is_named():
    model = zoo.build(MODEL).train()
    assert first_module_not_finite(model, BATCH) is None
    with torch.no_grad():
        model.model.layers[1].ffn.up_proj.weight[3, 3] = float("inf")
    assert first_module_not_finite(model, BATCH) == "model.layers.1.ffn.up_proj (Linear)"
    with torch.no_grad():
        model.model.layers[0].mixer.o_proj.weight[0, 0] = float("nan")
    assert first_module_not_finite(model, BATCH) == "model.layers.0.mixer.o_proj (Linear)"
    assert not any(module._forward_hooks for module in model.modules())


def sampling_trainer(folder, **options):
    return SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=load_tokenizer("bytes")), loggers=[], default_root_dir=str(folder),
        **options,
    )  # fmt: skip


def test_sampling_disturbs_nothing(tmp_path):
    model = zoo.build(MODEL).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    module = SimpleNamespace(model=model, device=torch.device("cpu"))
    state = torch.get_rng_state()
    samples = Samples(every_n_steps=2, prompt="ab", max_new_tokens=5)
    samples.on_train_start(sampling_trainer(tmp_path, global_step=0), module)
    for step in range(1, 6):
        samples.on_train_batch_end(sampling_trainer(tmp_path, global_step=step, max_steps=5), module)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    written = read_samples(tmp_path)
    assert [sample["step"] for sample in written] == [2, 4, 5]
    assert all(sample["prompt"] == "ab" for sample in written)


def test_undisturbed_is_in_evaluation_mode_inside():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    with undisturbed(model):
        assert not model[0].training and not torch.is_grad_enabled()
        torch.rand(3)
    assert model[0].training and torch.is_grad_enabled()


def test_samples_of_a_killed_run_are_replaced(tmp_path):
    lines = [json.dumps({"step": step, "prompt": "", "text": "old"}) for step in (2, 4, 6)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "pro')
    module = SimpleNamespace(model=zoo.build(MODEL), device=torch.device("cpu"))
    samples = Samples(max_new_tokens=2, temperature=0.0)
    samples.sample(sampling_trainer(tmp_path, global_step=4), module)
    samples.sample(sampling_trainer(tmp_path, global_step=5), module)
    assert [(sample["step"], sample["text"] == "old") for sample in read_samples(tmp_path)] == [
        (2, True), (4, False), (5, False)
    ]  # fmt: skip


def test_sequence_length_follows_its_stages():
    lengths = []
    data = SimpleNamespace(sequence_length=512, set_sequence_length=lambda n: lengths.append((step, n)))
    data.set_sequence_length = lambda n: (lengths.append((step, n)), setattr(data, "sequence_length", n))
    callback = SequenceLength([Stage(0, 64), Stage(3, 128), Stage(5, 256)])
    step = 0
    callback.setup(SimpleNamespace(global_step=step, datamodule=data), None, "fit")
    for step in range(1, 8):
        callback.on_train_batch_end(SimpleNamespace(global_step=step, datamodule=data), None)
    assert lengths == [(0, 64), (3, 128), (5, 256)]

    data.sequence_length, lengths[:] = 512, []
    step = 4  # resumed
    callback.setup(SimpleNamespace(global_step=step, datamodule=data), None, "fit")
    assert lengths == [(4, 128)]
    with pytest.raises(UserError, match=r"sequence_length.stages"):
        SequenceLength([Stage(5, 64), Stage(3, 128)])


def test_throughput_counts_all_tokens_between_two_logged_steps(monkeypatch):
    clock = iter([10.0, 10.5, 12.0])  # start of training, end of step 1, end of step 2
    monkeypatch.setattr("zoo.train.callbacks.throughput.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("zoo.train.callbacks.throughput.measure_matmul_peak", lambda *_: 1000.0)
    logged = {}
    module = SimpleNamespace(
        device=torch.device("cpu"), model=SimpleNamespace(flops=lambda batch, length: 10 * batch * length),
        log=lambda name, value, **_: logged.update({name: value}),
    )  # fmt: skip
    trainer = SimpleNamespace(
        global_step=0, precision="32-true", world_size=2, log_every_n_steps=2,
        datamodule=SimpleNamespace(sequence_length=8),
    )  # fmt: skip
    batch = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
    throughput = Throughput()
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_start(trainer, module, batch, 0)
    trainer.global_step = 1
    throughput.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {}
    module.batch_requested_at = 11.5  # a second of validation in between does not count
    throughput.on_train_batch_start(trainer, module, batch, 1)
    trainer.global_step = 2
    throughput.on_train_batch_end(trainer, module, None, batch, 1)
    assert logged == {
        "throughput/tokens_per_second": 2 * 32 * 2 / 1.0,
        "throughput/mfu": 2 * 3 * 10 * 32 / 1.0 / 1000.0,
        "throughput/seconds": 1.0,
    }


def test_the_matmul_peak_is_of_the_right_order():
    peak = measure_matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14
    assert training_dtype("bf16-mixed") == torch.bfloat16
    assert training_dtype("32-true") == torch.float32
    assert training_dtype("16-mixed") == torch.float16


def test_the_log_widens_and_keeps_its_rows(tmp_path):
    log = CsvLog(tmp_path)
    log.log_metrics({"train/loss": 2.5, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 2.25}, 1)
    log.log_metrics({"val/bpb": 3.125}, 1)
    rows = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 2.25}, {"step": 2, "val/bpb": 3.125}]
    assert read_metrics(log.path) == rows
    with log.path.open("a") as file:
        file.write("3,2.0,\n4,1.")  # killed while it wrote

    resumed = CsvLog(tmp_path)  # from a checkpoint after step 2
    resumed.log_metrics({"train/loss": 1.5}, 2)
    assert read_metrics(log.path) == [*rows, {"step": 3, "train/loss": 1.5}]
    assert log.path.read_text().startswith("step,train/loss,val/bpb\n1,2.5,\n2,2.25,\n2,,3.125\n3,1.5")


def test_progress_tells_what_it_knows():
    values = {"train/loss": torch.tensor(2.34567), "throughput/tokens_per_second": torch.tensor(41234.5)}
    text = Progress()._text(SimpleNamespace(callback_metrics=values))
    assert text == "loss 2.346  41,234 tokens/s"


@pytest.mark.parametrize(
    ("option", "value"),
    [("every_n_steps", -1), ("prompt", ""), ("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0)],
)
def test_sampling_options_out_of_range_are_named(option, value):
    with pytest.raises(UserError, match=rf"^samples.{option}: .*out of range"):
        Samples(**{option: value})
