"""What an op's row counts and times."""

import pytest
import torch

from benchmarks import ops
from benchmarks.inputs import CACHED, CHOSEN, SPARSE, STATE_SIZE, VARIANTS, Case, Shape, cases, make_inputs
from benchmarks.ops import BOTH, DECODE, FORWARD, FORWARD_ONLY, measure, runner, time_those_that_run
from benchmarks.rows import Options

ONE = Shape(1, 1, decode=True)
OPTIONS = Options(quick=True, peaks={"float32": 1e12, "bfloat16": 1e12, "copy": 1e12})


def test_the_plan_has_every_op_pass_and_dtype_once():
    labels = [task.label for task in ops.plan(Options(quick=True))]
    shared = sum(len(variants) - 1 for variants in VARIANTS.values())
    assert len(labels) == len(set(labels)) + shared * 2 * 3, "an op's variants share their labels"
    assert len(set(labels)) == 2 * (3 * len(VARIANTS) - len(FORWARD_ONLY))
    assert {task.what for task in ops.plan(OPTIONS)} == set(VARIANTS)


def test_the_sparse_tiers_have_one_shape():
    """NSA's on a GPU, so that their rows add up; and the choice is timed, forward and with a cache."""
    shapes = {op: [case[2:] for case in cases("cuda") if case.op == op] for op in SPARSE}
    assert shapes == {op: [(64, 128)] for op in SPARSE}
    for length in (40, 256):  # in few keys, and in as many as NSA's blocks have
        made = {op: make_inputs(Case(op, None, 32, 16), Shape(1, length), "float32", OPTIONS) for op in SPARSE}
        interval, choice, sparse = made.values()
        assert {each.tensors["k"].shape[2] for each in made.values()} == {2}
        assert choice.tensors["k"].shape == interval.tensors["k"].shape
        assert choice.fixed["select_block"] == sparse.fixed["block_size"]
        block, stride = (choice.fixed[f"compress_{name}"] for name in ("block", "stride"))
        ends = [i * stride + block for i in range(interval.tensors["k"].shape[1])]
        assert interval.fixed["stop"][0].tolist() == [sum(end <= t + 1 for end in ends) for t in range(length)]
        assert ends[-1] <= length < ends[-1] + stride
    passes = {task.measure.args[2] for task in ops.plan(OPTIONS) if task.what == "select_blocks"}
    assert passes == {FORWARD, DECODE}


def test_the_choice_is_told_what_the_compressed_tier_found():
    """It would compute the same log-sum-exp again, and choose the same."""
    inputs = make_inputs(Case("select_blocks", None, 32, 16), Shape(2, 256), "float32", OPTIONS)
    chosen, again = (
        ops.on_backend("torch", "select_blocks", inputs.fixed | more, **inputs.tensors) for more in ({}, {"lse": None})
    )
    assert torch.equal(chosen, again)
    floor = measure(Case("select_blocks", None, 32, 16), Shape(2, 256), FORWARD, "float32", OPTIONS)["floor"]
    seen = sum(max(0, (t + 1 - 16) // 16) for t in range(256))  # compressed blocks, by all queries of a row
    assert floor["flops"] == 2 * 2 * seen * 32 * 16
    given = 4 * (2 * 256 * 32 * 16 + 2 * 15 * 2 * 16)
    assert floor["bytes"] == given + 8 * 2 * 256 * 2 * CHOSEN


def test_floors_of_linear_attention():
    case = Case("linear_attention", "per token", 2, 16)
    forward, both = (measure(case, Shape(2, 8), p, "bfloat16", OPTIONS)["floor"] for p in (FORWARD, BOTH))
    values = 2 * 8 * 2 * 16 * 2  # bytes of v or of the output; q and k have one group of the two heads
    given = values + 2 * values // 2 + 2 * 8 * 2 * 4  # and the decays, float32
    assert forward == {"flops": 4 * 2 * 8 * 2 * 16**2, "bytes": given + values}
    assert both == {"flops": 3 * forward["flops"], "bytes": 3 * given + 2 * values}


def test_attention_counts_the_keys_that_a_query_may_see():
    forward = measure(Case("softmax_attention", None, 2, 16), Shape(1, 8), FORWARD, "float32", OPTIONS)
    assert forward["floor"]["flops"] == 4 * (8 * 9 // 2) * 2 * 16
    decode = measure(Case("softmax_attention", None, 2, 16), ONE, DECODE, "float32", OPTIONS)
    assert decode["floor"]["flops"] == 4 * CACHED["quick"] * 2 * 16
    assert decode["shape"]["keys"] == CACHED["quick"]


def test_sparse_attention_counts_each_chosen_key_once():
    """Four blocks of 4 keys at 16 tokens: a query chooses among its own and those before it, the first four all."""
    inputs = make_inputs(Case("block_sparse_attention", None, 2, 16), Shape(1, 16), "float32", OPTIONS)
    blocks = inputs.fixed["block_indices"][0, :, 0]
    seen = [
        j for t in range(16) for j in range(t + 1) if j // inputs.fixed["block_size"] in blocks[t].tolist()
    ]  # each key of each query
    assert inputs.flops == 4 * len(seen) * 2 * 16
    assert (blocks[:, None] == torch.arange(4)[:, None]).sum(-1).max() == 1  # -1 instead of a second time


def test_decoding_reads_and_writes_the_state():
    row = measure(Case("selective_scan", None, 1, 32), ONE, DECODE, "float32", OPTIONS)
    state = 4 * 32 * STATE_SIZE
    others = 4 * (3 * 32 + 32 * STATE_SIZE + 2 * STATE_SIZE)  # u, delta, D; A; B, C
    assert row["floor"]["bytes"] == state + others + 4 * 32 + state


def test_the_backends_and_the_peer_are_candidates():
    row = measure(Case("causal_conv1d", None, 1, 32), Shape(2, 8), BOTH, "float32", OPTIONS)
    assert {"reference", "torch", "transformers"} <= row["candidates"].keys()
    assert row["candidates"]["torch"]["ratios"].keys() == {"transformers"}
    assert row["candidates"]["torch"]["byte_fraction"] > 0


DIFFERENTIABLE = [case for case in cases("quick") if case.op not in FORWARD_ONLY]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: f"{case.op}-{case.variant}")
def test_backward_makes_every_gradient(case):
    inputs = make_inputs(case, Shape(1, 8), "float32", OPTIONS)
    constant = ops.CONSTANT.get(case.variant, ())
    gradients = runner(
        BOTH, lambda **t: ops.on_backend("torch", case.op, inputs.fixed, **t), inputs.tensors, constant
    )()
    assert len(gradients) == len(set(inputs.tensors) - set(constant))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert not any(tensor.requires_grad for tensor in inputs.tensors.values())


def test_forward_keeps_no_graph():
    out = runner(FORWARD, torch.exp, {"input": torch.zeros(1, requires_grad=True)}, ())()
    assert not out.requires_grad


def test_who_fails_is_named_and_does_not_stop_the_others():
    def fails():
        raise RuntimeError("no kernel\nfor this")

    failed = {}
    timings = time_those_that_run({"a": fails, "b": lambda: None}, failed, OPTIONS)
    assert timings.keys() == {"b"}
    assert failed == {"a": "RuntimeError: no kernel"}


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch):
    def broken(*_):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(ops.peers, "find", lambda op, options: {"fla": broken})
    row = measure(Case("causal_conv1d", None, 1, 32), Shape(1, 8), FORWARD, "float32", OPTIONS)
    assert row["failed"] == {"fla": "ImportError: undefined symbol"}
    assert "torch" in row["candidates"] and "fla" not in row["candidates"]
