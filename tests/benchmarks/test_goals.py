"""Whole attentions beside their peers: what is computed, and what is said of it."""

import pytest
import torch

from benchmarks import goals, peers
from benchmarks.rows import Options
from tests.ops.helpers import relative_error
from zoo import ops

OPTIONS = Options("cpu", ("float32",), quick=True)
HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 8, 160


def tensors(tiers):
    torch.manual_seed(0)
    made = {"q": torch.randn(1, LENGTH, HEADS, WIDTH)}
    made |= {name: torch.randn(1, LENGTH, tiers * KV_HEADS, WIDTH) for name in ("k", "v")}
    return made | ({"gate": torch.randn(1, LENGTH, tiers, HEADS)} if tiers > 1 else {})


def attend(name, given):
    block = goals.build(goals.GOALS[name].mixer, HEADS, KV_HEADS, WIDTH)
    return goals.attend(block, "torch", **given).unflatten(-1, (HEADS, WIDTH))


def test_hierarchical_with_the_last_tier_alone_is_its_peer():
    """Ten blocks of 64 tokens at most are there, of which sixteen are chosen."""
    given = tensors(3)
    given["gate"] = torch.tensor([-torch.inf, -torch.inf, torch.inf])[:, None].expand(1, LENGTH, 3, HEADS)
    last = {name: given[name][:, :, -KV_HEADS:] for name in ("k", "v")}
    call = peers.dense({"q": given["q"]} | last, decode=False)
    assert relative_error(attend("hierarchical", given), call.function(**call.tensors)) < 1e-5


def test_landmark_and_window_are_their_ops():
    given, place = tensors(1), torch.arange(1, LENGTH + 1)[None]
    expected = ops.landmark_attention(**given, is_landmark=place % 64 == 0, top_k=16)
    assert torch.equal(attend("landmark", given), expected)
    assert torch.equal(attend("window", given), ops.softmax_attention(**given, window=512))


@pytest.mark.parametrize("name", goals.GOALS)
def test_a_row_has_both_and_every_gradient(name, monkeypatch):
    """The peer of the window cannot run on a CPU: here our own backend stands for it."""
    gradients = []
    runner = goals.runner

    def noting(*arguments):
        call = runner(*arguments)
        return lambda: gradients.append(call())

    real = goals.attend
    monkeypatch.setattr(goals, "attend", lambda block, backend, **given: real(block, "torch", **given))
    monkeypatch.setattr(goals, "runner", noting)
    (task,) = [task for task in goals.plan(OPTIONS) if task.what == name]
    row = task.measure()
    goal = goals.GOALS[name]
    assert row["candidates"].keys() == {"zoo", goal.peer} and row["failed"] == {}
    assert row["goal"] == {"peer": goal.peer, "times": goal.times}
    assert len(gradients[0]) == (4 if goal.tiers > 1 else 3)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert f"times as fast as {goal.peer}, {goal.times:g} asked for: " in goals.verdict(row)


def test_what_the_issue_asks_for():
    cuda = goals.plan(Options("cuda", ("bfloat16",)))
    assert [task.label for task in cuda] == [
        "hierarchical beside sdpa bfloat16", "landmark beside sdpa bfloat16", "window beside flex bfloat16",
    ]  # fmt: skip
    assert goals.LENGTHS["cuda"] == 65536
    assert {name: goal.times for name, goal in goals.GOALS.items()} == {"hierarchical": 4, "landmark": 3, "window": 1}


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ({"zoo": {"ratios": {"sdpa": 4.0}}}, "4 times as fast as sdpa, 4 asked for: met"),
        ({"zoo": {"ratios": {"sdpa": 3.99}}}, "3.99 times as fast as sdpa, 4 asked for: not met"),
        ({"zoo": {"ratios": {}}}, "not compared with sdpa, 4 times as fast asked for: not shown"),
        ({}, "not compared with sdpa, 4 times as fast asked for: not shown"),
    ],
)
def test_the_verdict(candidates, said):
    row = {"what": "hierarchical", "pass": "forward+backward", "shape": {"length": 65536}, "candidates": candidates}
    row["goal"] = {"peer": "sdpa", "times": 4.0}
    assert goals.verdict(row) == f"hierarchical at 65,536 tokens, forward+backward: {said}"
