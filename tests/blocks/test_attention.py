"""Softmax attention against the attention modules of transformers."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.jamba.modeling_jamba import JambaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding
from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from tests.blocks.helpers import (
    TOLERANCE,
    assert_close,
    assert_parity,
    build_part,
    model_config,
    perturb,
    random_input,
    run_mixer,
)
from zoo.blocks import SequenceContext

PROJECTIONS = {f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"}
BIASES = {f"{name}_proj.bias": f"{name}_proj.bias" for name in "qkvo"}
LENGTH = 19


def attention(hidden_size, dtype=torch.float32, norm=None, **fields):
    mixer = {"kind": "attention", **fields}
    return build_part(model_config(hidden_size=hidden_size, mixer=mixer, norm=norm)).to(dtype)


def run_theirs(module, config, rotary_class=None, mask_function=create_causal_mask):
    """Call a transformers attention module as its decoder layer does."""
    config._attn_implementation = "sdpa"  # eager computes its softmax in float32, whatever the dtype

    def run(x):
        position_ids = torch.arange(x.shape[1])[None]
        kwargs = {} if rotary_class is None else {"position_embeddings": rotary_class(config)(x, position_ids)}
        mask = mask_function(config, x, None, None, position_ids)
        return module(x, attention_mask=mask, **kwargs)[0]

    return run


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "hidden"), [(4, 4, 8, 32), (6, 2, 10, 36), (4, 1, 4, 12)])
def test_equals_llama(heads, kv_heads, head_dim, hidden, dtype):
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    )
    theirs = LlamaAttention(config, 0).to(dtype)
    ours = attention(
        hidden,
        dtype,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope={"type": "default", "theta": 123.0},
    )
    x = random_input(2, LENGTH, hidden, dtype=dtype)
    assert_parity(ours, run_mixer(ours), theirs, run_theirs(theirs, config, LlamaRotaryEmbedding), PROJECTIONS, x)


def test_biases_equal_llama():
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    theirs = LlamaAttention(config, 0)
    ours = attention(24, num_heads=4, num_kv_heads=2, bias=True)
    run = run_theirs(theirs, config, LlamaRotaryEmbedding)
    # A key bias in front of a rotation does matter, so every gradient is there to compare.
    assert_parity(ours, run_mixer(ours), theirs, run, PROJECTIONS | BIASES, random_input(2, LENGTH, 24))


def test_qk_norm_equals_qwen3():
    config = Qwen3Config(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-2, num_hidden_layers=1
    )
    theirs = Qwen3Attention(config, 0)
    rope = {"theta": config.rope_parameters["rope_theta"]}
    ours = attention(
        20, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, rope=rope, norm={"kind": "layer", "eps": 1e-2}
    )
    weights = PROJECTIONS | {"q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
    x = random_input(2, LENGTH, 20)
    assert_parity(ours, run_mixer(ours), theirs, run_theirs(theirs, config, Qwen3RotaryEmbedding), weights, x)


def test_qk_norm_of_the_projection_equals_olmo2():
    config = Olmo2Config(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2)
    theirs = Olmo2Attention(config, 0)
    ours = attention(24, num_heads=4, num_kv_heads=2, qk_norm="projection", norm={"eps": 1e-2})
    weights = PROJECTIONS | {"q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
    run = run_theirs(theirs, config, Olmo2RotaryEmbedding)
    assert_parity(ours, run_mixer(ours), theirs, run, weights, random_input(2, LENGTH, 24))


def test_qk_norm_is_zero_centered_as_the_models_norm():
    """As in Gemma 3."""
    config = Gemma3TextConfig(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-2,
        query_pre_attn_scalar=7, num_hidden_layers=1, layer_types=["full_attention"],
    )  # fmt: skip
    theirs = perturb(Gemma3Attention(config, 0))
    ours = attention(20, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, scale=7**-0.5, rope={"theta": 1e6},
                     norm={"eps": 1e-2, "zero_centered": True})  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    x, positions = random_input(2, LENGTH, 20), torch.arange(LENGTH)[None]
    config._attn_implementation = "eager"
    rotation = Gemma3RotaryEmbedding(config)(x, positions, "full_attention")
    expected = theirs(x, rotation, create_causal_mask(config, x, None, None, positions))[0]
    assert_close(run_mixer(ours)(x), expected)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 4])
def test_scale_and_softcap_equal_gemma2(window, softcap):
    """Their softmax is float32 whatever the dtype."""
    config = Gemma2Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=3,
        attn_logit_softcapping=softcap, sliding_window=window, layer_types=["sliding_attention"],
        num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = perturb(Gemma2Attention(config, 0))
    ours = attention(24, num_heads=4, num_kv_heads=2, head_dim=10, scale=3**-0.5, softcap=softcap, window=window)

    def run(x):
        positions = torch.arange(x.shape[1])[None]
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        rotation = Gemma2RotaryEmbedding(config)(x, positions)
        return theirs(x, rotation, make(config, x, None, None, positions))[0]

    assert_parity(ours, run_mixer(ours), theirs, run, PROJECTIONS, random_input(2, LENGTH, 24))


def test_biases_of_queries_keys_and_values_alone_equal_qwen2():
    config = Qwen2Config(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    theirs = Qwen2Attention(config, 0)
    ours = attention(24, num_heads=4, num_kv_heads=2, bias=True, output_bias=False)
    weights = PROJECTIONS | {our: their for our, their in BIASES.items() if "o_proj" not in our}
    run = run_theirs(theirs, config, Qwen2RotaryEmbedding)
    assert_parity(ours, run_mixer(ours), theirs, run, weights, random_input(2, LENGTH, 24))


@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_partial_rotation_equals_phi(factor):
    rope = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": factor}
    config = PhiConfig(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, rope_parameters=rope)
    theirs = PhiAttention(config, 0)
    ours = attention(48, num_heads=3, num_kv_heads=1, bias=True, rope={"theta": 50.0, "rotary_dim": int(16 * factor)})
    weights = {our: their.replace("o_proj", "dense") for our, their in (PROJECTIONS | BIASES).items()}
    run = run_theirs(theirs, config, PhiRotaryEmbedding)
    assert_parity(ours, run_mixer(ours), theirs, run, weights, random_input(2, LENGTH, 48))


def test_no_rope_equals_jamba():
    config = JambaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    theirs = JambaAttention(config, 0)
    ours = attention(24, num_heads=4, num_kv_heads=2, rope=None)
    assert_parity(ours, run_mixer(ours), theirs, run_theirs(theirs, config), PROJECTIONS, random_input(2, LENGTH, 24))


@pytest.mark.parametrize("window", [1, 2, 7, LENGTH, 100])
def test_window_equals_mistral(window):
    config = MistralConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    theirs = perturb(MistralAttention(config, 0))
    ours = attention(24, num_heads=4, num_kv_heads=2, window=window)
    ours.load_state_dict(theirs.state_dict())
    x = random_input(2, LENGTH, 24)
    run = run_theirs(theirs, config, MistralRotaryEmbedding, create_sliding_window_causal_mask)
    assert_close(run_mixer(ours)(x), run(x))


@pytest.mark.parametrize(("window", "bias"), [(None, True), (4, False)])
def test_sink_logits_equal_gpt_oss(window, bias):
    config = GptOssConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10, attention_bias=bias,
        sliding_window=window, layer_types=["sliding_attention" if window else "full_attention"], num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    module = GptOssAttention(config, 0)
    rope = {name.removeprefix("rope_"): value for name, value in config.rope_parameters.items()}
    ours = attention(
        24, num_heads=4, num_kv_heads=2, head_dim=10, window=window, bias=bias, sink_logits=True, rope=rope
    )

    def run(x):
        positions = torch.arange(x.shape[1])[None]
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        return module(x, GptOssRotaryEmbedding(config)(x, positions), make(config, x, None, None, positions))[0]

    weights = PROJECTIONS | (BIASES if bias else {}) | {"sinks.weight": "sinks"}
    assert_parity(ours, run_mixer(ours), module, run, weights, random_input(2, LENGTH, 24))


@pytest.mark.parametrize("num_sinks", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_window_sinks_and_output_gate_equal_the_formula(num_sinks, bias):
    heads, kv_heads, head_dim, window = 4, 2, 5, 4
    module = perturb(
        attention(
            12,
            torch.float64,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=None,
            window=window,
            num_sinks=num_sinks,
            bias=bias,
            output_gate=True,
        )
    )
    x = random_input(2, LENGTH, 12, dtype=torch.float64).requires_grad_()

    def project(name, heads):
        linear = getattr(module, name)
        return torch.nn.functional.linear(x, linear.weight, linear.bias).unflatten(-1, (heads, -1))

    q, k, v = project("q_proj", heads), project("k_proj", kv_heads), project("v_proj", kv_heads)
    rows = []
    for t in range(LENGTH):
        visible = [j for j in range(t + 1) if j > t - window or j < num_sinks]
        per_head = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = (k[:, visible, group] * q[:, t, h, None]).sum(-1) / head_dim**0.5
            per_head.append((scores.softmax(-1)[..., None] * v[:, visible, group]).sum(1))
        rows.append(torch.cat(per_head, -1))
    gated = torch.stack(rows, 1) * torch.sigmoid(project("gate_proj", heads).flatten(-2))
    reference = torch.nn.functional.linear(gated, module.o_proj.weight, module.o_proj.bias)
    y = run_mixer(module)(x)
    assert_close(y, reference)
    weight = random_input(*y.shape, dtype=torch.float64, seed=2)
    tensors = {"x": x, **{n: p for n, p in module.named_parameters() if n != "k_proj.bias"}}
    for name, tensor in tensors.items():
        ours = torch.autograd.grad((y * weight).sum(), tensor, retain_graph=True)[0]
        theirs = torch.autograd.grad((reference * weight).sum(), tensor, retain_graph=True)[0]
        assert_close(ours, theirs, f"gradient of {name}")


def test_positions_are_those_of_the_context():
    module = perturb(attention(16, num_heads=2))
    x = random_input(1, 9, 16)
    positions = torch.tensor([[5, 6, 7, 8, 0, 1, 2, 30, 31]])
    shifted = module(x, SequenceContext.of(x, position_ids=positions + 1000))
    assert_close(shifted, module(x, SequenceContext.of(x, position_ids=positions)), tolerance=1e-4)  # only distances
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(shifted, module(x, SequenceContext.of(x)), tolerance=1e-2)


@pytest.mark.parametrize("window", [None, 5])
def test_state_bytes_are_those_of_the_state(window):
    module = attention(16, num_heads=4, num_kv_heads=2, window=window, num_sinks=2 if window else 0)
    state = module.new_state(3, torch.device("cpu"), torch.float32)
    for length in (1, 2, 3, 4, 5, 6, 7, 8, 20):
        state.reset()
        for chunk in random_input(3, length, 16).split(4, dim=1):
            module(chunk, SequenceContext.of(chunk), state)
        assert state.nbytes() == module.state_bytes(3, length)


def test_a_state_refuses_packed_documents():
    module = attention(16, num_heads=2)
    x = random_input(1, 6, 16)
    state = module.new_state(1, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="pad the rows"):
        module(x, SequenceContext.of(x, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32)), state)
