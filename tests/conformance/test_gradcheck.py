import torch

from tests.conformance.runs import build, forward, given, inputs
from zoo import ops


def test_the_reference_passes_gradcheck(subject: str) -> None:
    model, x = build(subject), inputs(1, 7).requires_grad_()
    named = {name: p for name, p in model.named_parameters() if not name.startswith("embed_tokens")}

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(model, weights, kwargs=given(model, x)).last_hidden_state

    assert forward(model, x).dtype == torch.float64
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(run, (x, *named.values()), fast_mode=True)
