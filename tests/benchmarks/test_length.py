"""Cost per token at two lengths."""

import pytest
import torch

from benchmarks.length import combine, in_own_process, peak_of_a_step
from benchmarks.rows import Options
from benchmarks.timing import Timing


def test_ratios_are_per_token():
    timings = {100: Timing(0.1, 0.1, 5, 1000), 400: Timing(0.6, 0.5, 5, 6000)}
    row = combine("mamba", "float32", timings, {100: 10, 400: 40}, Options(peaks={"float32": 1000}))
    assert row["time_ratio"] == 1.5 and row["memory_ratio"] == 1.5
    assert row["shape"] == {"batch": 1, "short": 100, "length": 400}
    assert row["candidates"]["100 tokens"]["us_per_token"] == 1000
    assert row["candidates"]["400 tokens"]["bytes_per_token"] == 15
    assert row["candidates"]["400 tokens"]["flop_fraction"] == pytest.approx(40 / 0.6 / 1000, rel=1e-3)


def test_the_peak_is_of_the_step_alone_and_grows_with_its_length():
    saved = 4096 * 32 * 4  # bytes of one activation of 4,096 tokens
    assert 4 * saved < in_own_process("lightning", "float32", 4096, Options(quick=True)) < 400 * saved


def test_an_earlier_peak_does_not_count():
    assert torch.ones(1 << 27).sum() > 0  # half a gigabyte, gone again
    assert 4096 * 32 * 4 < peak_of_a_step("mamba2", "float32", 4096, 32) < 1 << 28
