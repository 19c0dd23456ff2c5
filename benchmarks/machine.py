"""What a figure depends on, and the file it lies in: results/<machine>.json, one section for each verb.

{"machine": ..., "peaks": ..., "ops": [row], "train": [row], "decode": [row], "length": [row],
 "context": [row], "stream": [row]}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("ops", "train", "decode", "length", "context", "stream")
# What a row is about: a new measurement of the same replaces the old one.
IDENTITY = ("what", "pass", "dtype", "shape")
PACKAGES = ("torch", "transformers", "triton", "fla-core", "mamba-ssm", "causal-conv1d")


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the number of its cores here."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def describe(device: str) -> dict[str, Any]:
    """The machine that a result file is about."""
    return {
        "device": torch.device(device).type,
        "name": device_name(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
    }


def versions() -> dict[str, Any]:
    """What a row was measured with: threads and versions, of those packages that are here."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def path(device: str, folder: Path = RESULTS) -> Path:
    """`results/nvidia-h200.json`."""
    return folder / f"{slug(device_name(device))}.json"


def slug(name: str) -> str:
    """`NVIDIA H200` as a file's name: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(file: Path) -> dict[str, Any]:
    """A result file; empty sections where there is none yet."""
    empty = {section: [] for section in SECTIONS}
    return empty | json.loads(file.read_text()) if file.exists() else empty


def read_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every machine's results, those of CPUs first."""
    found = [read(file) for file in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda results: results["machine"]["device"] != "cpu")


def identity(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def record(file: Path, device: str, peaks: dict[str, float], section: str, rows: Iterable[dict[str, Any]]) -> None:
    """Puts `rows` into the file in place of those with the same identity; the others stay. A peak is the highest of all
    runs, and every row's fractions are of that."""
    results = read(file)
    before = results.get("peaks", {})
    peaks = {name: max(peak, before.get(name, 0)) for name, peak in peaks.items()}
    kept = {identity(row): row for row in (*results[section], *rows)}
    results[section] = sorted(kept.values(), key=_order)
    for row in (row for name in SECTIONS for row in results[name]):
        for candidate in row.get("candidates", {}).values():
            candidate |= fractions(candidate, row["dtype"], peaks)
    write(file, {"machine": describe(device), "peaks": peaks} | {name: results[name] for name in SECTIONS})


def fractions(candidate: Mapping[str, Any], dtype: str, peaks: Mapping[str, float]) -> dict[str, float]:
    """What a candidate's rates are of the peaks."""
    rates = {unit: candidate.get(f"{unit}s_per_s") for unit in ("flop", "byte")}
    most = {"flop": peaks.get(dtype), "byte": peaks.get("copy")}
    return {f"{unit}_fraction": rounded(rate / most[unit]) for unit, rate in rates.items() if rate and most[unit]}


def rounded(x: float) -> float:
    """To four digits: more is noise."""
    return float(f"{x:.4g}")


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def _order(row: dict[str, Any]) -> list[Any]:
    """Fixed, so that a repeated run changes figures and nothing else."""
    shape = row["shape"]
    numbers = [shape.get(name) or 0 for name in ("width", "length", "batch")]
    return [row["what"], str(shape.get("variant")), numbers, row["pass"], row["dtype"] != "float32", identity(row)]
