"""The measurements behind `auto`: measured.json, written by `python -m benchmarks table` from benchmarks/results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("measured.json")


class Row(NamedTuple):
    """Medians of forward + backward (of forward alone at length 1) of one op, in milliseconds by backend."""

    op: str
    device: str
    dtype: str
    length: int
    width: int
    milliseconds: dict[str, float]

    def among(self, backends: Sequence[str]) -> dict[str, float]:
        """The milliseconds of those of `backends` that have any."""
        return {name: self.milliseconds[name] for name in backends if name in self.milliseconds}


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


@cache
def rows() -> tuple[Row, ...]:
    """The committed table."""
    return tuple(Row(**row) for row in json.loads(TABLE.read_text())["rows"])


# A plain function with a plain result: what torch.compile takes as a constant.
@torch.compiler.assume_constant_result
def fastest(
    op: str, device: str, dtype: torch.dtype, width: int, backends: tuple[str, ...]
) -> tuple[tuple[int, str], ...]:
    """`(length, backend)` from short to long: the fastest of `backends` at the lengths of `by_length`."""
    rows = by_length(op, device, name_of(dtype), width, backends)
    return tuple((row.length, min(row.among(backends).items(), key=lambda item: item[1])[0]) for row in rows)


@cache
def by_length(op: str, device: str, dtype: str, width: int, backends: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows to compare `backends` by, from short to long: those of the nearest width.

    device  a GPU's name, or "cpu". For a GPU nobody measured, the rows of the others count.
    width   last dimension of the op's first argument: head_dim or channels.
    """
    found = [
        row
        for row in rows()
        if (row.op, row.dtype) == (op, dtype) and (row.device == "cpu") == (device == "cpu") and row.among(backends)
    ]
    found = [row for row in found if row.device == device] or found
    nearest = min((row.width for row in found), key=lambda other: abs(math.log2(other / width)), default=width)
    return tuple(sorted((row for row in found if row.width == nearest), key=lambda row: row.length))
