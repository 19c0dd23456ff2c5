"""Peak memory of a training step against the length: `python -m benchmarks.memory`.

Each measurement is a process of its own: it builds the model, takes one short step so that everything lazy is there,
resets the kernel's record of peak memory, and takes one forward and backward pass over one sequence. The figure is the
peak above what the process held before that step, per token; the claim is that it does not grow with the length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

import zoo
from benchmarks import machine

LENGTHS = (4096, 16384)
STACKS = {
    "lightning": {
        "vocab_size": 512,
        "hidden_size": 256,
        "blocks": {
            "lightning": {
                "mixer": {"kind": "lightning", "num_heads": 4},
                "ffn": {"kind": "mlp", "intermediate_size": 768},
            }
        },
        "pattern": "lightning*8",
        "residual": {"kind": "normalized"},
    },
    "mamba2": {
        "vocab_size": 512,
        "hidden_size": 256,
        "blocks": {"mamba2": {"mixer": {"kind": "mamba2", "state_size": 64}}},
        "pattern": "mamba2*12",
    },
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def status(field: str) -> int:
    """A memory field of this process, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(stack: str, precision: str, length: int) -> int:
    """Bytes at the peak of one training step above what was held before it, in this process."""
    model = zoo.build(STACKS[stack]).train()

    def step(tokens: int) -> None:
        ids = torch.randint(0, 256, (1, tokens))
        dtype = PRECISIONS[precision]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    step(256)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    step(length)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("STACK", "PRECISION", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        stack, precision, length = arguments.one
        print(measure(stack, precision, int(length)))
        return
    rows = []
    for stack in STACKS:
        for precision in PRECISIONS:
            row: dict = {"stack": stack, "precision": precision, "bytes_per_token": {}}
            for length in LENGTHS:
                command = [sys.executable, "-m", "benchmarks.memory", "--one", stack, precision, str(length)]
                peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                row["bytes_per_token"][str(length)] = round(peak / length)
            short, long = (row["bytes_per_token"][str(length)] for length in LENGTHS)
            row["ratio"] = round(long / short, 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print("wrote", machine.write("memory", {"lengths": LENGTHS, "rows": rows}))


if __name__ == "__main__":
    main()
