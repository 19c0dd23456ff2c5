"""Multi-head latent attention against DeepSeek-V3's and Kimi Linear's in transformers."""

import pytest
import torch
from transformers import BailingHybridConfig, DeepseekV3Config, KimiLinearConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridAttention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from tests.blocks.helpers import (
    assert_close,
    assert_parity,
    build_part,
    model_config,
    perturb,
    random_input,
    run_mixer,
)
from zoo import ConfigError
from zoo.blocks import SequenceContext

HIDDEN, LENGTH = 20, 19
SIZES = {"kv_lora_rank": 9, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"factor": 6.0, "original_max_position_embeddings": 16, "mscale": 0.8, "mscale_all_dim": 1.3}
Q = {"q_proj.weight": "q_proj.weight"}
Q_LORA = {f"q_{part}.weight": f"q_{part}.weight" for part in ("a_proj", "b_proj")} | {
    "q_a_norm.weight": "q_a_layernorm.weight"
}
KV = {
    "kv_a_proj.weight": "kv_a_proj_with_mqa.weight",
    "kv_a_norm.weight": "kv_a_layernorm.weight",
    "kv_b_proj.weight": "kv_b_proj.weight",
    "o_proj.weight": "o_proj.weight",
}
BIASES = {"kv_a_proj.bias": "kv_a_proj_with_mqa.bias", "o_proj.bias": "o_proj.bias"}


def mla(heads=3, dtype=torch.float32, **fields):
    return build_part(model_config(hidden_size=HIDDEN, mixer={"kind": "mla", "num_heads": heads} | fields)).to(dtype)


def theirs(module_class, config_class, heads, **fields):
    # The width that rotary frequencies are made for is a field of its own there.
    config = config_class(
        hidden_size=HIDDEN, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1,
        **{"n_group": 1, "topk_group": 1} if config_class is DeepseekV3Config else {}, **SIZES | fields,
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # eager computes its softmax in float32, whatever the dtype
    module = module_class(config, 0)

    def run(x):
        positions = torch.arange(x.shape[1])[None]
        given = {"attention_mask": create_causal_mask(config, x, None, None, positions)}
        if config_class is not KimiLinearConfig:
            given["position_embeddings"] = DeepseekV3RotaryEmbedding(config)(x, positions)
        return module(x, **given)[0]

    return module, run


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rope", [{"type": "default"}, {"type": "yarn"} | YARN], ids=["default", "yarn"])
@pytest.mark.parametrize(("heads", "q_lora_rank", "bias"), [(3, 7, False), (2, None, True), (1, 8, True)])
def test_equals_deepseek(heads, q_lora_rank, bias, rope, interleaved):
    parameters = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
    module, run = theirs(
        DeepseekV3Attention, DeepseekV3Config, heads, q_lora_rank=q_lora_rank, attention_bias=bias,
        rope_interleave=interleaved, rope_parameters=parameters | {"rope_theta": 50.0},
    )  # fmt: skip
    ours = mla(
        heads,
        q_lora_rank=q_lora_rank,
        bias=bias,
        rope=rope | {"theta": 50.0, "interleaved": interleaved},
        **SIZES,
    )
    weights = KV | (Q if q_lora_rank is None else Q_LORA) | (BIASES if bias else {})
    if bias and q_lora_rank is not None:
        weights |= {"q_a_proj.bias": "q_a_proj.bias"}
    assert_parity(ours, run_mixer(ours), module, run, weights, random_input(2, LENGTH, HIDDEN))


def test_without_rotation_equals_kimi_linear():
    module, run = theirs(KimiLinearAttention, KimiLinearConfig, 3, q_lora_rank=None)
    ours = mla(3, rope=None, **SIZES)
    assert_parity(ours, run_mixer(ours), module, run, KV | Q, random_input(2, LENGTH, HIDDEN))


def test_with_a_gate_for_each_head_equals_ling():
    rope = {"rope_type": "default", "rope_theta": 50.0}
    module, run = theirs(BailingHybridAttention, BailingHybridConfig, 3, rope_parameters=rope)
    ours = mla(3, output_gate=True, rope={"theta": 50.0, "interleaved": True}, **SIZES)
    weights = KV | Q | {"gate_proj.weight": "g_proj.weight"}
    assert_parity(ours, run_mixer(ours), module, run, weights, random_input(2, LENGTH, HIDDEN))


def steps(module, x, sizes, mask=None):
    state, outs = module.new_state(x.shape[0], x.device, x.dtype), []
    start = 0
    for size in sizes:
        now = slice(start, start + size)
        seen = torch.full((x.shape[0],), start) if mask is None else mask[:, :start].sum(1)
        context = SequenceContext.of(x[:, now], seen=seen, padding_mask=None if mask is None else mask[:, now])
        outs.append(module(x[:, now], context, state))
        start += size
    return torch.cat(outs, 1), state


@pytest.mark.parametrize("rope", [{"interleaved": True}, None], ids=["rope", "no rope"])
@pytest.mark.parametrize("sizes", [[19], [1] * 19, [5, 1, 9, 1, 3]])
def test_chunks_equal_the_whole_and_gradients_too(sizes, rope):
    """Whichever of the two ways each chunk takes."""
    module = perturb(mla(3, torch.float64, rope=rope, q_lora_rank=7, **SIZES))
    x = random_input(2, LENGTH, HIDDEN, dtype=torch.float64).requires_grad_()
    probe = random_input(2, LENGTH, HIDDEN, dtype=torch.float64, seed=2)
    results = []
    for y in (run_mixer(module)(x), steps(module, x, sizes)[0]):
        results.append((y, *torch.autograd.grad((y * probe).sum(), [x, *module.parameters()])))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


@torch.no_grad()
def test_a_decoding_step_expands_nothing(monkeypatch):
    """A token costs its latent and its key; no step makes keys and values of the past, however long."""
    module = perturb(mla(3, q_lora_rank=7, **SIZES))
    x = random_input(2, LENGTH, HIDDEN)
    whole = run_mixer(module)(x)
    _, state = steps(module, x[:, :-1], [18])
    assert state.nbytes() == 2 * 18 * (4 * (9 + 4) + 1) == module.state_bytes(2, 18)
    monkeypatch.setattr(module, "_expanded", None)
    y = module(x[:, -1:], SequenceContext.of(x[:, -1:], seen=torch.tensor([18, 18])), state)
    assert_close(y, whole[:, -1:])


def test_long_chunks_expand(monkeypatch):
    module = mla(3, **SIZES | {"kv_lora_rank": 20, "qk_nope_head_dim": 2, "v_head_dim": 2})
    monkeypatch.setattr(module, "_absorbed", None)
    x = random_input(1, 9, HIDDEN)
    steps(module, x, [4, 5])
    with pytest.raises(TypeError, match="NoneType"):
        steps(module, x, [8, 1])


def test_yarn_in_the_softmax():
    """m^2, m = 0.1 mscale_all_dim ln(factor) + 1; cos and sin have the quotient of the two."""
    rope = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    plain = mla(rope=rope, **SIZES)
    scaled = mla(rope=rope | {"mscale": 1.0, "mscale_all_dim": 1.0}, **SIZES)
    assert scaled.config.scale == pytest.approx(10**-0.5 * 1.3689**2, rel=1e-4)
    assert scaled.rotary.attention_factor == 1.0
    assert plain.config.scale == 10**-0.5 and plain.rotary.attention_factor == pytest.approx(1.3689, rel=1e-4)


def test_mistakes_are_named():
    with pytest.raises(
        ConfigError, match=r"blocks\.b\.mixer\.rope\.rotary_dim: must be even and at most head_dim \(4\)"
    ):
        mla(**SIZES, rope={"rotary_dim": 6})
    with pytest.raises(ValueError, match="mla cannot continue a state with cu_seqlens"):
        module, x = mla(**SIZES), random_input(1, 4, HIDDEN)
        context = SequenceContext.of(x, cu_seqlens=torch.tensor([0, 1, 4], dtype=torch.int32))
        module(x, context, module.new_state(1, x.device, x.dtype))


def test_an_adapter_around_the_expansion_counts_in_decoding_too():
    """As LoRA wraps it: the base weight alone would be another model."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.low = base, base.weight, torch.nn.Linear(9, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.low(x)

    mixer = perturb(build_part(model_config(hidden_size=HIDDEN, mixer={"kind": "mla", "num_heads": 3, **SIZES})))
    mixer.kv_b_proj = Adapted(mixer.kv_b_proj)
    x = random_input(2, LENGTH, HIDDEN)
    state = mixer.new_state(2, x.device, x.dtype)
    pieces, seen = [], torch.zeros(2, dtype=torch.long)
    for piece in x.split([7, *[1] * (LENGTH - 7)], 1):
        pieces.append(mixer(piece, SequenceContext.of(piece, seen=seen), state))
        seen = seen + piece.shape[1]
    assert_close(torch.cat(pieces, 1), run_mixer(mixer)(x))
