import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, forward, gradients, inputs, probe

DOCUMENTS = [1, 7, 66, 1, 1, 13, 3]


def test_packed_documents_equal_each_alone(subject: str, measure: Measure) -> None:
    model, x = build(subject), inputs(1, sum(DOCUMENTS)).requires_grad_()
    cu_seqlens = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = forward(model, x, cu_seqlens=cu_seqlens)
    alone = torch.cat([forward(model, document) for document in x.split(DOCUMENTS, 1)], 1)
    for i, (out, ref) in enumerate(zip(packed.split(DOCUMENTS, 1), alone.split(DOCUMENTS, 1), strict=True)):
        measure(f"document {i}", out, ref, 1e-10)
    measure.gradients("packed", gradients(model, probe(packed), x), gradients(model, probe(alone), x), 1e-9)


def test_a_document_does_not_see_the_one_before(subject: str) -> None:
    model, x = build(subject), inputs(1, 40).requires_grad_()
    out = forward(model, x, cu_seqlens=torch.tensor([0, 17, 40], dtype=torch.int32))
    (gradient,) = torch.autograd.grad(probe(out[:, 17:]), x)
    assert not gradient[:, :17].any() and gradient[:, 17:].any(-1).all()
