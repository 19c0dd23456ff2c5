"""How candidates take turns, and the figures made of their samples."""

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import alternate, copy_peak, matmul_peak


def test_candidates_take_turns_and_every_other_round_is_reversed(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0)  # one call per sample
    called = []
    alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, warmup=2, rounds=3)
    assert "".join(called) == "aabb" + "ab" + "ba" + "ab"


def scripted(monkeypatch, durations):
    """Samples that take what the script says."""
    script = {name: iter(values) for name, values in durations.items()}
    monkeypatch.setattr(timing, "_sample", lambda call, repeats, device: (next(script[call()]), 7))
    return {name: lambda name=name: name for name in durations}


def test_median_minimum_and_count(monkeypatch):
    calls = scripted(monkeypatch, {"a": [9, 3, 1, 100], "b": [9, 4, 4, 5]})
    timings = alternate(calls, warmup=1, rounds=3)
    assert timings["a"] == (3, 1, 3, 7)
    assert timings["b"] == (4, 4, 3, 7)


def test_at_least_one_round_and_none_after_the_time_is_up(monkeypatch):
    calls = scripted(monkeypatch, {"a": [5], "b": [6]})
    timings = alternate(calls, warmup=0, rounds=9, seconds=0)
    assert {name: each.count for name, each in timings.items()} == {"a": 1, "b": 1}


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    asked = []

    def sample(call, repeats, device):
        asked.append(repeats)
        return 0.001, None

    monkeypatch.setattr(timing, "_sample", sample)
    alternate({"a": lambda: None}, warmup=1, rounds=2)
    assert asked == [1, 5, 5]


def test_a_sample_is_the_time_of_one_call(monkeypatch):
    clock, calls = iter([100.0, 108.0]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing._sample(lambda: calls.append(1), 4, "cpu") == (2.0, None)
    assert len(calls) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu_is_that_of_the_call_alone():
    held = torch.zeros(1 << 20, device="cuda")
    timings = alternate({"a": lambda: torch.zeros(1 << 18, device="cuda").sum()}, device="cuda", rounds=2)
    assert 1 << 20 <= timings["a"].peak_bytes < held.nbytes


def test_the_peaks_are_those_of_the_fastest_call(monkeypatch):
    monkeypatch.setattr(timing, "alternate", lambda calls, **_: {n: timing.Timing(9, 0.5, 1, None) for n in calls})
    assert matmul_peak("cpu", torch.float32) == 2 * 2048**3 / 0.5
    assert copy_peak("cpu") == 2 * 4 * (1 << 26) / 0.5
