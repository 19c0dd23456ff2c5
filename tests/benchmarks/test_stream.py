"""Generation without end, in fewer tokens than benchmarks/stream.py takes: `make stream` runs 100,000."""

import pytest
import torch

from benchmarks import stream
from benchmarks.rows import Options
from zoo.blocks.infini import Infini
from zoo.models.streaming import obstacle


def test_memory_is_flat_and_logits_are_finite() -> None:
    row = stream.measure(1600, Options(quick=True))
    assert row["shape"] == {"batch": 1, "length": 1600, "trained": 64} and row["mixers"] == list(stream.MIXERS)
    assert row["different_tokens"] > 10, "it stands still"
    assert row["tensor_bytes"] > 0 and row["memory_ratio"] < 1.05
    assert obstacle(stream.build()) is None


def test_a_state_that_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, forward = [], Infini.forward
    monkeypatch.setattr(Infini, "forward", lambda self, x, *rest: kept.append(x) or forward(self, x, *rest))
    with pytest.raises(ValueError, match="the tensors grew from"):
        stream.measure(320, Options(quick=True))


def test_logits_that_are_not_finite_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream.build()
    model.lm_head.weight.data[3] = torch.inf
    monkeypatch.setattr(stream, "build", lambda: model)
    with pytest.raises(ValueError, match="logits are not finite"):
        stream.measure(320, Options(quick=True))
