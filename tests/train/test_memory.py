"""keep_freed_memory: a large block that is freed and asked for again costs no new pages. In a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from zoo.train.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 * 2**20)  # 48 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults[True] < 100 < faults[False]
