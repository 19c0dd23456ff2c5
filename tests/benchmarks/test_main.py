"""The command, each verb once at a tiny size."""

import json

import pytest

from benchmarks import machine
from benchmarks.__main__ import main
from zoo.ops.measured import Row

CALLS = {
    "ops": ["--only", "selective_scan"],
    "train": ["--only", "mamba2"],
    "decode": ["--only", "minimax"],
    "length": ["--only", "lightning"],
    "context": ["--only", "landmark"],
    "stream": ["--only", "stream"],
}


@pytest.mark.parametrize("verb", CALLS)
def test_a_verb_measures_and_writes_its_rows(verb, tmp_path, capsys):
    main([verb, "--quick", "--dtype", "float32", "--results", str(tmp_path), *CALLS[verb]])
    results = machine.read(machine.path("cpu", tmp_path))
    rows = results.pop(verb)
    assert {row["what"] for row in rows} == {CALLS[verb][1]}
    assert all(candidate["ms"] > 0 for row in rows for candidate in row["candidates"].values())
    assert all(candidate["flop_fraction"] > 0 for row in rows for candidate in row["candidates"].values())
    assert results["peaks"].keys() == {"float32", "bfloat16", "copy"}
    assert all(results[other] == [] for other in machine.SECTIONS if other != verb)
    out = capsys.readouterr().out
    assert f"{CALLS[verb][1]}, {rows[0]['pass']}, float32" in out and f"wrote {len(rows)} rows" in out
    main(["report", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert rows[0]["what"] in (tmp_path / "docs/performance.md").read_text()


def test_table_writes_what_dispatch_reads(tmp_path):
    shape = {"variant": None, "batch": 1, "length": 1, "heads": 1, "width": 8}
    row = {"what": "causal_conv1d", "pass": "decode", "dtype": "float32", "shape": shape}
    row["candidates"] = {"torch": {"ms": 1.0}, "triton": {"ms": 2.0}}
    machine.write(tmp_path / "results/gpu.json", {"machine": {"device": "cuda", "name": "GPU"}, "ops": [row]})
    main(["table", "--results", str(tmp_path / "results"), "--table", str(tmp_path / "measured.json")])
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert [Row(**each).milliseconds for each in rows] == [{"triton": 2.0, "torch": 1.0}]


def test_an_unknown_name_is_one_line():
    with pytest.raises(SystemExit, match="there is no 'gpt' to measure; choose one of jamba, llama, mamba2"):
        main(["decode", "--only", "gpt"])


def test_a_row_that_fails_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    from benchmarks import decode

    measure = decode.measure

    def sometimes(name, dtype, pass_, options):
        if pass_ == "loop":
            raise MemoryError("too large")
        return measure(name, dtype, pass_, options)

    monkeypatch.setattr(decode, "measure", sometimes)
    with pytest.raises(SystemExit, match="failed: llama float32 loop"):
        main(["decode", "--quick", "--dtype", "float32", "--only", "llama", "--results", str(tmp_path)])
    assert "MemoryError: too large" in capsys.readouterr().out
    assert len(machine.read(machine.path("cpu", tmp_path))["decode"]) == 1


def test_only_the_peers_asked_for(tmp_path):
    main(["train", "--quick", "--peer", "fla", "--only", "llama", "--results", str(tmp_path)])
    rows = machine.read(machine.path("cpu", tmp_path))["train"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert all(row["candidates"].keys() == {"zoo"} for row in rows)
