"""The dense feed-forward against LlamaMLP and the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.blocks.helpers import assert_close, assert_parity, build_part, model_config, perturb, random_input, run_ffn
from zoo import ConfigError

WEIGHTS = {f"{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")}
ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def mlp(**fields):
    return build_part(model_config(hidden_size=12, ffn={"kind": "mlp", "intermediate_size": 20, **fields}), "ffn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_llama(bias, dtype):
    theirs = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, mlp_bias=bias, num_attention_heads=1)).to(dtype)
    ours = mlp(bias=bias).to(dtype)
    biases = {name.replace("weight", "bias"): their.replace("weight", "bias") for name, their in WEIGHTS.items()}
    weights = WEIGHTS | biases if bias else WEIGHTS
    assert_parity(ours, run_ffn(ours), theirs, theirs, weights, random_input(2, 7, 12, dtype=dtype))


def test_the_gate_is_multiplied_before_its_activation():
    module = perturb(mlp(gate_scale=0.3, bias=True).double())
    x = random_input(2, 7, 12, dtype=torch.float64)
    gate = 0.3 * (x @ module.gate_proj.weight.T + module.gate_proj.bias)
    up = x @ module.up_proj.weight.T + module.up_proj.bias
    expected = (gate * torch.sigmoid(gate) * up) @ module.down_proj.weight.T + module.down_proj.bias
    assert_close(run_ffn(module)(x), expected)
    with pytest.raises(ConfigError, match=r"ffn\.gate_scale: is of the gate, and there is none; .*, got 0.3"):
        mlp(gate_scale=0.3, gated=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula(activation, gated, bias):
    module = perturb(mlp(activation=activation, gated=gated, bias=bias).double())
    x, act = random_input(2, 7, 12, dtype=torch.float64), ACTIVATIONS[activation]
    up = F.linear(x, module.up_proj.weight, module.up_proj.bias)
    if gated:
        inner = act(F.linear(x, module.gate_proj.weight, module.gate_proj.bias)) * up
    else:
        inner = act(up)
    assert_close(run_ffn(module)(x), F.linear(inner, module.down_proj.weight, module.down_proj.bias))
    assert (module.up_proj.bias is not None) == bias
    assert sum(p.numel() for p in module.parameters()) == (3 if gated else 2) * 240 + bias * (
        (2 if gated else 1) * 20 + 12
    )
