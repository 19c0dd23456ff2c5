"""zoo/ops/gated_rms_norm: the reference against transformers' modules, and the torch backend against the reference."""

import pytest
import torch

from tests.ops.helpers import poisoned_memory, relative_error
from zoo.ops import backend, gated_rms_norm
from zoo.ops.gated_rms_norm import chunked

MODES = [("silu", True), ("sigmoid", False), ("silu", False), ("sigmoid", True)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 1e-2}


def make_inputs(batch, length, channels):
    torch.manual_seed(length)
    x, gate, d_out = (torch.randn(batch, length, channels).bfloat16().double() for _ in range(3))
    return [x, 2 * gate, torch.randn(channels).bfloat16().double()], d_out


def outputs_and_gradients(name, inputs, d_out, dtypes, **options):
    """out and the gradients of x, gate and weight on backend `name`, in dtypes of theirs."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    with backend(name):
        out = gated_rms_norm(*leaves, **options)
    assert out.dtype == dtypes[1] and out.is_contiguous()
    return [out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def assert_torch_equals_reference(inputs, d_out, dtypes, tolerance, **options):
    expected = outputs_and_gradients("reference", inputs, d_out, (torch.float64,) * 3, **options)
    with poisoned_memory():
        got = outputs_and_gradients("torch", inputs, d_out, dtypes, **options)
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize(("activation", "gate_first"), MODES)
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_equals_reference(dtype, num_groups, activation, gate_first, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 5 * 24 // torch.get_num_threads())  # five rows, of fourteen
    inputs, d_out = make_inputs(2, 7, 24)
    dtypes = (dtype, dtype, torch.promote_types(dtype, torch.float32))
    options = {"num_groups": num_groups, "activation": activation, "gate_first": gate_first, "eps": 1e-3}
    assert_torch_equals_reference(inputs, d_out, dtypes, TOLERANCE[dtype], **options)


@pytest.mark.parametrize(("activation", "gate_first"), MODES[:2])
def test_a_wide_x_beside_a_narrow_gate(activation, gate_first):
    """As Mamba-2 calls it: x is the float32 accumulator of the scan."""
    inputs, d_out = make_inputs(1, 50, 16)
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    options = {"activation": activation, "gate_first": gate_first}
    expected = outputs_and_gradients("reference", inputs, d_out, (torch.float64,) * 3, **options)
    got = outputs_and_gradients("torch", inputs, d_out, dtypes, **options)
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors[0], errors[2]) < 4e-3 and max(errors[1], errors[3]) < 5e-7, errors


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e15])
def test_rows_of_any_size(scale):
    """Zeros give zeros (and 1 / sqrt(eps) as the slope); squares stay within float32."""
    inputs, d_out = make_inputs(1, 9, 16)
    inputs[0] *= scale
    assert_torch_equals_reference(inputs, d_out, (torch.float32,) * 3, 1e-6)


def test_views_into_a_larger_projection():
    """As the blocks call it: the gate is a part of a projection's output."""
    inputs, d_out = make_inputs(2, 9, 16)
    wide = [torch.stack([x, x + 1], dim=-1).flatten(-2).requires_grad_() for x in inputs[:2]]
    results = {}
    for name in ("reference", "torch"):
        with backend(name):
            x, gate = wide[0][..., ::2], wide[1][..., 3:19]
            out = gated_rms_norm(x, gate, inputs[2])
            results[name] = [out, *torch.autograd.grad(out, wide, d_out.mT.contiguous().mT)]
    assert max(map(relative_error, results["torch"], results["reference"])) < 1e-14


@pytest.mark.parametrize("num_groups", [1, 4])
def test_equals_mamba_2_of_transformers(num_groups):
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    (x, gate, weight), _ = make_inputs(2, 7, 24)
    x, gate, weight = x.float(), gate.float(), weight.float()
    norm = NemotronHRMSNormGated(24, group_size=24 // num_groups, eps=1e-5)
    norm.weight.data.copy_(weight)
    with backend("reference"):
        out = gated_rms_norm(x, gate, weight, eps=1e-5, num_groups=num_groups)
    assert relative_error(out, norm(x, gate)) < 2e-7


def test_equals_lightning_attention_of_transformers():
    from transformers.models.minimax.modeling_minimax import MiniMaxRMSNorm

    (x, gate, weight), _ = make_inputs(2, 7, 24)
    x, gate, weight = x.float(), gate.float(), weight.float()
    norm = MiniMaxRMSNorm(24)
    norm.weight.data.copy_(weight)
    with backend("reference"):
        out = gated_rms_norm(x, gate, weight, activation="sigmoid", gate_first=False)
    assert relative_error(out, torch.sigmoid(gate) * norm(x)) < 2e-7


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize(("activation", "gate_first"), MODES)
def test_gradcheck(name, activation, gate_first):
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 6)[0]]

    def run(x, gate, weight):
        return gated_rms_norm(x, gate, weight, num_groups=2, activation=activation, gate_first=gate_first)

    with backend(name):
        assert torch.autograd.gradcheck(run, inputs)


def test_the_backward_keeps_only_the_arguments_and_one_number_per_group():
    inputs, _ = make_inputs(2, 7, 24)
    leaves = [x.requires_grad_() for x in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        gated_rms_norm(*leaves, num_groups=3)
    pointers = [x.data_ptr() for x in leaves]
    assert [x.shape for x in kept if x.data_ptr() not in pointers] == [(2, 7, 3)]


def test_without_gradients_no_operator_is_called(monkeypatch):
    monkeypatch.setattr(chunked, "_operator", None)
    inputs, _ = make_inputs(1, 1, 24)
    expected = gated_rms_norm(*inputs)
    with torch.no_grad():
        assert torch.equal(gated_rms_norm(*(x.requires_grad_() for x in inputs)), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_into_one_graph(grad):
    inputs = [x.requires_grad_() for x in make_inputs(2, 20, 24)[0]]

    def run(*inputs):
        return gated_rms_norm(*inputs, num_groups=3).sin().sum()

    # aot_eager traces and lowers forward and backward as inductor would, without half a minute of C++ compilation.
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, expected = compiled(*inputs), run(*inputs)
    assert relative_error(got, expected) < 1e-14
    if grad:
        gradients = (torch.autograd.grad(x, inputs) for x in (got, expected))
        assert max(map(relative_error, *gradients)) < 1e-14


def test_operator_contracts():
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    inputs = [x.requires_grad_() for x in make_inputs(2, 7, 24)[0]]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked._operator, (*inputs, 1e-6, 3, "silu", True), test_utils=utils)


def test_shapes_on_the_meta_device():
    x = torch.empty(2, 100, 24, device="meta")
    out = gated_rms_norm(x, x.bfloat16(), torch.empty(24, device="meta"))
    assert out.shape == x.shape and out.dtype == torch.bfloat16 and out.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 24)}, "x must be"),
        ({"gate": torch.zeros(2, 5, 23)}, r"gate must be \[2, 5, 24\]"),
        ({"weight": torch.zeros(12)}, r"weight must be \[24\]"),
        ({"num_groups": 5}, "num_groups must divide the 24 channels, got 5"),
        ({"num_groups": 0}, "num_groups must divide"),
        ({"activation": "relu"}, 'activation must be "silu" or "sigmoid"'),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {"x": torch.zeros(2, 5, 24), "gate": torch.zeros(2, 5, 24), "weight": torch.zeros(24)} | changes
    with pytest.raises(ValueError, match=message) as error:
        gated_rms_norm(**arguments)
    assert "\n" not in str(error.value)
