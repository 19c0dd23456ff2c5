import pytest
import torch

from tests.conformance.conftest import Measure
from tests.conformance.matrix import PARTS
from tests.conformance.runs import build, context_of, inputs, probe
from tests.conformance.subjects import new_layers
from zoo.blocks import RouterStatistics
from zoo.models.decoder import DecoderLayer

INDUCTOR = "mamba"  # the C++ compiler takes long: one subject stands for all


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def results(layer: DecoderLayer, forward, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out, *router = forward(x, context_of(x))
    loss = probe(out) + RouterStatistics(*router).probabilities.square().sum() if router else probe(out)
    named = {"input": x, **dict(layer.named_parameters())}
    return {"output": out, **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def test_compiled_layers_equal_eager_ones(subject: str, measure: Measure) -> None:
    model = build(subject, torch.float32)
    backend = "inductor" if subject == INDUCTOR else "aot_eager"
    for i in new_layers(subject, PARTS["compile"]):
        layer = model.layers[i]
        x = inputs(2, 40, torch.float32).requires_grad_()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        measure.gradients(f"layer {i}", results(layer, compiled, x), results(layer, layer, x), 1e-5)
