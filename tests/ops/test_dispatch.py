"""zoo/ops/dispatch.py: which implementation runs, and under what conditions."""

import pytest
import torch

import zoo.ops
from zoo.ops import backend, backends, dispatch, linear_attention, measured, selective_scan
from zoo.ops.softmax_attention import Pattern


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


HEADS = (1, 40, 2, 16)
LANDMARKS = torch.arange(40)[None] % 8 == 7
BLOCKS = (torch.arange(40) // 8)[None, :, None, None].expand(-1, -1, 2, 1)
WHERE = 0 * torch.arange(40)[None], 1 + torch.arange(40)[None]
CALLS = {
    "linear_attention": ([HEADS] * 3 + [(1, 40, 2)], lambda q, k, v, d: zoo.ops.linear_attention(q, k, v, -d.abs())),
    "delta_rule": ([HEADS] * 3 + [(1, 40, 2)], lambda *x: zoo.ops.delta_rule(*x[:3], x[3].sigmoid())),
    "selective_scan": (
        [(1, 40, 16)] * 2 + [(16, 4), (1, 40, 4), (1, 40, 4)],
        lambda u, delta, A, B, C: zoo.ops.selective_scan(u, delta.abs(), -A.abs(), B, C),
    ),
    "causal_conv1d": ([(1, 40, 16), (16, 4)], zoo.ops.causal_conv1d),
    "gated_rms_norm": ([(1, 40, 16), (1, 40, 16), (16,)], zoo.ops.gated_rms_norm),
    "softmax_attention": ([HEADS] * 3, zoo.ops.softmax_attention),
    "softmax_attention window": ([HEADS] * 3, lambda *x: zoo.ops.softmax_attention(*x, window=9, softcap=5.0)),
    "softmax_attention pattern": ([HEADS] * 3, lambda *x: zoo.ops.softmax_attention(*x, pattern=Pattern(4, 0, 2))),
    "interval_attention": ([HEADS] * 3, lambda *x: zoo.ops.interval_attention(*x, *WHERE)),
    "landmark_attention": ([HEADS] * 3, lambda *x: zoo.ops.landmark_attention(*x, LANDMARKS)),
    "landmark_attention top_k": ([HEADS] * 3, lambda *x: zoo.ops.landmark_attention(*x, LANDMARKS, top_k=2)),
    "block_sparse_attention": ([HEADS] * 3, lambda *x: zoo.ops.block_sparse_attention(*x, BLOCKS, block_size=8)),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_not_lower_the_precision_of_a_gradient(name):
    """backward() called inside, which torch advises against. infini_attention in torch is differentiated by torch."""
    shapes, call = CALLS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    out = call(*inputs)
    outside = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert torch.is_autocast_enabled("cpu")
    for ours, expected in zip(inside, outside, strict=True):
        assert expected.any() and torch.equal(ours, expected)


def test_backends_lists_them_in_order(two_backends):
    assert backends("probe") == ("reference", "torch")


@pytest.mark.parametrize("op", ["linear_attention", "causal_conv1d", "softmax_attention", "selective_scan"])
def test_every_op_has_its_backends(op):
    assert {"reference", "torch"} <= set(backends(op))


def test_unknown_names(two_backends):
    with pytest.raises(ValueError, match="backend 'cuda' does not exist; choose one of reference, torch"):
        backend("cuda").__enter__()
    with (
        pytest.raises(
            ValueError, match="probe cannot run on backend 'triton': it is not implemented; use reference, torch, auto"
        ),
        backend("triton"),
    ):
        two_backends()
    with pytest.raises(ValueError, match="op 'conv' does not exist; choose one of probe"):
        backends("conv")


@pytest.fixture
def measured_cpu(two_backends, monkeypatch):
    """On the CPU `auto` chooses between reference and torch, and two lengths are measured."""
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device: ["reference", "torch"])
    rows = [
        measured.Row("probe", "cpu", "float32", 1, 64, {"torch": 3.0, "reference": 1.0}),
        measured.Row("probe", "cpu", "float32", 512, 64, {"torch": 2.0, "reference": 5.0}),
        measured.Row("probe", "cpu", "float32", 512, 16, {"torch": 9.0, "reference": 5.0}),
        measured.Row("probe", "cpu", "bfloat16", 512, 64, {"torch": 9.0}),
        measured.Row("probe", "NVIDIA H200", "float32", 512, 64, {"torch": 9.0, "reference": 5.0}),
    ]
    monkeypatch.setattr(measured, "rows", lambda: tuple(rows))
    measured.by_length.cache_clear()
    yield lambda length, width=64, dtype=torch.float32: dispatch.explain_choice(
        "probe", torch.device("cpu"), torch.empty(1, length, 2, width, dtype=dtype, device="meta")
    )
    measured.by_length.cache_clear()


def test_auto_takes_the_fastest_of_the_nearest_measurement(measured_cpu):
    assert measured_cpu(1).backend == "reference"
    for length in (2, 512, 100_000):
        assert measured_cpu(length).backend == "torch"
        assert measured_cpu(length, width=20).backend == "reference"
    choice = measured_cpu(300, width=100)
    assert choice.reason == "the fastest measured at length 512, width 64, float32 on cpu: 2 ms"
    assert choice.others == {"reference": "5 ms"}
    assert measured_cpu(300, dtype=torch.bfloat16).others == {"reference": "not measured there"}
    assert "no figures for cpu" in measured_cpu(300, dtype=torch.float64).reason


def test_a_backend_that_refuses_is_passed_over(measured_cpu):
    dispatch.implements("probe", "torch", refuses=lambda x: "too wide" if x.shape[-1] > 64 else None)(lambda x: x)
    assert measured_cpu(512).backend == "torch"
    choice = measured_cpu(512, width=65)
    assert choice.backend == "reference" and choice.others == {"torch": "too wide"}
    with (
        pytest.raises(ValueError, match="probe cannot run on backend 'torch': too wide; use reference"),
        backend("torch"),
    ):
        measured_cpu(512, width=65)


def test_a_backend_whose_package_is_missing(two_backends):
    dispatch.lazily("probe", "library", "nowhere.at_all", requires="no_such_package")
    assert backends("probe") == ("reference", "torch", "library")
    assert backends("probe", "cuda") == ("reference", "torch")
    assert two_backends()[0] == "torch"
    with pytest.raises(ValueError, match="'library': no_such_package is not installed; use"), backend("library"):
        two_backends()


def test_a_backend_that_cannot_be_imported_is_passed_over(two_backends, tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise ImportError('undefined symbol: gone')")
    monkeypatch.syspath_prepend(tmp_path)
    dispatch.lazily("probe", "triton", "broken_kernels", requires="torch")
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device: ["triton", "torch"])
    assert two_backends()[0] == "torch"
    with pytest.raises(ValueError, match="'triton': it cannot be imported: undefined symbol: gone"), backend("triton"):
        two_backends()


def test_kernels_need_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "triton" not in backends("linear_attention", "cpu")
    q = torch.randn(1, 3, 2, 16)
    with pytest.raises(ValueError, match="'triton': its kernels need a GPU"), backend("triton"):
        linear_attention(q, q, q)


def test_a_compiled_graph_does_not_depend_on_the_length_class(two_backends, monkeypatch):
    """The comparison with the table is guarded, and the table itself is a constant of the graph."""
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device: ["reference", "torch"])
    for name, factor in (("reference", 2), ("torch", 3)):
        dispatch.implements("probe", name)(lambda x, factor=factor: x * factor)
    rows = [
        measured.Row("probe", "cpu", "float32", 8, 4, {"reference": 1.0, "torch": 2.0}),
        measured.Row("probe", "cpu", "float32", 64, 4, {"reference": 2.0, "torch": 1.0}),
    ]
    monkeypatch.setattr(measured, "rows", lambda: tuple(rows))
    measured.by_length.cache_clear()
    function = torch.compile(lambda x: dispatch.run("probe", x.device, x), backend="eager", fullgraph=True)
    try:
        for length in (7, 9, 5, 30, 64, 2):
            assert function(torch.ones(1, length, 4))[0, 0, 0] == (2 if length <= 8 else 3)
    finally:
        measured.by_length.cache_clear()


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


def test_a_package_that_does_not_import_is_passed_over(two_backends, tmp_path, monkeypatch):
    """It is installed, and its own module breaks."""
    (tmp_path / "broken_package.py").write_text("raise ImportError('undefined symbol: gone')")
    (tmp_path / "sound_kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    dispatch.lazily("probe", "triton", "sound_kernels", requires="broken_package")
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device: ["triton", "torch"])
    assert two_backends()[0] == "torch"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_no_rows_at_all(name):
    q, x = torch.randn(0, 5, 2, 16).requires_grad_(), torch.randn(0, 5, 8).requires_grad_()
    with backend(name):
        assert linear_attention(q, q, q, -torch.rand(2)).shape == q.shape
        out, state = selective_scan(x, x, -torch.rand(8, 4), x[..., :4], x[..., :4], return_state=True)
        out.sum().backward()
        assert out.shape == x.shape and state.shape == (0, 8, 4) and x.grad.shape == x.shape
