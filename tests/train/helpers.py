"""A run small enough to take seconds: two layers, one file of Python source."""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]

MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "blocks": {
        "lightning": {
            "mixer": {"kind": "lightning", "num_heads": 2},
            "ffn": {"kind": "moe", "intermediate_size": 32, "num_experts": 4, "top_k": 2},
        },
        "softmax": {
            "mixer": {"kind": "attention", "num_heads": 2, "rope": {"type": "default", "theta": 10000.0}},
            "ffn": {"kind": "mlp", "intermediate_size": 64},
        },
    },
    "pattern": "lightning softmax",
}


def write_run(folder: Path) -> Path:
    """Writes model.yaml and tiny.yaml into `folder` and returns the latter's path."""
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL, sort_keys=False))
    run = {
        "model": {"config": str(folder / "model.yaml"), "warmup_steps": 5, "learning_rate": 3e-3},
        "data": {
            "source": argparse.__file__,
            "cache_dir": str(folder / "cache"),
            "sequence_length": 64,
            "batch_size": 2,
            "validation_fraction": 0.02,
        },
        "trainer": {"accelerator": "cpu", "max_steps": 12, "val_check_interval": 6, "log_every_n_steps": 1},
        "checkpoint": {"every_n_steps": 4},
        "samples": {"every_n_steps": 6, "max_new_tokens": 8},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def metrics(run_folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv with every number as it is written there."""
    with (run_folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run_folder: Path, name: str) -> dict[int, str]:
    """step -> value of one metric."""
    return {int(row["step"]): row[name] for row in metrics(run_folder) if row.get(name)}


def start(arguments: list[str], folder: Path, **options: Any) -> subprocess.Popen:
    """python train.py ARGUMENTS with `folder` as the working directory, in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and stderr of python train.py ARGUMENTS."""
    process = start(arguments, folder)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr
