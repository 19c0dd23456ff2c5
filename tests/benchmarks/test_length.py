"""Cost per token at two lengths."""

import subprocess
import sys

import pytest

from benchmarks.length import ROOT, combine, in_own_process
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


EARLIER_PEAK = """
import torch
from benchmarks.length import peak_of_a_step
assert torch.ones(1 << 27).sum() > 0  # half a gigabyte, gone again
print(peak_of_a_step("mamba2", "float32", 4096, 32))
"""


def test_an_earlier_peak_does_not_count():
    """In a process of its own: this one may have been told to keep freed memory."""
    done = subprocess.run([sys.executable, "-c", EARLIER_PEAK], check=True, capture_output=True, text=True, cwd=ROOT)
    assert 4096 * 32 * 4 < int(done.stdout) < 1 << 28
