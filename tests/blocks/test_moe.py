"""The mixture of experts against Mixtral's and Jamba's, its losses against transformers' and the papers' formulas."""

import pytest
import torch
from transformers import JambaConfig, MixtralConfig
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from tests.blocks.helpers import (
    assert_close,
    assert_parity,
    build_part,
    copy_weights,
    model_config,
    perturb,
    random_input,
    run_ffn,
)
from zoo import ConfigError
from zoo.blocks import SequenceContext
from zoo.blocks.moe import assign
from zoo.models.loss import router_loss

HIDDEN, INNER = 12, 20
EXPERTS = {f"experts.{name}": f"experts.{name}" for name in ("gate_up_proj", "down_proj")}


def moe(num_experts=5, top_k=2, **fields):
    ffn = {"kind": "moe", "intermediate_size": INNER, "num_experts": num_experts, "top_k": top_k, **fields}
    return build_part(model_config(hidden_size=HIDDEN, ffn=ffn), "ffn")


def mixtral(num_experts=5, top_k=2):
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config), {"router.weight": "gate.weight"} | EXPERTS


def jamba(num_experts=5, top_k=2):
    config = JambaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = "eager"
    return JambaSparseMoeBlock(config), {"router.weight": "router.weight"} | EXPERTS


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (4, 1), (3, 3), (16, 4), (1, 1)])
@pytest.mark.parametrize("theirs", [mixtral, jamba])
def test_equals_transformers(theirs, num_experts, top_k):
    reference, weights = theirs(num_experts, top_k)
    ours = moe(num_experts, top_k, renormalize=theirs is mixtral)
    x = random_input(2, 11, HIDDEN)
    if num_experts == 1 or (theirs is mixtral and top_k == 1):
        # The weight of the one expert is 1 whatever the router says, so the router's gradient is zero.
        perturb(reference)
        copy_weights(ours, reference, weights)
        assert_close(run_ffn(ours)(x), reference(x))
    else:
        assert_parity(ours, run_ffn(ours), reference, reference, weights, x)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_shared_experts", [0, 1, 3])
def test_equals_the_formula(activation, renormalize, num_shared_experts):
    act = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "relu2": lambda x: x.relu() ** 2}[activation]
    fields = {"activation": activation, "renormalize": renormalize, "num_shared_experts": num_shared_experts}
    module = perturb(moe(**fields).double())
    x = random_input(2, 6, HIDDEN, dtype=torch.float64)
    reference = torch.zeros_like(x)
    for b in range(2):
        for t in range(6):
            p = (module.router.weight @ x[b, t]).softmax(0)
            chosen = p.argsort(descending=True)[:2]
            for e in chosen:
                gate, up = (module.experts.gate_up_proj[e] @ x[b, t]).chunk(2)
                weight = p[e] / p[chosen].sum() if renormalize else p[e]
                reference[b, t] += weight * (module.experts.down_proj[e] @ (act(gate) * up))
            if num_shared_experts:
                shared = module.shared
                inner = act(shared.gate_proj.weight @ x[b, t]) * (shared.up_proj.weight @ x[b, t])
                assert inner.shape == (num_shared_experts * INNER,)
                reference[b, t] += shared.down_proj.weight @ inner
    assert_close(run_ffn(module)(x), reference)


def test_experts_without_tokens():
    """Their gradient is zero, not unwritten memory, and nothing else suffers."""
    module = perturb(moe(num_experts=6, top_k=2))
    with torch.no_grad():
        module.router.weight[:2] = 10  # for positive inputs, experts 0 and 1 always win
        module.router.weight[2:] = -10
    x = random_input(2, 5, HIDDEN).abs().requires_grad_()
    y, statistics = module(x, SequenceContext.of(x))
    y.square().sum().backward()
    assert statistics.assignments.tolist() == [10, 10, 0, 0, 0, 0]
    for parameter in (module.experts.gate_up_proj, module.experts.down_proj):
        assert torch.equal(parameter.grad[2:], torch.zeros_like(parameter.grad[2:]))
        assert parameter.grad[:2].norm() > 0
    assert all(p.grad.isfinite().all() for p in [x, *module.parameters()])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (4, 1), (3, 3)])
def test_auxiliary_loss_equals_transformers(masked, num_experts, top_k):
    """Pooled over layers, with padding left out, value and gradient."""
    layers = [perturb(moe(num_experts, top_k, router={"aux_loss_coef": 0.7}), seed) for seed in range(3)]
    inputs = [random_input(3, 8, HIDDEN, seed=seed) for seed in range(3)]
    mask = (torch.arange(8) < torch.tensor([8, 3, 6])[:, None]) if masked else None
    statistics, logits = [], []
    for layer, x in zip(layers, inputs, strict=True):
        statistics.append((layer.config, layer(x, SequenceContext.of(x, padding_mask=mask))[1]))
        logits.append(x.flatten(0, 1) @ layer.router.weight.T)
    loss = router_loss(statistics)
    reference = 0.7 * load_balancing_loss_func(tuple(logits), num_experts, top_k, mask)
    assert_close(loss, reference)
    routers = [layer.router.weight for layer in layers]
    if num_experts != top_k:
        ours, theirs = (torch.autograd.grad(value, routers) for value in (loss, reference))
        for gradient, expected in zip(ours, theirs, strict=True):
            assert_close(gradient, expected, "router gradient", tolerance=1e-4)  # of a sum that nearly cancels


def test_balanced_routing_gives_top_k():
    module = moe(num_experts=4, top_k=2, router={"aux_loss_coef": 1.0})
    torch.nn.init.zeros_(module.router.weight)
    x = random_input(1, 8, HIDDEN)
    assert router_loss([(module.config, module(x, SequenceContext.of(x))[1])]).item() == pytest.approx(2)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_equals_the_formula(masked):
    layers = [perturb(moe(router={"aux_loss_coef": 0.0, "z_loss_coef": 0.3}), seed) for seed in range(2)]
    x = random_input(2, 6, HIDDEN)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool() if masked else torch.ones(2, 6).bool()
    statistics = [(layer.config, layer(x, SequenceContext.of(x, padding_mask=mask))[1]) for layer in layers]
    logits = torch.cat([x[mask] @ layer.router.weight.T for layer in layers])
    assert_close(router_loss(statistics), 0.3 * logits.exp().sum(-1).log().square().mean())


def test_different_routers_are_not_pooled():
    first, second = perturb(moe(5, 2)), perturb(moe(4, 2))
    x = random_input(1, 6, HIDDEN)
    statistics = [(module.config, module(x, SequenceContext.of(x))[1]) for module in (first, second)]
    assert_close(router_loss(statistics), router_loss(statistics[:1]) + router_loss(statistics[1:]))
    assert router_loss([]) is None


def test_padding_is_not_counted_and_does_not_matter():
    module = perturb(moe(num_shared_experts=1))
    x = random_input(2, 6, HIDDEN)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    y, statistics = module(x, SequenceContext.of(x, padding_mask=mask))
    alone = torch.cat([x[0, 2:], x[1, :5]])[None]
    y_alone, expected = module(alone, SequenceContext.of(alone))
    assert_close(y[mask.bool()], y_alone[0])
    for name, tensor in expected._asdict().items():
        assert_close(getattr(statistics, name), tensor, name)
    assert statistics.tokens == 9 and statistics.assignments.sum() == 18
    leaf = x.clone().requires_grad_()
    module(leaf, SequenceContext.of(leaf, padding_mask=mask))[0].square().sum().backward()
    assert torch.equal(leaf.grad[~mask.bool()], torch.zeros(3, HIDDEN))
    assert leaf.grad[mask.bool()].norm() > 0


def test_a_batch_of_padding_alone_is_finite():
    module = perturb(moe(num_shared_experts=1))
    x = random_input(1, 3, HIDDEN)
    y, statistics = module(x, SequenceContext.of(x, padding_mask=torch.zeros(1, 3)))
    assert torch.equal(y, torch.zeros_like(y))
    assert router_loss([(module.config, statistics)]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast(dtype):
    """Near float32, computed in bfloat16 but for the router, whose choice is float32's."""
    module, x = perturb(moe(num_experts=6, num_shared_experts=1)), random_input(3, 50, HIDDEN)
    y, statistics = module(x, SequenceContext.of(x))
    with torch.autocast("cpu", torch.bfloat16):
        low, low_statistics = module(x.to(dtype), SequenceContext.of(x))
    (low.float().square().sum()).backward()
    assert low.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in module.parameters())
    if dtype == torch.float32:
        assert torch.equal(low_statistics.assignments, statistics.assignments)
        assert_close(low.float(), y, tolerance=2e-2)


def test_bfloat16_weights():
    low, x = perturb(moe(num_experts=6)).to(torch.bfloat16), random_input(3, 50, HIDDEN).bfloat16()
    full = moe(num_experts=6)
    full.load_state_dict(low.state_dict())
    y = run_ffn(low)(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), run_ffn(full)(x.float()), tolerance=2e-2)


@pytest.mark.parametrize("round_up", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_assignment(round_up, tokens):
    """Every copy of a token stands among its expert's rows, each row's token chose that expert."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, 6, generator=generator).argsort(1)[:, :2] % 5  # the last expert gets nothing
    rows, places, ends = assign(chosen, 7, round_up)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    assert len(rows) == ends[-1] and ends.dtype == torch.int32
    assert torch.equal(rows[places], torch.arange(tokens)[:, None].expand(-1, 2))
    assert ((places >= starts[chosen]) & (places < ends[chosen])).all()
    assert len(places.unique()) == places.numel()
    for expert in range(7):
        mine = rows[starts[expert] : ends[expert]]
        assert set(mine.tolist()) == set(torch.where(chosen == expert)[0].tolist())
        count = int((chosen == expert).sum())
        assert len(mine) == count or (round_up and count < len(mine) <= max(count * 9 / 8, count + 16))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"blocks\.b\.ffn\.top_k: must be at most num_experts \(4\), got 5"):
        moe(num_experts=4, top_k=5)
