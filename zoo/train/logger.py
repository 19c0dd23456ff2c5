"""metrics.csv of a run: one row per logged step, kept across resumes.

Lightning's own CSVLogger deletes the file when a run resumes. This one keeps it, and drops only what a killed run had
written after the checkpoint that the new process starts from.
"""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

FILE_NAME = "metrics.csv"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, empty cells left out. A last line cut short by a kill is left out too."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    names = rows[0] if rows else []
    whole = [row for row in rows[1:] if len(row) == len(names)]
    return [{name: float(cell) for name, cell in zip(names, row, strict=True) if cell != ""} for row in whole]


class CsvLog(Logger):
    """Writes every metric of a run to `folder`/metrics.csv; the first column, `step`, counts finished optimiser steps.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__()
        self.path = Path(folder) / FILE_NAME
        self._names: list[str] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """The run's configuration is kept in config.yaml, whole."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        # Lightning counts the step that a metric belongs to from 0.
        row = {"step": step + 1, **{name: value for name, value in metrics.items() if name != "epoch"}}
        if not set(row) <= set(self._names):
            self._rewrite(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._names, lineterminator="\n").writerow(row)

    def _rewrite(self, row: dict[str, Any]) -> None:
        """Widens the header for new metrics; in a fresh process, also drops the rows from this step on."""
        kept = read_metrics(self.path)
        if not self._names:
            kept = [earlier for earlier in kept if earlier["step"] < row["step"]]
        self._names = ["step", *sorted({name for each in [*kept, row] for name in each} - {"step"})]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**earlier, "step": int(earlier["step"])} for earlier in kept)
        os.replace(temporary, self.path)
