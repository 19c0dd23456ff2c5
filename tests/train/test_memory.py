"""keep_freed_memory, and undoing it: a large block freed and asked for again costs no new pages. In its own process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from zoo.train.memory import give_freed_memory_back, keep_freed_memory
for call in {calls}:
    call()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 * 2**20)  # 48 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    faults = []
    for calls in ("[keep_freed_memory]", "[]", "[keep_freed_memory, give_freed_memory_back]"):
        command = [sys.executable, "-c", PROGRAM.format(calls=calls)]
        faults.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert faults[0] < 100 < min(faults[1:])
