"""Arrows point one way: ops <- blocks <- models <- train/eval/hub <- ablate <- cli (DESIGN section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

PACKAGE = Path(zoo.__file__).parent
ROOT = PACKAGE.parent

# What each room may import of the project, besides itself. A room that is not here fails the test.
MAY_IMPORT = {
    "ops": set(),
    "schema": set(),
    "yaml": set(),
    "pattern": set(),
    "data": {"yaml"},
    "parallel": {"ops"},
    "blocks": {"ops", "schema", "parallel"},
    "config": {"blocks", "schema", "yaml", "pattern"},
    "models": {"config", "blocks", "schema", "ops", "parallel", "yaml", "pattern"},
    "train": {"", "models", "config", "data", "yaml", "parallel", "blocks"},
    "eval": {"", "models", "config", "data", "yaml"},
    "hub": {"models", "config", "data", "yaml"},
    "ablate": {"", "train", "eval", "hub", "models", "config", "data", "yaml", "schema"},
    "cli": {"", "ablate", "train", "eval", "hub", "models", "config", "data", "blocks", "yaml", "schema", "pattern"},
    "": {"ops", "blocks", "config", "models", "hub"},  # zoo/__init__.py, the public API
}
# Alone above the models; the models work without them.
ABOVE_MODELS = {"train", "ablate", "cli", "eval"}
# Types of a room above, for annotations alone.
TYPE_CHECKING_ONLY = {("blocks", "config")}


def room_of(module: str) -> str:
    """`zoo.ops.dispatch` -> `ops`; `zoo` -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[tuple[str, bool]]:
    """(absolute module, whether only under `if TYPE_CHECKING`) of every import in the file, at any depth."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()

    def visit(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only = True
        if isinstance(node, ast.Import):
            found.update((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from zoo import ops` imports a module, `from zoo.ops import f` a name: look which exists.
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.add((f"{module}.{alias.name}" if is_module else module, typing_only))
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(ast.parse(path.read_text()), False)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) if path.parent != PACKAGE else path.stem
    here = "" if here == "__init__" else here
    assert here in MAY_IMPORT, f"say in MAY_IMPORT what {here} may import"
    for module, typing_only in imports_of(path):
        if module.split(".")[0] == "zoo":
            there = room_of(module)
            allowed = (
                there == here or there in MAY_IMPORT[here] or (typing_only and (here, there) in TYPE_CHECKING_ONLY)
            )
            assert allowed, f"{path.name} ({here or 'zoo'}) must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_below_train_imports_lightning(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    modules = {module.split(".")[0] for module, _ in imports_of(path)}
    if room not in ABOVE_MODELS:
        assert not modules & {"lightning", "pytorch_lightning", "jsonargparse", "matplotlib"}


def test_the_arrows_have_no_circle() -> None:
    reached: dict[str, set[str]] = {}

    def below(room: str, path: tuple[str, ...]) -> set[str]:
        assert room not in path, f"circle: {path}"
        if room not in reached:
            reached[room] = set().union(*({other} | below(other, (*path, room)) for other in MAY_IMPORT[room]), set())
        return reached[room]

    for room in MAY_IMPORT:
        below(room, ())
    assert not reached["models"] & ABOVE_MODELS


def test_importing_zoo_is_light() -> None:
    """Neither the training loop, nor the data library, nor a plotting library comes with the models."""
    heavy = ("lightning", "datasets", "matplotlib", "jsonargparse")
    script = f"import sys, zoo; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
