from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from tests.cli.helpers import MODEL, fails, save_model
from zoo.cli import main
from zoo.cli.describe import count, size


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    return path


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_the_table_says_what_the_model_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = zoo.build(MODEL, device="meta", dtype=torch.bfloat16)
    lines = printed(["describe", str(model), "--length", "2k", "--batch", "3"], capsys)
    assert lines[0].split() == ["layer", "block", "kind", "parameters", "FLOPs/token", "state"]
    assert lines[2].startswith("0 - 1  lightning x 2    lightning + moe")
    assert lines[3].startswith("2      softmax          attention + moe")
    total = [count(built.num_params()), count(built.flops(1, 2048) / 2048), size(built.state_bytes(1, 2048))]
    assert re.split(r"  +", lines[6]) == ["total", *total]
    assert lines[8] == f"parameters: {built.num_params():,}"
    assert lines[9].startswith(f"active per token: {built.num_active_params():,} (")
    assert lines[10] == f"FLOPs of a forward pass over 2,048 tokens: {count(built.flops(1, 2048))}"
    assert lines[11] == f"state after 2,048 tokens: {size(built.state_bytes(1, 2048))}"
    assert lines[12].startswith("training on 3 x 2,048 tokens, float32, AdamW, no checkpointing: ")


def test_a_saved_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "saved")
    assert printed(["describe", str(tmp_path / "saved")], capsys) == printed(["describe", str(model)], capsys)


def test_a_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    lines = printed(["describe", str(model), "--html", str(page)], capsys)
    text = page.read_text()
    assert text.count("<rect") == 2 * 3 + 3  # two for each layer, one for each kind in the legend
    assert text.count("<tr>") == 5
    assert lines[8] in text
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_page_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(model), "--html", str(tmp_path / "no" / "page.html")]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"error: --html: {tmp_path}/no/page.html: cannot be written (No such file or directory); give another file\n"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert main(["describe", str(model), "--html", str(folder)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    for place in (".", "/"):
        assert main(["describe", str(model), "--html", place]) == 2
        assert capsys.readouterr().err == f"error: --html: {place}: is a folder; give a file\n"
    for place in (tmp_path / ("a" * 300), model / "page.html"):
        assert main(["describe", str(model), "--html", str(place)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --html: {place}: cannot be written (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.yaml"]


def test_a_page_of_a_model_whose_name_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "mod\udcffel.yaml", tmp_path / "page.html"
    path.write_text(yaml.safe_dump(MODEL))
    printed(["describe", str(path), "--html", str(page)], capsys)
    assert "mod\\udcffel.yaml" in page.read_text()


def test_the_longest_length(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["describe", str(model), "--length", "1024G"], capsys)
    assert lines == printed(["describe", str(model), "--length", str(2**40)], capsys)
    assert "state after 1,099,511,627,776 tokens" in lines[11]


def test_a_model_that_is_for_fewer_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixer = {"kind": "linear", "num_heads": 2, "feature_map": "cosformer", "max_length": 20}
    model.write_text(yaml.safe_dump({**MODEL, "blocks": {"cosformer": {"mixer": mixer}}, "pattern": "cosformer"}))
    assert printed(["describe", str(model)], capsys)[2].startswith("0      cosformer        linear + moe")


def test_mistakes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["describe"], capsys) == "FILE is missing; give a model file, or --kinds"
    assert fails(["describe", str(tmp_path)], capsys) == f"{tmp_path}/config.json: no such file; check the path"
    huge = MODEL | {"hidden_size": 2**31 - 1}
    huge["blocks"] = {"lightning": {"mixer": {"kind": "lightning", "num_heads": 2, "head_dim": 2**31 - 1}}}
    model.write_text(yaml.safe_dump(huge | {"pattern": "lightning"}))
    message = f"{model}: a tensor would hold more bytes than 64 bits can count; make the model smaller"
    assert fails(["describe", str(model)], capsys) == message


def test_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["describe", "--kinds"], capsys)
    text = "\n".join(lines)
    for kind in zoo.blocks.kinds():
        assert re.search(rf"^  {kind.name} +\S", text, re.MULTILINE), kind
    fields = {line.split()[0]: line for line in lines if line.startswith("      ")}
    assert fields["rope.theta"].split(maxsplit=1)[1] == "a number > 1, default 10000.0. the base."
    assert fields["num_experts"].split(maxsplit=1)[1] == "a whole number >= 1, required. experts to choose from."
    assert any("optional" in line for line in lines if line.split()[:1] == ["window"])
    assert [name for name, line in fields.items() if re.search(r", (required|optional|default \S+)\.$", line)] == []


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.00 k"), (456.09e9, "456.09 G"), (2e15, "2.00 P")]
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (5 * 2**39, "2.50 TiB")]
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text
