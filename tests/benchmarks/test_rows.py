"""The arithmetic from timings to rows."""

import pytest

from benchmarks.rows import Work, figures, make_row, rounded, summary
from benchmarks.timing import Timing

IDENTITY = {"what": "llama", "pass": "training step", "dtype": "float32", "shape": {"batch": 2, "length": 8}}
PEAKS = {"float32": 1000.0, "bfloat16": 4000.0, "copy": 50.0}


def row(**more):
    timings = {"zoo": Timing(0.5, 0.4, 9, None), "other": Timing(1.0, 0.9, 9, None), "peer": Timing(2.0, 1.0, 1, 64)}
    return make_row(IDENTITY, timings, Work(16, flops=100, bytes=10), PEAKS, ("zoo", "other"), **more)


def test_rates_and_fractions_are_of_the_median():
    found = figures(Timing(0.5, 0.4, 9, 64), Work(16, flops=100, bytes=10), PEAKS, "float32")
    assert found == {
        "ms": 500,
        "min_ms": 400,
        "count": 9,
        "tokens_per_s": 32,
        "flops_per_s": 200,
        "flop_fraction": 0.2,
        "bytes_per_s": 20,
        "byte_fraction": 0.4,
        "peak_bytes": 64,
    }


def test_what_is_not_known_is_left_out():
    found = figures(Timing(0.5, 0.4, 9, None), Work(16, flops=100), {}, "float32")
    assert found.keys() == {"ms", "min_ms", "count", "tokens_per_s", "flops_per_s"}


def test_the_fraction_is_of_the_peak_of_the_same_dtype():
    found = figures(Timing(0.5, 0.4, 9, None), Work(16, flops=100), PEAKS, "bfloat16")
    assert found["flop_fraction"] == pytest.approx(0.05)


def test_ours_have_their_ratio_to_each_peer():
    candidates = row()["candidates"]
    assert candidates["zoo"]["ratios"] == {"peer": 4}
    assert candidates["other"]["ratios"] == {"peer": 2}
    assert "ratios" not in candidates["peer"]


def test_a_row_says_what_it_is_and_what_it_was_measured_with():
    found = row(parameters=3)
    assert {name: found[name] for name in IDENTITY} == IDENTITY
    assert found["parameters"] == 3
    assert found["floor"] == {"flops": 100, "bytes": 10}
    assert {"torch", "transformers", "threads"} <= found["versions"].keys()


def test_four_digits():
    assert rounded(123456.0) == 123500
    assert rounded(0.000123456) == 0.0001235


def test_the_summary_says_the_times_and_the_ratios():
    said = summary(row())
    assert "llama, training step, float32, batch 2 length 8" in said
    assert "zoo 500 ms (4x peer)" in said and "peer 2000 ms" in said


def test_a_median_far_above_the_minimum_is_called_noisy():
    assert "noisy" in summary(row())
    quiet = row()
    del quiet["candidates"]["peer"]
    assert "noisy" not in summary(quiet)
