"""zoo/ops/causal_conv1d/kernels.py: outputs and gradients against the float64 reference, and what the compiler makes of
the kernels."""

import pytest
import torch

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_causal_conv1d import make_inputs, outputs_and_gradients
from zoo.ops import backend, causal_conv1d
from zoo.ops.causal_conv1d import kernels

# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
DOCUMENTS = [0, 0, 1, 3, 3, 6, 10, 16, 16, 33, 80, 80]


def check(inputs, dtype, **options):
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    with poisoned_memory():
        got = outputs_and_gradients("triton", inputs, dtype, device=DEVICE, **options)
    for name, x in got.items():
        assert relative_error(x, expected[name]) < TOLERANCE[x.dtype], name


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (3, 8), (16, 4), (37, 1), (37, 2), (50, 3), (50, 8)])
def test_equals_reference(length, width, activation):
    check(make_inputs(2, length, 6, width), torch.float32, activation=activation)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("cu_seqlens", [[0, 9], DOCUMENTS, list(range(9))])
def test_packed_documents(cu_seqlens, width):
    inputs = make_inputs(1, cu_seqlens[-1], 6, width, rows=len(cu_seqlens) - 1)
    check(inputs, torch.float32, activation="silu", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("channels", [1, 128, 200])
def test_channels(channels):
    check(make_inputs(1, 18, channels, 4), torch.float32, activation="silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    check(make_inputs(1, 18, 40, 4), dtype, activation="silu")


def test_without_bias_and_initial_state():
    x, weight, _, _ = make_inputs(2, 20, 6, 4)
    check([x, weight, None, None], torch.float32, activation="silu")


@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks_of_any_length(chunk, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_CHUNK", chunk)
    inputs = make_inputs(1, 80, 6, 4, rows=len(DOCUMENTS) - 1)
    check(inputs, torch.float32, activation="silu", cu_seqlens=DOCUMENTS)
    check(make_inputs(2, 70, 6, 4), torch.float32, activation="silu")


@pytest.mark.parametrize("bounds", [None, DOCUMENTS])
def test_nothing_beyond_the_tokens_is_read(bounds):
    """Not even by the programs that have none left."""
    inputs = make_inputs(1, 80, 6, 4, rows=1 if bounds is None else len(bounds) - 1)
    x, weight, bias, state = (x.to(DEVICE).float().requires_grad_() for x in inputs)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    padded = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)
    with backend("triton"):
        out = causal_conv1d(padded[:, :80], weight, bias, initial_state=state, cu_seqlens=cu_seqlens)
    d_out = torch.cat([out, torch.full_like(out, torch.nan)], dim=1)[:, :80].detach()
    gradients = torch.autograd.grad(out, (x, weight, bias, state), d_out)
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))


def test_chunks_grow_with_the_work():
    """No longer than 2112 programs allow, so that a GPU fills up, within bounds."""
    chunks = [kernels._chunks(torch.empty(2, n, 640, device="meta"), 2, None) for n in (512, 8192, 2**20)]
    assert chunks == [(16, (64, 5)), (32, (512, 5)), (256, (8192, 5))]


@pytest.mark.parametrize("given", ["out", "state"])
def test_a_gradient_of_one_result_alone(given):
    inputs = make_inputs(2, 5, 6, 4)
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
        with backend(name):
            out, state = causal_conv1d(*leaves[:3], activation="silu", initial_state=leaves[3], return_state=True)
        y = out if given == "out" else state
        gradients = torch.autograd.grad(y, leaves, y.detach(), allow_unused=True, materialize_grads=True)
        results[name] = gradients
    assert max(map(relative_error, results["triton"], results["reference"])) < 1e-6


def test_pieces_and_single_tokens_equal_the_whole():
    x, weight, bias, state = (x.to(DEVICE).float() for x in make_inputs(2, 30, 6, 4))
    with backend("triton"), poisoned_memory():
        whole, final = causal_conv1d(x, weight, bias, initial_state=state, return_state=True)
        pieces = []
        for start, end in [(0, 17), (17, 19), (19, 28), (28, 29), (29, 30)]:
            out, state = causal_conv1d(x[:, start:end], weight, bias, initial_state=state, return_state=True)
            pieces.append(out)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state, final)


def test_views_into_a_larger_projection():
    x, weight, bias, _ = make_inputs(2, 20, 6, 4)
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        wide = torch.cat([x, 2 * x], dim=-1).to(DEVICE, dtype).requires_grad_()
        parameters = weight.to(DEVICE, dtype).T.contiguous().T, bias.to(DEVICE, dtype)
        for part in (wide[..., 3:9], wide[..., ::2]):
            with backend(name):
                out = causal_conv1d(part, *parameters, activation="silu")
            (gradient,) = torch.autograd.grad(out, wide, x.mT.contiguous().mT.to(out))
            results.setdefault(name, []).extend([out, gradient])
    assert max(map(relative_error, results["triton"], results["reference"])) < 1e-6


def test_elements_beyond_int32():
    """Rows 2^30 elements apart, of which only those used are ever touched."""
    x, weight, bias, _ = make_inputs(1, 4, 6, 4)
    far = torch.empty(3 * 2**30 + 6, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 4, 6), (0, 2**30, 1))
    far.copy_(x)
    with backend("reference"):
        expected = causal_conv1d(x, weight, bias)
    with backend("triton"):
        out = causal_conv1d(far, weight.to(DEVICE).float(), bias.to(DEVICE).float())
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


def test_without_gradients_no_operator_is_called(monkeypatch):
    monkeypatch.setattr(kernels, "_operator", None)
    x, weight, bias, state = (x.to(DEVICE).float().requires_grad_() for x in make_inputs(2, 1, 6, 4))
    results = {}
    for name in ("reference", "triton"):
        with backend(name), torch.no_grad():
            results[name] = causal_conv1d(x, weight, bias, initial_state=state, return_state=True)
    assert max(map(relative_error, results["triton"], results["reference"])) < 1e-6


def test_operator_contracts():
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32, device=DEVICE)
    for width, bounds in ((4, None), (1, cu_seqlens)):
        inputs = make_inputs(1, 20, 6, width, rows=1 if bounds is None else 3)
        x, weight, bias, state = (x.to(DEVICE).float().requires_grad_() for x in inputs)
        torch.library.opcheck(kernels._operator, (x, weight, bias, "silu", state, bounds), test_utils=utils)


def test_compiles_into_one_graph():
    inputs = [x.to(DEVICE).float().requires_grad_() for x in make_inputs(2, 20, 6, 4)]

    def run(x, weight, bias, state):
        with backend("triton"):
            out, final = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, return_state=True)
        return out.sin().sum() + final.cos().sum()

    got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, inputs) for x in (got, expected)))) < 1e-6


@pytest.mark.parametrize("wide", [0, 1])
def test_float64_is_refused(wide):
    inputs = [x.to(DEVICE).float() for x in make_inputs(1, 3, 6, 4)[:3]]
    inputs[wide] = inputs[wide].double()
    with backend("triton"), pytest.raises(ValueError, match="float64 inputs; use reference, torch, auto"):
        causal_conv1d(*inputs)


def launch():
    """The kernels of Mamba-2 (2.7B, 5376 channels), training and decoding, in rows and packed."""
    packed = torch.tensor([0, 100, 128], dtype=torch.int32)
    for dtype, length, cu_seqlens in (
        (torch.bfloat16, 128, None),
        (torch.bfloat16, 128, packed),
        (torch.bfloat16, 1, None),
        (torch.float32, 128, None),
    ):
        x, weight, bias = torch.zeros(1, length, 5376, dtype=dtype), torch.zeros(5376, 4), torch.zeros(5376)
        state = torch.zeros(1 if cu_seqlens is None else 2, 5376, 3)
        out, final = kernels._forward(x, weight, bias, "silu", state, cu_seqlens)
        if length > 1:
            kernels._backward(out, final, x, weight, bias, "silu", state, cu_seqlens)


def test_compiles_for_an_h100():
    compiled = aot.in_a_process(__name__, "launch")
    assert len(compiled) == 7
    for kernel in compiled:
        assert kernel.shared <= 1024 and kernel.spilled == 0, kernel
        # A multiprocessor has enough for 20 programs forward and 12 backward.
        assert kernel.registers <= (160 if kernel.name == "_backward_kernel" else 96), kernel


def test_a_bias_and_weights_with_strides():
    """Columns of one matrix, and a bias that repeats one number."""
    torch.manual_seed(0)
    x, both = torch.randn(1, 9, 6, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    for bias in (both[:, 4], torch.randn(1, device=DEVICE).expand(6)):
        given = (x, both[:, :4].requires_grad_(), bias.requires_grad_())
        with backend("triton"):
            out = causal_conv1d(*given)
        wide = [t.detach().double().requires_grad_() for t in given]
        with backend("reference"):
            expected = causal_conv1d(*wide)
        found = torch.autograd.grad(out.square().sum(), given[1:])
        wanted = torch.autograd.grad(expected.square().sum(), wide[1:])
        for mine, theirs in zip((out, *found), (expected, *wanted), strict=True):
            assert relative_error(mine, theirs) < 1e-5
