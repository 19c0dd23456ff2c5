"""Products against float64, whichever library multiplies: what is chosen on this CPU, and each of the two by force."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import relative_error
from zoo.ops import matmul as module
from zoo.ops.matmul import bmm, linear, matmul

SIZES = [(100, 40, 70), (64, 16, 32), (1, 64, 64), (40, 8, 40), (40, 0, 40), (0, 40, 40), (3, 5, 7), (33, 200, 1160)]


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def called(request, monkeypatch):
    """Forces one of them; the weights that oneDNN was given."""
    if request.param and not module._onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "MKL_IS_SLOW", request.param)
    for name in ("MIN_WORK", "MIN_SINGLE"):
        monkeypatch.setattr(module, name, 1000)
    weights, call = [], module._onednn_linear
    monkeypatch.setattr(module, "_onednn_linear", lambda x, w, b: weights.append(w) or call(x, w, b))
    monkeypatch.setattr(module, "MIN_ROWS", 1)
    yield weights
    assert all(w.is_contiguous() or w.T.is_contiguous() for w in weights)
    assert request.param or not weights


def layouts(rows, columns):
    """The same matrix as it may lie in memory."""
    plain = torch.randn(rows, columns)
    wide = torch.randn(rows, 2 * columns + 3)
    wide[:, 3 : columns + 3] = plain
    return [plain, plain.T.contiguous().T, wide[:, 3 : columns + 3]]


LARGE = [(100, 40, 70), (64, 16, 32), (33, 200, 1160)]


def check_called(called, sizes):
    """oneDNN served where it was forced, and the matrix is not too small for it."""
    if module.MKL_IS_SLOW and sizes in LARGE:
        assert called


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matmul(called, sizes):
    rows, inner, columns = sizes
    for a in layouts(rows, inner):
        for b in layouts(inner, columns):
            out, expected = matmul(a, b), a.double() @ b.double()
            assert out.shape == expected.shape and out.dtype == torch.float32
            assert torch.equal(out, expected.float()) if not inner * rows else relative_error(out, expected) < 1e-6
    check_called(called, sizes)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_bmm(called, sizes, count):
    rows, inner, columns = sizes
    for a, b in zip(layouts(count * rows, inner), layouts(count * inner, columns), strict=True):
        a, b = a.unflatten(0, (count, rows)), b.unflatten(0, (count, inner))
        expected = a.double() @ b.double()
        for out in (None, torch.full((count, rows, columns), torch.nan)):
            assert relative_error(bmm(a, b, out=out), expected) < 1e-6
    check_called(called, sizes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [*SIZES[:4], SIZES[-1]], ids=str)
def test_linear_and_its_gradients(called, sizes, bias):
    rows, inner, columns = sizes
    for weight in layouts(columns, inner):
        inputs = [torch.randn(2, rows, inner), weight, torch.randn(columns)][: 3 if bias else 2]
        inputs = [x.detach().requires_grad_() for x in inputs]
        grad = torch.randn(2, columns, rows).mT
        out = linear(*inputs)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        expected = F.linear(*wide)
        gradients = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, wide, grad.double())
        for mine, theirs in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
            assert mine.shape == theirs.shape and relative_error(mine, theirs) < 1e-6
    check_called(called, sizes)


def test_without_a_gradient(called):
    x, weight, bias = torch.randn(2, 1, 64), torch.randn(300, 64), torch.randn(300)
    with torch.no_grad():
        assert relative_error(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())) < 1e-6


def test_only_what_is_wanted_is_differentiated(called):
    x, weight = torch.randn(64, 64), torch.randn(64, 64).requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    assert not linear(x, weight.detach()).requires_grad


def test_everything_else_is_torchs(called):
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, torch.randn(64, 32))
    with pytest.raises(RuntimeError, match="same dtype"):
        matmul(x, weight.double())
    assert not called


def test_the_flops_are_counted(called):
    x, weight = torch.randn(64, 48).requires_grad_(), torch.randn(40, 48).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 48 * 40


def test_compiled_whole(called):
    x, weight, bias = torch.randn(64, 48), torch.randn(40, 48), torch.randn(40)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    out = torch.compile(linear, fullgraph=True, backend="aot_eager")(*inputs)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    expected = F.linear(*(t.double() for t in inputs))
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for mine, theirs in zip((out, *gradients), (expected, *wanted), strict=True):
        assert relative_error(mine, theirs) < 1e-6


BIASES = {
    "a column": lambda: torch.randn(64, 3)[:, 1],
    "expanded": lambda: torch.randn(1).expand(64),
    "one": lambda: torch.randn(1),
    "a number": lambda: torch.tensor(0.5),
    "a row": lambda: torch.randn(1, 64),
}


@pytest.mark.parametrize("bias", BIASES)
def test_any_bias_that_torch_takes(called, bias):
    x, weight, bias = torch.randn(64, 64), torch.randn(64, 64), BIASES[bias]()
    try:
        expected = F.linear(x.double(), weight.double(), bias.double())
    except RuntimeError:
        with pytest.raises(RuntimeError):
            linear(x, weight, bias)
    else:
        assert relative_error(linear(x, weight, bias), expected) < 1e-6


def test_a_weight_that_is_a_vector(called):
    x, weight = torch.randn(64, 64), torch.randn(64)
    assert relative_error(linear(x, weight), F.linear(x.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("grad", [True, False])
def test_what_comes_after_may_work_in_place(called, grad):
    x, weight = torch.randn(2, 64, 64), torch.randn(64, 64).requires_grad_()
    with torch.set_grad_enabled(grad):
        y = linear(x, weight)
    y += 1
    F.silu(y, inplace=True)
    expected = F.silu(F.linear(x.double(), weight.double()) + 1)
    assert relative_error(y, expected) < 1e-6
    if grad:
        found = torch.autograd.grad(y.sum(), weight)[0]
        assert relative_error(found, torch.autograd.grad(expected.sum(), weight)[0]) < 1e-6


def test_what_autograd_can_do_with_torchs(called):
    """A second derivative, and functorch's vmap, grad and jvp, the last without gradients too."""
    x, weight = torch.randn(64, 64), torch.randn(64, 64).requires_grad_()

    def loss(function, w):
        return function(x, w).pow(3).sum() / 1e3

    (first,) = torch.autograd.grad(loss(linear, weight), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    (first,) = torch.autograd.grad(loss(F.linear, weight), weight, create_graph=True)
    assert relative_error(second, torch.autograd.grad(first.square().sum(), weight)[0]) < 1e-5
    fixed, batch = weight.detach(), torch.randn(3, 64, 64)
    assert torch.equal(torch.func.grad(partial(loss, linear))(fixed), torch.func.grad(partial(loss, F.linear))(fixed))
    assert torch.equal(
        torch.func.vmap(linear, (0, None))(batch, fixed), torch.func.vmap(F.linear, (0, None))(batch, fixed)
    )
    with torch.no_grad():
        tangents = [torch.func.jvp(partial(loss, f), (fixed,), (fixed,))[1] for f in (linear, F.linear)]
    assert tangents[0] == tangents[1] != 0
