"""kill -9 in the middle, then --ckpt_path last: as if nothing had happened, bit for bit. Real processes."""

import copy
import json
import os
import signal
import time

import torch

from tests.train import helpers
from tests.train.helpers import MODEL, column, run, start, write_run

EXACT = ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss", "val/bpb")


OPTIONS = ["--model.optimizer=muon", "--model.schedule=wsd", "--trainer.accumulate_grad_batches=2"]


ROUTER = {"kind": "sigmoid", "correction_bias": True, "correction_rate": 0.05}


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    model = copy.deepcopy(MODEL)
    model["blocks"]["lightning"]["ffn"]["router"] = ROUTER  # its correction bias moves outside the optimiser
    monkeypatch.setattr(helpers, "MODEL", model)
    arguments = [
        "fit",
        "--config",
        str(write_run(tmp_path)),
        "--trainer.max_steps=24",
        "--checkpoint.every_n_steps=5",
        *OPTIONS,
    ]
    status, stderr = run([*arguments, "--trainer.default_root_dir=whole"], tmp_path)
    assert status == 0, stderr

    victim = start([*arguments, "--trainer.default_root_dir=killed"], tmp_path)
    metrics_file = tmp_path / "killed" / "metrics.csv"
    while not metrics_file.exists() or max(column(tmp_path / "killed", "train/loss"), default=0) < 6:
        assert victim.poll() is None, victim.stderr.read()
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    resumed_from = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 5 <= resumed_from < 24

    status, stderr = run([*arguments, "--trainer.default_root_dir=killed", "--ckpt_path=last"], tmp_path)
    assert status == 0, stderr
    for name in EXACT:
        whole = column(tmp_path / "whole", name)
        assert max(whole) == 24
        assert column(tmp_path / "killed", name) == whole, name
    assert len(column(tmp_path / "whole", "train/loss")) == 24
    assert len(set(column(tmp_path / "whole", "train/loss").values())) == 24

    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "killed")]
    assert samples[0] == samples[1]
    assert [json.loads(line)["step"] for line in samples[0].splitlines()] == [6, 12, 18, 24]
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")
    ]
    assert all(torch.equal(tensor, ends[1]["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())
    assert ends[0]["state_dict"]["model.model.layers.0.ffn.router.correction_bias"].any()
