import pytest
import torch
from torch import Tensor

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, gradients, inputs, probe
from zoo import ops
from zoo.models import ZooModel
from zoo.ops.dispatch import BACKENDS, backends

OPS = ("causal_conv1d", "linear_attention", "selective_scan", "softmax_attention")
COMPARED = [name for name in BACKENDS if name != "reference" and all(name in backends(op) for op in OPS)]
LENGTH = 70  # two chunks
CU_SEQLENS = torch.tensor([0, 1, 34, LENGTH], dtype=torch.int32)

# dtype -> bound
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


def whole(model: ZooModel, x: Tensor) -> Tensor:
    return forward(model, x)


def packed(model: ZooModel, x: Tensor) -> Tensor:
    return forward(model, x, cu_seqlens=CU_SEQLENS)


def with_state(model: ZooModel, x: Tensor) -> Tensor:
    return chunked(model, x, [33, 36, 1])


def left_padded(model: ZooModel, x: Tensor) -> Tensor:
    mask = torch.arange(LENGTH)[None] >= 5
    return forward(model, x, attention_mask=mask) * mask[..., None]


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("run", (whole, packed, with_state, left_padded), ids=lambda run: run.__name__)
def test_outputs_and_gradients_equal_the_reference(subject: str, run, backend: str, measure: Measure) -> None:
    with ops.backend("reference"):
        model, x = build(subject), inputs(1, LENGTH).requires_grad_()
        reference = run(model, x)
        reference_gradients = gradients(model, probe(reference), x)
    for dtype, bound in BOUNDS.items():
        model, x = build(subject, dtype), inputs(1, LENGTH).to(dtype).requires_grad_()
        with ops.backend(backend):
            out = run(model, x)
            out_gradients = gradients(model, probe(out), x)
        assert out.dtype == dtype
        measure(f"{dtype}", out, reference, bound)
        measure.gradients(f"{dtype}", out_gradients, reference_gradients, bound)
