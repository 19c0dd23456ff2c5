"""The scripts that draw the pictures of docs/blocks still run."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt

SCRIPTS = sorted(Path("docs/blocks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_draws_its_pictures(script: Path, tmp_path: Path) -> None:
    matplotlib.use("Agg")
    copy = shutil.copy(script, tmp_path)  # they write beside themselves
    runpy.run_path(str(copy), run_name="__main__")
    plt.close("all")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn and all((tmp_path / name).stat().st_size > 1000 for name in drawn)
    assert drawn <= {path.name for path in Path("docs/blocks").glob("*.png")}
