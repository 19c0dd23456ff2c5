"""Layers of flash-linear-attention itself keep the mixer's contract through the adapter: on a GPU, or interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.blocks.fla_layers import LAYERS

pytest.importorskip("fla.layers", reason="needs flash-linear-attention (fla-core has no layers)")
HERE = [name for name, (_, interpreted) in LAYERS.items() if interpreted != "nothing" or torch.cuda.is_available()]


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.blocks.fla_layers"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layer", HERE)
def test_a_layer_of_theirs(errors: dict[str, dict[str, float]], layer: str) -> None:
    assert isinstance(errors[layer], dict), errors[layer]
    bound = 2e-3 if torch.cuda.is_available() else 1e-5  # their chunked kernels multiply in TF32
    has_backward = torch.cuda.is_available() or "backward" in LAYERS[layer][1]
    assert errors[layer].keys() == {"decode", "packing", "padding"} | ({"gradients"} if has_backward else set())
    assert all(error < bound for error in errors[layer].values()), errors[layer]
