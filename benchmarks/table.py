"""zoo/ops/measured.json, what `auto` chooses backends by, from the ops sections of benchmarks/results."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.machine import rounded
from benchmarks.ops import BOTH, DECODE
from zoo.ops.dispatch import UNMEASURED, measured_as


def make_table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows in the form of zoo.ops.measured.Row, where there is more than one backend to choose from.

    Variants of an op at the same length and width are added up, over the backends that all of them ran on, unless the
    op tells them apart.
    """
    found: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for result in results:
        device = result["machine"]["name"] if result["machine"]["device"] == "cuda" else "cpu"
        for row in result["ops"]:
            length, width = row["shape"]["length"], row["shape"]["width"]
            if row["pass"] != (DECODE if length == 1 else BOTH):
                continue
            times = {name: candidate["ms"] for name, candidate in row["candidates"].items() if name in UNMEASURED}
            called = measured_as(row["what"], row["shape"]["variant"])
            found[called, device, row["dtype"], length, width].append(times)
    rows = []
    for (op, device, dtype, length, width), variants in sorted(found.items()):
        common = [name for name in UNMEASURED if all(name in times for times in variants)]
        if len(common) > 1:
            total = {name: rounded(sum(times[name] for times in variants)) for name in common}
            named = {"op": op, "device": device, "dtype": dtype, "length": length, "width": width}
            rows.append(named | {"milliseconds": total})
    return {"rows": rows}
