"""zoo/ops/gated_rms_norm/kernels.py: outputs and gradients against the float64 reference, and what the compiler makes
of the kernels."""

import pytest
import torch

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_gated_rms_norm import MODES, make_inputs, outputs_and_gradients
from zoo.ops import backend, gated_rms_norm
from zoo.ops.gated_rms_norm import kernels

# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def check(inputs, d_out, dtypes, **options):
    expected = outputs_and_gradients("reference", inputs, d_out, (torch.float64,) * 3, **options)
    inputs, d_out = [x.to(DEVICE) for x in inputs], d_out.to(DEVICE)
    with poisoned_memory():
        got = outputs_and_gradients("triton", inputs, d_out, dtypes, **options)
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    bounds = [TOLERANCE[x.dtype] for x in got]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@pytest.mark.parametrize(("activation", "gate_first"), MODES)
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("length", [1, 37])
def test_equals_reference(length, num_groups, activation, gate_first):
    inputs, d_out = make_inputs(2, length, 72)
    options = {"num_groups": num_groups, "activation": activation, "gate_first": gate_first, "eps": 1e-3}
    check(inputs, d_out, (torch.float32,) * 3, **options)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_narrow_dtypes(dtypes):
    check(*make_inputs(1, 40, 64), dtypes, num_groups=2)


@pytest.mark.parametrize(("activation", "gate_first"), MODES[:2])
@pytest.mark.parametrize("channels", [32, 50, 64])
def test_groups_too_long_for_one_tile(channels, activation, gate_first, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    inputs, d_out = make_inputs(1, 70, 2 * channels)
    check(inputs, d_out, (torch.float32,) * 3, num_groups=2, activation=activation, gate_first=gate_first)


def test_the_longest_group_of_one_tile_and_the_next():
    for channels in (kernels.MAX_BLOCK, kernels.MAX_BLOCK + 1):
        check(*make_inputs(1, 2, channels), (torch.float32,) * 3)


def test_a_program_of_many_rows(monkeypatch):
    """The sum for the weight's gradient runs over all of them."""
    monkeypatch.setattr(kernels, "WARPS", 8)
    inputs, d_out = make_inputs(1, 200, 16)
    check(inputs, d_out, (torch.float32,) * 3)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e15])
def test_rows_of_any_size(scale):
    inputs, d_out = make_inputs(1, 9, 16)
    inputs[0] *= scale
    check(inputs, d_out, (torch.float32,) * 3)


def test_views_into_a_larger_projection():
    inputs, d_out = make_inputs(2, 9, 16)
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        wide = [x.repeat_interleave(2, -1).to(DEVICE, dtype).requires_grad_() for x in inputs]
        with backend(name):
            out = gated_rms_norm(wide[0][..., ::2], wide[1][..., 3:19], wide[2][::2])
            results[name] = [out, *torch.autograd.grad(out, wide, d_out.mT.contiguous().mT.to(out))]
    assert max(map(relative_error, results["triton"], results["reference"])) < 5e-7


def test_elements_beyond_int32():
    """Rows 2^30 elements apart, of which only those used are ever touched."""
    (x, gate, weight), _ = make_inputs(1, 4, 16)
    far = torch.empty(3 * 2**30 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 4, 16), (0, 2**30, 1))
    far.copy_(x)
    with backend("reference"):
        expected = gated_rms_norm(x, gate, weight)
    with backend("triton"):
        out = gated_rms_norm(far, gate.to(DEVICE).float(), weight.to(DEVICE).float())
    assert relative_error(out, expected) < 5e-7


def test_without_gradients_no_operator_is_called(monkeypatch):
    monkeypatch.setattr(kernels, "_operator", None)
    inputs = [x.to(DEVICE).float() for x in make_inputs(1, 1, 24)[0]]
    with backend("triton"):
        expected = gated_rms_norm(*inputs)
        with torch.no_grad():
            assert torch.equal(gated_rms_norm(*(x.requires_grad_() for x in inputs)), expected)


def test_operator_contracts():
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    inputs = [x.to(DEVICE).float().requires_grad_() for x in make_inputs(2, 3, 24)[0]]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._operator, (*inputs, 1e-6, 3, "silu", True), test_utils=utils)


def test_compiles_into_one_graph():
    inputs = [x.to(DEVICE).float().requires_grad_() for x in make_inputs(2, 5, 24)[0]]

    def run(*inputs):
        with backend("triton"):
            return gated_rms_norm(*inputs, num_groups=3).sin().sum()

    got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, inputs) for x in (got, expected)))) < 1e-6


def test_float64_is_refused():
    inputs = [x.to(DEVICE) for x in make_inputs(1, 3, 24)[0]]
    with backend("triton"), pytest.raises(ValueError, match="float64 inputs; use reference, torch, auto"):
        gated_rms_norm(*inputs)


def launch():
    """The kernels of Mamba-2 (2.7B, and with 8 groups) and of Lightning attention (MiniMax-Text-01)."""
    for channels, num_groups, x_dtype, activation, gate_first in (
        (5120, 1, torch.float32, "silu", True),
        (8192, 8, torch.float32, "silu", True),
        (8192, 1, torch.bfloat16, "sigmoid", False),
        (16384, 1, torch.bfloat16, "sigmoid", False),
    ):
        x, gate = torch.zeros(1, 64, channels, dtype=x_dtype), torch.zeros(1, 64, channels, dtype=torch.bfloat16)
        weight = torch.zeros(channels)
        options = num_groups, activation, gate_first
        out, r = kernels._forward(x, gate, weight, 1e-6, *options)
        kernels._backward(out, x, gate, weight, r, *options)


def test_compiles_for_an_h100():
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {"_forward_kernel", "_backward_kernel", "_mean_kernel"}
    for kernel in compiled:
        assert kernel.shared <= 16 * 1024 and kernel.registers <= 128 and kernel.spilled <= 64, kernel
