"""zoo/ops/dispatch.py: which implementation runs, and under what conditions."""

import pytest
import torch

from zoo.ops import backend, backends, dispatch, linear_attention


@pytest.fixture
def two_backends(monkeypatch):
    """An op `probe` with two backends that say which they are and whether autocast reached them."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    for name in ("torch", "reference"):
        dispatch.implements("probe", name)(lambda name=name: (name, torch.is_autocast_enabled("cpu")))
    return lambda: dispatch.run("probe", torch.device("cpu"))


def test_auto_is_torch_and_a_context_chooses(two_backends):
    assert two_backends()[0] == "torch"
    with backend("reference"):
        assert two_backends()[0] == "reference"
        with backend("auto"):
            assert two_backends()[0] == "torch"
        assert two_backends()[0] == "reference"
    assert two_backends()[0] == "torch"


def test_an_exception_restores_the_choice(two_backends):
    with pytest.raises(RuntimeError), backend("reference"):
        raise RuntimeError
    assert two_backends()[0] == "torch"


def test_ops_run_outside_autocast(two_backends):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert two_backends() == ("torch", False)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_does_not_lower_the_precision_of_an_op():
    q = torch.randn(1, 100, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_attention(q, q, q)
    assert inside.dtype == torch.float32 and torch.equal(inside, linear_attention(q, q, q))


def test_backends_lists_them_in_order(two_backends):
    assert backends("probe") == ("reference", "torch")


@pytest.mark.parametrize("op", ["linear_attention", "causal_conv1d", "softmax_attention", "selective_scan"])
def test_every_op_has_its_backends(op):
    assert {"reference", "torch"} <= set(backends(op))


def test_unknown_names(two_backends):
    with pytest.raises(ValueError, match="backend 'cuda' does not exist; choose one of reference, torch"):
        backend("cuda").__enter__()
    with pytest.raises(ValueError, match="probe has no 'triton' backend; it has reference, torch"), backend("triton"):
        two_backends()
    with pytest.raises(ValueError, match="op 'conv' does not exist; choose one of probe"):
        backends("conv")


def test_a_compiled_graph_follows_the_choice():
    """A graph compiled under one backend is not reused under another."""
    seen = []

    def implementation(name, factor):
        def run(x):
            seen.append(name)
            return x * factor

        return run

    dispatch.implements("probe_compiled", "torch")(implementation("torch", 2))
    dispatch.implements("probe_compiled", "reference")(implementation("reference", 3))
    try:
        function = torch.compile(lambda x: dispatch.run("probe_compiled", x.device, x), backend="eager")
        x = torch.ones(3)
        assert function(x)[0] == 2
        with backend("reference"):
            assert function(x)[0] == 3
        assert function(x)[0] == 2
    finally:
        del dispatch._implementations["probe_compiled"]
