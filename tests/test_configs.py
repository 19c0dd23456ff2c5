"""Every file in configs/ runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from tests.models.families.published import SIZES
from zoo.cli.check import check_file
from zoo.models.summary import summarize

MODELS = sorted(Path("configs/models").glob("*.yaml"))
TRAIN = sorted(Path("configs/train").glob("*.yaml"))
STYLES = {"transformer", "minimax", "jamba", "mamba2"}
KINDS = {
    "bigbird",
    "compressive",
    "hierarchical",
    "infini",
    "landmark",
    "linear",
    "linformer",
    "longformer",
    "moba",
    "performer",
    "retention",
    "three-tier",
}  # mixers that have a tiny model of their own
PUBLISHED = {size.name for size in SIZES}
OWN = [path for path in MODELS if path.stem not in PUBLISHED]  # written by hand
TINY = [path for path in OWN if path.stem.endswith("-tiny")]


def test_no_file_is_left_out() -> None:
    every = {path for path in Path("configs").rglob("*") if path.is_file()}
    assert every == set(MODELS) | set(TRAIN)
    own = {f"{style}-{size}" for style in STYLES for size in ("tiny", "125m")}
    own |= {f"{kind}-tiny" for kind in KINDS}
    assert {path.stem for path in MODELS} == own | PUBLISHED
    assert {path.stem for path in TRAIN} == {f"{style}-tiny" for style in STYLES | KINDS}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_file_builds(path: Path) -> None:
    model = zoo.build(check_file(str(path)), device="meta")
    assert model.num_params() == summarize(model.config, 1).total.params


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_a_train_file_is_right(path: Path) -> None:
    assert check_file(str(path)).layers


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_model_learns(path: Path) -> None:
    """A step downhill: the loss starts at chance, and falls."""
    torch.manual_seed(0)
    model = zoo.build(path)
    tokens = torch.randint(model.config.vocab_size, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        output = model(tokens, labels=tokens, use_cache=False)
        losses.append(output.cross_entropy.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(torch.tensor(model.config.vocab_size).log().item(), rel=0.05)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", ["125m"])
def test_models_of_one_size_have_equally_many_parameters(size: str) -> None:
    params = {
        path.stem: summarize(zoo.load_config(path), 1).total.params for path in MODELS if path.stem.endswith(f"-{size}")
    }
    assert len(params) == len(STYLES)
    assert max(params.values()) / min(params.values()) < 1.02, params
    assert all(122e6 < count < 128e6 for count in params.values()), params


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_every_line_says_what_it_is_for(path: Path) -> None:
    """Each field has a comment on its line or stands right under one (`blocks:` speaks for itself)."""
    lines = path.read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        assert "#" in line or "#" in before or line.strip() == "blocks:", line


def test_comments_tell_the_parameters() -> None:
    for path in MODELS:
        if path.stem.endswith("-125m"):
            total = summarize(zoo.load_config(path), 1).total
            header = path.read_text()[:400]
            assert f"{total.params / 1e6:.0f} M parameters" in header
            if total.active_params < total.params:
                assert f"{total.active_params / 1e6:.0f} M of them active" in header
