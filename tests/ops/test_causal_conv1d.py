"""zoo/ops/causal_conv1d: all tokens at once against the float64 sliding window, that against torch's convolution."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import poisoned_memory, relative_error
from zoo.ops import backend, causal_conv1d
from zoo.ops.causal_conv1d import chunked

NAMES = ("x", "weight", "bias", "initial_state")


def make_inputs(batch, length, channels, width, rows=None):
    torch.manual_seed(length)
    return [
        torch.randn(batch, length, channels).bfloat16().double(),
        torch.randn(channels, width).double(),
        torch.randn(channels).double(),
        torch.randn(rows or batch, channels, width - 1).bfloat16().double(),
    ]


def outputs_and_gradients(name, inputs, dtype, *, activation=None, cu_seqlens=None, device="cpu"):
    """{"out", "state", and the gradient of each input} on backend `name`; x in dtype, the rest at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        None if x is None else x.detach().to(device, wide if i else dtype, copy=True).requires_grad_()
        for i, x in enumerate(inputs)
    ]
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    with backend(name):
        out, state = causal_conv1d(
            *leaves[:3], activation=activation, initial_state=leaves[3], return_state=True, cu_seqlens=cu
        )
    assert out.dtype == dtype and state.dtype == wide
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).bfloat16().to(out)).sum(dtype=wide)
    loss = loss + (state * torch.randn(state.shape, generator=generator).to(device)).sum()
    loss.backward()
    results = {"out": out, "state": state}
    return results | {n: x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None}


def assert_torch_equals_reference(inputs, dtype, tolerance, **options):
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    with poisoned_memory():
        got = outputs_and_gradients("torch", inputs, dtype, **options)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 67])
def test_torch_equals_reference(length, width, activation):
    inputs = make_inputs(2, length, 6, width)
    assert_torch_equals_reference(inputs, torch.float32, 1e-6, activation=activation)
    assert_torch_equals_reference(inputs, torch.float64, 1e-14, activation=activation)
    assert_torch_equals_reference(inputs, torch.bfloat16, 1e-2, activation=activation)


def test_without_bias_and_initial_state():
    x, weight, _, _ = make_inputs(2, 20, 6, 4)
    assert_torch_equals_reference([x, weight, None, None], torch.float64, 1e-14)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cu_seqlens", [[0, 9], [0, 0, 1, 3, 3, 6, 10, 30, 30], list(range(9))])
def test_packed_documents(cu_seqlens, width):
    inputs = make_inputs(1, cu_seqlens[-1], 6, width, rows=len(cu_seqlens) - 1)
    assert_torch_equals_reference(inputs, torch.float32, 1e-6, activation="silu", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 7, 27])
def test_blocks_of_any_size(rows, width, activation, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", rows * 6 // torch.get_num_threads())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        inputs = make_inputs(3, 13, 6, width)
        assert_torch_equals_reference(inputs, dtype, tolerance, activation=activation)
        cu_seqlens = [0, 0, 1, 3, 3, 6, 10, 30, 30]
        inputs = make_inputs(1, 30, 6, width, rows=8)
        assert_torch_equals_reference(inputs, dtype, tolerance, activation=activation, cu_seqlens=cu_seqlens)


def test_views_into_a_larger_projection():
    """As the blocks call it: x is a part of a projection's output."""
    x, weight, bias, _ = make_inputs(2, 20, 6, 4)
    results = {}
    for name in ("reference", "torch"):
        wide = torch.cat([x, 2 * x], dim=-1).requires_grad_()
        with backend(name):
            out = causal_conv1d(wide[..., 3:9], weight, bias, activation="silu")
            gradient = torch.autograd.grad(out, wide, x.mT.contiguous().mT)
            step = causal_conv1d(wide[:, :1, 3:9].detach(), weight, bias, activation="silu")
        results[name] = [out, *gradient, step]
    assert max(map(relative_error, results["torch"], results["reference"])) < 1e-14


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_packed_documents_equal_each_alone(name):
    bounds = [0, 2, 2, 9, 30]
    x, weight, bias, state = make_inputs(1, 30, 6, 4, rows=4)
    with backend(name):
        out, final = causal_conv1d(
            x, weight, bias, initial_state=state, return_state=True, cu_seqlens=torch.tensor(bounds).int()
        )
        assert torch.equal(final[1], state[1])
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start < end:
                rows = state[n : n + 1]
                alone = causal_conv1d(x[:, start:end], weight, bias, initial_state=rows, return_state=True)
                assert relative_error(out[:, start:end], alone[0]) < 1e-14
                assert torch.equal(final[n : n + 1], alone[1])


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_pieces_equal_the_whole(name):
    x, weight, bias, state = make_inputs(2, 30, 6, 4)
    with backend(name):
        whole, final = causal_conv1d(x, weight, bias, initial_state=state, return_state=True)
        pieces = []
        for start, end in [(0, 17), (17, 19), (19, 28), (28, 29), (29, 30)]:
            out, state = causal_conv1d(x[:, start:end], weight, bias, initial_state=state, return_state=True)
            pieces.append(out)
    assert relative_error(torch.cat(pieces, dim=1), whole) < 1e-14
    assert torch.equal(state, final)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_equals_a_padded_convolution_of_torch(name):
    x, weight, bias, _ = make_inputs(2, 30, 6, 4)
    padded = functional.pad(x.mT, (3, 0))
    expected = functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=6).mT)
    with backend(name):
        assert relative_error(causal_conv1d(x, weight, bias, activation="silu"), expected) < 1e-14


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    cu_seqlens = torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    inputs = [x.requires_grad_() for x in make_inputs(1, 6, 2, 3, rows=3)]

    def run(x, weight, bias, state):
        return causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, return_state=True, cu_seqlens=cu_seqlens
        )

    with backend(name):
        assert torch.autograd.gradcheck(run, inputs)


def test_only_the_weight_needs_a_gradient():
    x, weight, bias, _ = make_inputs(1, 20, 3, 4)
    gradients = {}
    for name in ("reference", "torch"):
        leaf = weight.clone().requires_grad_()
        with backend(name):
            causal_conv1d(x, leaf, bias).square().sum().backward()
        gradients[name] = leaf.grad
    assert relative_error(gradients["torch"], gradients["reference"]) < 1e-14


def test_the_backward_keeps_only_the_arguments():
    leaves = [x.requires_grad_() for x in make_inputs(2, 20, 6, 4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        causal_conv1d(*leaves[:3], activation="silu", initial_state=leaves[3])
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves}


def test_one_token_without_gradients_calls_no_operator(monkeypatch):
    monkeypatch.setattr(chunked, "_operator", None)
    inputs = [x.requires_grad_() for x in make_inputs(2, 1, 6, 4)]
    results = {}
    for name in ("reference", "torch"):
        with backend(name), torch.no_grad():
            out, state = causal_conv1d(*inputs[:3], activation="silu", initial_state=inputs[3], return_state=True)
        results[name] = out, state
    assert max(map(relative_error, results["torch"], results["reference"])) < 1e-14


def test_operator_contracts():
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for cu_seqlens in (None, torch.tensor([0, 5, 5, 70], dtype=torch.int32)):
        rows = 1 if cu_seqlens is None else 3
        x, weight, bias, state = (x.requires_grad_() for x in make_inputs(1, 70, 6, 4, rows=rows))
        arguments = x, weight, bias, "silu", state, cu_seqlens
        torch.library.opcheck(chunked._operator, arguments, test_utils=utils)


def test_reference_counts_its_flops():
    x, weight, bias, _ = make_inputs(3, 7, 6, 4)
    with backend("reference"), FlopCounterMode(display=False) as counter:
        causal_conv1d(x, weight, bias)
    assert counter.get_total_flops() == 3 * 7 * (2 * 4 * 6)


def test_compiles_into_one_graph():
    inputs = [x.float().requires_grad_() for x in make_inputs(2, 20, 6, 4)]

    def run(x, weight, bias, state):
        out, final = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, return_state=True)
        return out.sin().sum() + final.cos().sum()

    expected = run(*inputs)
    # aot_eager traces and lowers forward and backward as inductor would, without half a minute of C++ compilation.
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert relative_error(got, expected) < 1e-5
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(a, b) < 1e-5


def test_shapes_on_the_meta_device():
    x = torch.empty(2, 100, 6, device="meta")
    out, state = causal_conv1d(x, torch.empty(6, 4, device="meta"), return_state=True)
    assert out.shape == (2, 100, 6) and state.shape == (2, 6, 3) and out.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x must be"),
        ({"x": torch.zeros(2, 0, 3)}, "at least one token"),
        ({"weight": torch.zeros(4, 4)}, r"weight must be \[3, width\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[3\]"),
        ({"activation": "relu"}, 'activation must be None or "silu"'),
        ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state must be \[2, 3, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4)} | changes
    with pytest.raises(ValueError, match=message) as error:
        causal_conv1d(**arguments)
    assert "\n" not in str(error.value)
