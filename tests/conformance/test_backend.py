from itertools import groupby

import pytest
import torch
from torch import Tensor

import zoo
from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, gradients, inputs, probe
from tests.conformance.subjects import SUBJECTS
from zoo import ops
from zoo.blocks.gated_delta import GatedDelta
from zoo.blocks.hierarchical import Hierarchical
from zoo.blocks.kda import KDA
from zoo.models import ZooModel

LENGTH = 70  # two chunks
CU_SEQLENS = torch.tensor([0, 1, 34, LENGTH], dtype=torch.int32)

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
WITHOUT_KERNELS = {GatedDelta, KDA, Hierarchical}


def compared(subject: str) -> list[tuple[str, torch.dtype]]:
    """Backends and dtypes. Kernels, being interpreted, run one layer; they have no float64. The delta rule has none;
    interpreted, hierarchical's take minutes (tests/blocks compares them once), and so do stacks of several kinds, each
    of which has a row."""
    model = zoo.build(SUBJECTS[subject], device="meta")
    kinds = {layer.mixer.kind for layer in model.config.layers if layer.mixer is not None}
    without = {type(module) for module in model.modules()} & WITHOUT_KERNELS
    kernels = [] if without or len(kinds) > 1 else [("triton", torch.float32)]
    return [("torch", torch.float64), ("torch", torch.float32), *kernels]


def whole(model: ZooModel, x: Tensor) -> Tensor:
    return forward(model, x)


def packed(model: ZooModel, x: Tensor) -> Tensor:
    return forward(model, x, cu_seqlens=CU_SEQLENS)


def with_state(model: ZooModel, x: Tensor) -> Tensor:
    return chunked(model, x, [33, 36, 1])


def left_padded(model: ZooModel, x: Tensor) -> Tensor:
    mask = torch.arange(LENGTH)[None] >= 5
    return forward(model, x, attention_mask=mask) * mask[..., None]


@pytest.mark.parametrize("run", (whole, packed, with_state, left_padded), ids=lambda run: run.__name__)
def test_outputs_and_gradients_equal_the_reference(subject: str, run, measure: Measure) -> None:
    def result(backend: str, dtype: torch.dtype, layers: int | None) -> tuple[Tensor, dict[str, Tensor | None]]:
        model, x = build(subject, dtype), inputs(1, LENGTH).to(dtype).requires_grad_()
        model.layers = model.layers[:layers]
        with ops.backend(backend):
            out = run(model, x)
            return out, gradients(model, probe(out), x)

    for layers, mine in groupby(compared(subject), key=lambda each: 1 if each[0] == "triton" else None):
        reference, reference_gradients = result("reference", torch.float64, layers)
        for backend, dtype in mine:
            out, out_gradients = result(backend, dtype, layers)
            assert out.dtype == dtype
            measure(f"{backend} in {dtype}", out, reference, BOUNDS[dtype])
            measure.gradients(f"{backend} in {dtype}", out_gradients, reference_gradients, BOUNDS[dtype])
