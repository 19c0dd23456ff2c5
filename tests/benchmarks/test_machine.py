"""The result files."""

import json

import pytest

from benchmarks import machine


def row(what="a", ms=1.0, **shape):
    return {"what": what, "pass": "p", "dtype": "float32", "shape": shape, "ms": ms}


def test_a_machine_is_a_short_name():
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
    assert machine.slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores") == "intel-r-xeon-r-cpu-2-20ghz-2-cores"
    assert machine.path("cpu").parent == machine.RESULTS


def test_a_run_replaces_the_rows_it_measured_and_no_others(tmp_path):
    file = tmp_path / "new" / "m.json"
    machine.record(file, "cpu", {"copy": 1}, "ops", [row(ms=1, length=8), row(ms=1, length=16), row("b", 1)])
    machine.record(file, "cpu", {"copy": 1}, "train", [row(ms=1, length=8)])
    machine.record(file, "cpu", {"copy": 2}, "ops", [row(ms=2, length=8)])
    results = machine.read(file)
    assert [(each["what"], each["shape"], each["ms"]) for each in results["ops"]] == [
        ("a", {"length": 8}, 2),
        ("a", {"length": 16}, 1),
        ("b", {}, 1),
    ]
    assert len(results["train"]) == 1 and results["decode"] == []
    assert results["peaks"] == {"copy": 2}
    assert results["machine"]["device"] == "cpu"


def test_fractions_are_of_the_highest_peak_of_all_runs(tmp_path):
    file = tmp_path / "m.json"
    one, other = row(length=8), row("b")
    for each in (one, other):
        each["candidates"] = {"zoo": {"flops_per_s": 100.0, "flop_fraction": 0.5}}
    peaks = [{each["dtype"]: peak} for each, peak in ((one, 200), (other, 400), (other, 300))]
    machine.record(file, "cpu", peaks[0], "train", [one])
    machine.record(file, "cpu", peaks[1], "train", [other])
    machine.record(file, "cpu", peaks[2], "ops", [])
    results = machine.read(file)
    assert results["peaks"] == peaks[1]
    assert [each["candidates"]["zoo"]["flop_fraction"] for each in results["train"]] == [0.25, 0.25]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "m.json"
    machine.write(file, {"a": 1})
    with pytest.raises(TypeError):
        machine.write(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_cpus_come_before_gpus(tmp_path):
    for name, device in (("a", "cuda"), ("b", "cpu")):
        machine.write(tmp_path / f"{name}.json", {"machine": {"device": device}})
    assert [each["machine"]["device"] for each in machine.read_all(tmp_path)] == ["cpu", "cuda"]
