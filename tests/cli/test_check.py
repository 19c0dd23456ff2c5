# ruff: noqa: E501  (a case of a table is one line)
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.helpers import MODEL, fails
from zoo.cli import main

TRAIN = """
model:
  config: {model}
  overrides: [pattern=lightning*3 softmax]
  learning_rate: 1.0e-3
data:
  source: python-stdlib
trainer:
  max_steps: 5
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    return path


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_a_model_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["check", str(model)], capsys) == [
        "3 layers, hidden size 32, vocabulary 258",
        "        0 - 1  lightning  lightning + moe",
        "            2  softmax    attention + moe",
    ]


def test_mixers_side_by_side_are_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    branches = [{"kind": "mamba2", "head_dim": 16}, {"kind": "parallel", "branches": [{"kind": "mamba"}]}]
    block = {"mixer": {"kind": "parallel", "branches": branches}}
    model.write_text(yaml.safe_dump({**MODEL, "blocks": {"both": block}, "pattern": "both"}))
    line = "            0  both  parallel(mamba2, parallel(mamba)) + moe"
    assert printed(["check", str(model)], capsys)[1] == line


def test_a_stack_that_repeats_is_shown_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.write_text(model.read_text().replace("lightning*2 softmax", "(lightning*7 softmax)*1250"))
    assert printed(["check", str(model)], capsys) == [
        "10000 layers, hidden size 32, vocabulary 258",
        "1250 times these 8:",
        "        0 - 6  lightning  lightning + moe",
        "            7  softmax    attention + moe",
    ]


def test_a_mistake_names_file_and_field(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.write_text(model.read_text().replace("hidden_size: 32", "hidden_size: 33"))
    message = fails(["check", str(model)], capsys)
    assert (
        message == f"{model}: blocks.lightning.mixer.num_heads: must divide hidden_size (33), got 2; or give head_dim"
    )
    assert fails(["check", str(model.parent)], capsys) == f"{model.parent}: is a folder; give a YAML file"


def test_a_train_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN.format(model=model))
    assert printed(["check", str(path)], capsys)[0] == "4 layers, hidden size 32, vocabulary 258"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.yaml", "train.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate:", "learning_rat:", "{train}: model.learning_rat: unknown option; did you mean model.learning_rate?"),
        ("1.0e-3", "-1.0", "{train}: model.learning_rate: -1.0 is out of range; give above 0"),
        ("max_steps: 5", "max_steps: 0", "{train}: trainer.max_steps: 0 is not a length of a run; give 1 or more"),
        ("softmax]", "sotfmax]", "{train}: {model}: pattern: unknown block 'sotfmax'; did you mean 'softmax'?"),
        ("trainer:", "model:", "{train}: line 8: key 'model' stands twice (first on line 2); remove one"),
    ],
)  # fmt: skip
def test_mistakes_in_a_train_file(
    old: str, new: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN.format(model=model).replace(old, new))
    assert fails(["check", str(path)], capsys) == message.format(train=path, model=model)
