"""The mixture of experts against Mixtral's and Jamba's, its losses against transformers' and the papers' formulas."""

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, JambaConfig, MixtralConfig, NemotronHConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

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


SHARED = {f"shared.{part}_proj.weight": f"shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
SIGMOID = {"kind": "sigmoid", "correction_bias": True}


def theirs(module_class, config_class, **fields):
    config = config_class(hidden_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, **fields)
    config._experts_implementation = "eager"
    return module_class(config)


def set_correction(ours, reference):
    """Large enough to change the choice of many tokens."""
    bias = random_input(len(ours.router.correction_bias), seed=3) * 0.3
    ours.router.correction_bias.copy_(bias)
    reference.gate.e_score_correction_bias.copy_(bias)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "kept", "scale"),
    [(8, 2, 4, 2, 2.5), (8, 3, 2, 1, 1.0), (6, 2, 1, 1, 0.7), (12, 8, 3, 2, 2.0), (6, 4, 2, 2, 1.0)],
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_deepseek(num_experts, top_k, groups, kept, scale, renormalize):
    """Sigmoid scores, a correction bias, groups, a scale, shared experts."""
    reference = theirs(
        DeepseekV3MoE, DeepseekV3Config, moe_intermediate_size=INNER, n_routed_experts=num_experts,
        num_experts_per_tok=top_k, n_group=groups, topk_group=kept, routed_scaling_factor=scale, n_shared_experts=2,
        norm_topk_prob=renormalize,
    )  # fmt: skip
    router = SIGMOID | {"num_groups": groups, "top_k_groups": kept, "scale": scale}
    ours = moe(num_experts, top_k, renormalize=renormalize, num_shared_experts=2, router=router)
    set_correction(ours, reference)
    weights = {"router.weight": "gate.weight"} | EXPERTS | SHARED
    assert_parity(ours, run_ffn(ours), reference, reference, weights, random_input(2, 11, HIDDEN))


def test_equals_qwen3_next():
    """A gated shared expert of its own width."""
    reference = theirs(
        Qwen3NextSparseMoeBlock, Qwen3NextConfig, moe_intermediate_size=INNER, num_experts=5, num_experts_per_tok=2,
        shared_expert_intermediate_size=7, norm_topk_prob=True,
    )  # fmt: skip
    ours = moe(num_shared_experts=1, shared_intermediate_size=7, shared_gate=True)
    shared = {name: their_name.replace("experts", "expert") for name, their_name in SHARED.items()}
    weights = {"router.weight": "gate.weight", "shared_gate.weight": "shared_expert_gate.weight"} | EXPERTS | shared
    assert_parity(ours, run_ffn(ours), reference, reference, weights, random_input(2, 11, HIDDEN))


@pytest.mark.parametrize("latent", [None, 4])
def test_equals_nemotron_h(latent):
    """Experts without a gate, in the stream's width or between two projections."""
    reference = theirs(
        NemotronHMoE, NemotronHConfig, moe_intermediate_size=INNER, n_routed_experts=6, num_experts_per_tok=3,
        moe_shared_expert_intermediate_size=9, routed_scaling_factor=1.5, n_group=2, topk_group=1,
        moe_latent_size=latent,
    )  # fmt: skip
    router = SIGMOID | {"num_groups": 2, "top_k_groups": 1, "scale": 1.5}
    shared = {"num_shared_experts": 1, "shared_intermediate_size": 9}
    ours = moe(6, 3, gated=False, activation="relu2", router=router, latent_size=latent, **shared)
    set_correction(ours, reference)
    weights = {"router.weight": "gate.weight"} | {name: name for name in ("experts.up_proj", "experts.down_proj")}
    weights |= {name: their_name for name, their_name in SHARED.items() if "gate" not in name}
    if latent is not None:
        weights |= {"latent_in_proj.weight": "fc1_latent_proj.weight"}
        weights |= {"latent_out_proj.weight": "fc2_latent_proj.weight"}
    assert_parity(ours, run_ffn(ours), reference, reference, weights, random_input(2, 11, HIDDEN))


@pytest.mark.parametrize("limit", [0.4, 7.0])
def test_equals_gpt_oss(limit):
    """Biases in the router and the experts, clamped SwiGLU. Theirs has gate and up in alternate columns."""
    reference = theirs(
        GptOssMLP, GptOssConfig, intermediate_size=INNER, num_local_experts=5, num_experts_per_tok=3,
        swiglu_limit=limit, swiglu_alpha=1.3,
    )  # fmt: skip
    ours = moe(5, 3, bias=True, swiglu_limit=limit, swiglu_alpha=1.3, router={"bias": True})

    def apart(x):
        return torch.cat([x[:, ::2], x[:, 1::2]], 1)

    weights = {
        "router.weight": "router.weight",
        "router.bias": "router.bias",
        "experts.gate_up_proj": ("experts.gate_up_proj", lambda x: apart(x.mT)),
        "experts.gate_up_proj_bias": ("experts.gate_up_proj_bias", apart),
        "experts.down_proj": ("experts.down_proj", lambda x: x.mT),
        "experts.down_proj_bias": "experts.down_proj_bias",
    }
    assert_parity(ours, run_ffn(ours), reference, lambda x: reference(x)[0], weights, random_input(2, 11, HIDDEN))


OPTIONS = {
    "biases": {"bias": True, "router": {"bias": True}},
    "clamped": {"swiglu_limit": 0.5, "bias": True},
    "ungated": {"gated": False, "activation": "relu2"},
    "latent": {"latent_size": 5, "num_shared_experts": 1},
    "shared gate": {"num_shared_experts": 1, "shared_gate": True},
    "sigmoid": {"router": SIGMOID | {"num_groups": 3, "top_k_groups": 2, "scale": 2.0}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_one_token_at_a_time_is_the_same(options):
    """Decoding goes through the experts one by one."""
    module = perturb(moe(6, 2, **options).double())
    if module.router.correction_bias is not None:
        module.router.correction_bias.copy_(random_input(6) * 0.3)
    x = random_input(2, 5, HIDDEN, dtype=torch.float64)
    steps = [run_ffn(module)(x[:, t : t + 1]) for t in range(5)]
    assert_close(torch.cat(steps, 1), run_ffn(module)(x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bfloat16_with_options(options):
    """Rows that only fill up an expert's share have biases too, and change nothing."""
    low, x = perturb(moe(6, 2, **options)).to(torch.bfloat16), random_input(3, 50, HIDDEN).bfloat16()
    full = moe(6, 2, **options)
    full.load_state_dict(low.state_dict())
    outs = []
    for module, inputs in ((low, x), (full, x.float())):
        y = run_ffn(module)(inputs)
        y.float().square().sum().backward()
        outs.append(y)
    assert_close(outs[0].float(), outs[1], tolerance=2e-2)
    for (name, parameter), other in zip(low.named_parameters(), full.parameters(), strict=True):
        assert_close(parameter.grad.float(), other.grad, name, tolerance=5e-2)


def test_the_correction_bias_is_kept_but_not_trained():
    module = moe(4, 2, router=SIGMOID)
    assert "router.correction_bias" in module.state_dict()
    assert not any("correction" in name for name, _ in module.named_parameters())
    module.router.correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    x = random_input(1, 6, HIDDEN)
    _, statistics = module(x, SequenceContext.of(x))
    assert statistics.assignments.tolist() == [0, 6, 0, 6]
    assert_close(statistics.probabilities.sum(), torch.tensor(6.0))


def test_the_correction_bias_follows_the_loads():
    module = moe(4, 2, router=SIGMOID | {"correction_rate": 0.25})
    module.router.correct(torch.tensor([6.0, 0.0, 3.0, 3.0]))
    assert module.router.correction_bias.tolist() == [-0.25, 0.25, 0, 0]


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, r"top_k: must be at most num_experts \(4\), got 5"),
        ({"shared_gate": True}, r"shared_gate: is of the shared experts, .*; give num_shared_experts"),
        ({"shared_intermediate_size": 8}, r"shared_intermediate_size: is of the shared experts, .*"),
        ({"router": {"correction_rate": 0.1}}, r"router\.correction_rate: .*; give correction_bias"),
        ({"swiglu_alpha": 1.0}, r"swiglu_alpha: belongs to the clamped SwiGLU; give swiglu_limit"),
        ({"swiglu_limit": 1.0, "gated": False}, r"swiglu_limit: needs gated experts with activation silu.*"),
        ({"router": {"num_groups": 3}}, r"router\.num_groups: must divide num_experts \(4\) .*, got 3"),
        ({"router": {"num_groups": 4}}, r"router\.num_groups: .* into groups of at least 2, got 4"),
        ({"router": {"num_groups": 2, "top_k_groups": 3}}, r"router\.top_k_groups: must be at most num_groups .*"),
        (
            {"top_k": 3, "router": {"num_groups": 2, "top_k_groups": 1}},
            r"router\.top_k_groups: must leave top_k \(3\).*",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=rf"blocks\.b\.ffn\.{message}"):
        moe(**({"num_experts": 4} | fields))
