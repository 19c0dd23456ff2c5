"""What all parts share: tensors that stay float32, initialisation on any device, parameter counts."""

import copy

import pytest
import torch

from tests.blocks.helpers import build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext

MIXERS = {
    "attention": {"kind": "attention", "num_heads": 2, "qk_norm": True, "bias": True},
    "infini": {"kind": "infini", "num_heads": 2, "segment": 4, "update": "delta"},
    "landmark": {"kind": "landmark", "num_heads": 2, "block_size": 3},
    "hierarchical": {
        "kind": "hierarchical", "num_heads": 2, "window": 4, "compress_block": 4, "compress_stride": 2,
        "select_block": 4, "top_n": 3,
    },
    "compressive": {"kind": "compressive", "num_heads": 2, "window": 2, "slots": 1},
    "linformer": {"kind": "linformer", "num_heads": 2, "block": 4, "slots": 2},
    "lightning": {"kind": "lightning", "num_heads": 2},
    "mla": {
        "kind": "mla", "num_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "qk_rope_head_dim": 4, "bias": True,
    },
    "mamba": {"kind": "mamba", "inner_norms": True},
    "gated_delta": {"kind": "gated_delta", "num_heads": 2, "num_v_heads": 4},
    "kda": {"kind": "kda", "num_heads": 2},
    "mamba2": {"kind": "mamba2", "head_dim": 8, "state_size": 4, "num_groups": 2},
    "linear": {"kind": "linear", "num_heads": 2},
    "performer": {"kind": "performer", "num_heads": 2},
    "retention": {"kind": "retention", "num_heads": 2},
    "rglru": {"kind": "rglru", "num_heads": 2},
    "short_conv": {"kind": "short_conv"},
    "parallel": {
        "kind": "parallel",
        "branches": [
            {"kind": "lightning", "num_heads": 2},
            {"kind": "mamba2", "head_dim": 8, "multipliers": [2.0] * 5},
        ],
    },
}  # fmt: skip
FFNS = {
    "mlp": {"kind": "mlp", "intermediate_size": 24, "bias": True},
    "moe": {"kind": "moe", "intermediate_size": 24, "num_experts": 4, "num_shared_experts": 1},
    "moe_options": {
        "kind": "moe", "intermediate_size": 24, "num_experts": 4, "num_shared_experts": 1, "shared_gate": True,
        "gated": False, "activation": "relu2", "bias": True,
        "router": {"kind": "sigmoid", "bias": True, "correction_bias": True, "num_groups": 2},
    },
}  # fmt: skip
PARTS = [("mixer", name) for name in MIXERS] + [("ffn", name) for name in FFNS]


def part(role, name):
    fields = (MIXERS | FFNS)[name]
    return build_part(model_config(hidden_size=16, num_layers=2, **{role: fields}), role, layer_idx=1)


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def float32_names(module):
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, child in module.named_modules()
        for name in getattr(child, "float32", ())
        if getattr(child, name) is not None
    }


@pytest.mark.parametrize(("role", "name"), PARTS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.bfloat16().float().bfloat16(),
        lambda module: copy.deepcopy(module).to(dtype=torch.bfloat16),
        lambda module: copy.deepcopy(module.bfloat16()),
        lambda module: module.double(),
        lambda module: torch.nn.Sequential(module).bfloat16()[0],
    ],
    ids=["bfloat16", "half", "twice", "copied", "deepcopy", "double", "nested"],
)
def test_rates_stay_float32_when_the_rest_is_cast(role, name, cast):
    module = perturb(part(role, name))
    before = {key: tensor.detach().clone() for key, tensor in tensors(module).items()}
    rates = float32_names(module)
    assert rates == {
        "attention": {"rotary.inv_freq"},
        "infini": {"gate", "rotary.inv_freq"},
        "landmark": {"rotary.inv_freq"},
        "hierarchical": {"rotary.inv_freq"},
        "compressive": {"rotary.inv_freq"},
        "linformer": {"rotary.inv_freq"},
        "lightning": {"log_decay"},
        "mla": {"rotary.inv_freq"},
        "mamba": {"A_log", "D", "dt_bias"},
        "mamba2": {"A_log", "D", "dt_bias"},
        "gated_delta": {"A_log", "dt_bias"},
        "kda": {"A_log", "dt_bias"},
        "performer": {"directions"},
        "retention": {"rotary.inv_freq", "log_decay"},
        "rglru": {"a_param"},
        "moe_options": {"router.correction_bias"},
        "parallel": {"branches.0.log_decay", "branches.1.multiply.factors"}
        | {f"branches.1.{each}" for each in ("A_log", "D", "dt_bias")},
    }.get(name, set())
    parameters = [id(p) for p in module.parameters()]
    module = cast(module)
    for key, tensor in tensors(module).items():
        if key in rates:
            assert tensor.dtype == torch.float32, key
            assert torch.equal(tensor, before[key]), key  # not so much as rounded on the way
        else:
            assert tensor.dtype != torch.float32, key
    assert len(set(parameters)) == len(list(module.parameters()))


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_a_meta_part_materialises(role, name):
    """to_empty and every module's own reset_parameters leave nothing unwritten, and give the same distribution."""
    with torch.device("meta"):
        module = part(role, name)
    assert all(tensor.is_meta for tensor in tensors(module).values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(module).values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    for child in module.modules():
        owns = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        assert not owns or hasattr(child, "reset_parameters")
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    direct = tensors(part(role, name))
    for key, tensor in tensors(module).items():
        assert tensor.isfinite().all(), key
        assert tensor.dtype == direct[key].dtype and tensor.shape == direct[key].shape
        if len(direct[key].unique()) == 1 or not isinstance(tensor, torch.nn.Parameter):
            assert torch.equal(tensor, direct[key]), key
        else:
            assert tensor.std() > 0, key
            assert tensor.numel() < 64 or torch.allclose(tensor.std(), direct[key].std(), rtol=0.5), key


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_num_params(role, name):
    module = part(role, name)
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert module.num_params() == counted
    idle = {"moe": 2 * 3 * 24 * 16, "moe_options": 2 * (2 * 24 * 16 + 24 + 16)}.get(name, 0)
    assert module.num_active_params() == counted - idle


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_bfloat16_runs_and_is_near_float32(role, name):
    module = perturb(part(role, name))
    low = copy.deepcopy(module).bfloat16()
    for key, tensor in tensors(module).items():
        tensor.data.copy_(tensors(low)[key])
    x = random_input(2, 9, 16).bfloat16()

    def run(module, x):
        y = module(x, SequenceContext.of(x))
        return y if role == "mixer" else y[0]

    y, reference = run(low, x), run(module, x.float())
    assert y.dtype == torch.bfloat16
    assert (y.float() - reference).norm() < 0.03 * reference.norm()


@pytest.mark.parametrize(("role", "name"), PARTS)
def test_autocast_runs_and_is_near_float32(role, name):
    module, x = perturb(part(role, name)), random_input(2, 9, 16)

    def run():
        y = module(x, SequenceContext.of(x))
        return y if role == "mixer" else y[0]

    reference = run()
    with torch.autocast("cpu", torch.bfloat16):
        y = run()
    y.float().square().sum().backward()
    assert (y.float() - reference).norm() < 0.03 * reference.norm()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in module.parameters())
