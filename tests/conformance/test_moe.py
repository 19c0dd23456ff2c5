"""The mixture of experts against its definition: what every path agrees on could still be the wrong function."""

import pytest
import torch

import zoo
from tests.conformance.conftest import Measure
from tests.conformance.subjects import HIDDEN_SIZE, JAMBA_MOE, MOE, SHARED_MOE
from zoo.blocks import SequenceContext
from zoo.blocks.moe import MoE


@pytest.mark.parametrize("ffn", (MOE, JAMBA_MOE, SHARED_MOE), ids=("renormalized", "not", "shared"))
@torch.no_grad()
def test_a_token_is_the_weighted_sum_of_its_experts(ffn: dict, measure: Measure) -> None:
    config = zoo.load_config(
        {"vocab_size": 8, "hidden_size": HIDDEN_SIZE, "blocks": {"b": {"ffn": ffn}}, "pattern": "b"}
    )
    torch.manual_seed(0)
    moe = MoE(config.layers[0].ffn.config, config, 0).double()
    for parameter in moe.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(2, 11, HIDDEN_SIZE, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for row, t in torch.cartesian_prod(torch.arange(2), torch.arange(11)):
        token = x[row, t]
        scores = torch.exp(moe.router.weight @ token)
        chosen = sorted(range(ffn["num_experts"]), key=lambda e: -scores[e])[: ffn["top_k"]]
        total = sum(scores[e] for e in chosen) if ffn["renormalize"] else scores.sum()
        for e in chosen:
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            expected[row, t] += scores[e] / total * (moe.experts.down_proj[e] @ (gate * gate.sigmoid() * up))
        if moe.shared is not None:
            gate, up = moe.shared.gate_proj.weight @ token, moe.shared.up_proj.weight @ token
            expected[row, t] += moe.shared.down_proj.weight @ (gate * gate.sigmoid() * up)
    out, statistics = moe(x, SequenceContext.of(x))
    measure("output", out, expected, 1e-12)
    assert statistics.tokens == 22 and statistics.assignments.sum() == 22 * ffn["top_k"]
    measure("probabilities", statistics.probabilities, (x @ moe.router.weight.T).softmax(-1).sum((0, 1)), 1e-12)
