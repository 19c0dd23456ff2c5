import torch

from tests.conformance.runs import build, forward, given, inputs
from zoo import ops

# So many that memories are written twice and read, slots of slots seen, blocks left out, sinks clamped to.
LENGTH = 17
# Of deep stacks, whose mixers have rows of their own: the reference takes a token at a time.
DEEP, FEW = 4, 7


def test_the_reference_passes_gradcheck(subject: str) -> None:
    model = build(subject)
    x = inputs(1, FEW if len(model.layers) >= DEEP else LENGTH).requires_grad_()
    named = {name: p for name, p in model.named_parameters() if not name.startswith("embed_tokens")}

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(model, weights, kwargs=given(model, x)).last_hidden_state

    assert forward(model, x).dtype == torch.float64
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(run, (x, *named.values()), fast_mode=True)
