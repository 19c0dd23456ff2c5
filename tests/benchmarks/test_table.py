"""zoo/ops/measured.json, made of the ops sections."""

import torch

from benchmarks.table import make_table
from zoo.ops import measured


def row(what, pass_, length, width, milliseconds, variant=None):
    shape = {"variant": variant, "batch": 1, "length": length, "heads": 1, "width": width}
    candidates = {name: {"ms": ms} for name, ms in milliseconds.items()}
    return {"what": what, "pass": pass_, "dtype": "bfloat16", "shape": shape, "candidates": candidates}


def results(*rows, device="cuda"):
    return [{"machine": {"device": device, "name": "NVIDIA H200"}, "ops": list(rows)}]


def test_forward_and_backward_count_and_forward_alone_for_one_token():
    made = make_table(
        results(
            row("selective_scan", "forward", 2048, 512, {"torch": 1, "triton": 2}),
            row("selective_scan", "forward+backward", 2048, 512, {"torch": 3, "triton": 4, "reference": 1, "fla": 1}),
            row("selective_scan", "decode", 1, 512, {"torch": 5, "triton": 6}),
        )
    )
    named = {"op": "selective_scan", "device": "NVIDIA H200", "dtype": "bfloat16", "width": 512}
    assert made["rows"] == [
        named | {"length": 1, "milliseconds": {"triton": 6, "torch": 5}},
        named | {"length": 2048, "milliseconds": {"triton": 4, "torch": 3}},
    ]


def test_variants_are_added_up_over_the_backends_that_ran_all_of_them():
    made = make_table(
        results(
            row("linear_attention", "forward+backward", 64, 64, {"torch": 1, "triton": 2, "library": 1}, "per head"),
            row("linear_attention", "forward+backward", 64, 64, {"torch": 10, "triton": 20}, "per token"),
        )
    )
    assert [each["milliseconds"] for each in made["rows"]] == [{"triton": 22, "torch": 11}]


def test_where_there_is_nothing_to_choose_there_is_no_row():
    assert make_table(results(row("causal_conv1d", "decode", 1, 8, {"torch": 1, "reference": 2}))) == {"rows": []}


def test_a_cpu_is_any_cpu():
    made = make_table(results(row("causal_conv1d", "decode", 1, 8, {"torch": 1, "library": 2}), device="cpu"))
    assert made["rows"][0]["device"] == "cpu"


def test_dispatch_reads_what_is_made(monkeypatch):
    made = make_table(results(row("causal_conv1d", "forward+backward", 64, 8, {"torch": 2, "triton": 1})))
    monkeypatch.setattr(measured, "rows", lambda: tuple(measured.Row(**each) for each in made["rows"]))
    measured.by_length.cache_clear()
    try:
        chosen = measured.fastest("causal_conv1d", "NVIDIA H200", torch.bfloat16, 8, ("torch", "triton"))
        assert chosen == ((64, "triton"),)
    finally:
        measured.by_length.cache_clear()
