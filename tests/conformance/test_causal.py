import torch

from tests.conformance.conftest import Measure
from tests.conformance.runs import build, context_of, forward, inputs, mix

LENGTH = 70  # over the chunk of every op


@torch.no_grad()
def test_no_output_before_a_changed_token_changes(subject: str, measure: Measure) -> None:
    model, x = build(subject), inputs(2, LENGTH)
    before = forward(model, x)
    for t in (1, 2, 33, 64, LENGTH - 1):
        changed = x.clone()
        changed[:, t] = -x[:, t]
        after = forward(model, changed)
        measure(f"outputs before token {t}", after[:, :t], before[:, :t], 1e-12)
        assert ((after[:, t] - before[:, t]).norm(dim=-1) > 1e-3).all(), f"token {t} does not reach its own output"


@torch.no_grad()
def test_every_mixer_carries_a_token_to_the_next(subject: str) -> None:
    model, x = build(subject), inputs(1, 8)
    changed = x.clone()
    changed[:, 3] = -2 * x[:, 3]  # twice, as short_conv multiplies the token by itself
    context = context_of(x)
    for layer in model.layers:
        if layer.mixer is not None:
            difference = (mix(layer.mixer, changed, context) - mix(layer.mixer, x, context)).norm(dim=-1)[0]
            after = 3 + getattr(layer.mixer.config, "dilation", 1)
            assert (difference[:3] == 0).all() and (difference[[3, after]] > 1e-4).all()
