"""What the tests of the commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.data.tokenizer import load_tokenizer

ZOO = [sys.executable, "-c", "import sys; from zoo.cli import main; sys.exit(main())"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}

MODEL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "defaults": {"ffn": {"kind": "moe", "intermediate_size": 16, "num_experts": 4, "top_k": 2}},
    "blocks": {
        "lightning": {"mixer": {"kind": "lightning", "num_heads": 2}},
        "softmax": {"mixer": {"kind": "attention", "num_heads": 2}},
    },
    "pattern": "lightning*2 softmax",
}


def save_model(folder: Path, **changes: object) -> zoo.ZooForCausalLM:
    """A model with random weights and the byte tokenizer, as train.py exports them."""
    torch.manual_seed(0)
    model = zoo.build(MODEL | {"initializer_range": 0.3} | changes)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return model.eval()


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that must fail: status 2, one line on stderr, nothing on stdout."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")
