"""Infini-attention: the block against attention within segments, its memory, its state, its gates."""

import pytest
import torch

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo import ConfigError, ops
from zoo.blocks import SequenceContext
from zoo.models.build import build

HIDDEN, LENGTH = 16, 30
GQA = {"kind": "infini", "num_heads": 4, "num_kv_heads": 2, "segment": 7}


def mixer(**fields):
    return perturb(build_part(model_config(hidden_size=HIDDEN, mixer=GQA | fields))).double()


def attention_like(infini, **fields):
    """Softmax attention with the weights of `infini`."""
    config = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2} | fields
    attention = build_part(model_config(hidden_size=HIDDEN, mixer=config)).double()
    weights = {name: x for name, x in infini.state_dict().items() if name != "gate"}
    attention.load_state_dict(weights)
    return attention


def run(module, x, state=None, **context):
    return module(x, SequenceContext.of(x, **context), state)


@pytest.mark.parametrize("rope", [{"theta": 100.0, "rotary_dim": 2}, None])
@pytest.mark.parametrize("segment", [LENGTH, 100])
def test_one_segment_equals_attention(segment, rope):
    infini, x = mixer(segment=segment, rope=rope), random_input(2, LENGTH, HIDDEN, dtype=torch.float64)
    assert_close(run(infini, x), run(attention_like(infini, rope=rope), x))


def test_closed_gates_leave_attention_within_segments():
    infini, x = mixer(), random_input(1, LENGTH, HIDDEN, dtype=torch.float64)
    open_ = run(infini, x)
    infini.gate.data.fill_(-torch.inf)
    bounds = torch.tensor([*range(0, LENGTH, 7), LENGTH], dtype=torch.int32)
    wanted = run(attention_like(infini), x, cu_seqlens=bounds, position_ids=torch.arange(LENGTH)[None])
    assert_close(run(infini, x), wanted)
    assert (open_ - wanted).norm() > 0.1 * wanted.norm()


def test_the_memory_knows_nothing_of_positions():
    """What a head reads from the past depends on what stood there, not on where: with open gates, tokens of a segment
    that change places among themselves change nothing after it."""
    infini, x = mixer(), random_input(1, LENGTH, HIDDEN, dtype=torch.float64)
    shuffled = torch.cat([x[:, :7].flip(1), x[:, 7:]], 1)
    assert_close(run(infini, shuffled)[:, 7:], run(infini, x)[:, 7:])
    assert (run(infini, shuffled) - run(infini, x))[:, :7].norm() > 0.1
    # Nor does another rotation of all of them.
    infini.gate.data.fill_(torch.inf)
    far = torch.arange(LENGTH)[None] * 3 + 50
    assert_close(run(infini, x, position_ids=far)[:, 7:], run(infini, x)[:, 7:])


def test_gradients_flow_through_the_memory_to_the_first_segment():
    infini, x = mixer(), random_input(1, LENGTH, HIDDEN, dtype=torch.float64).requires_grad_()
    run(infini, x)[:, 21:].sum().backward()
    assert x.grad[:, :7].norm(dim=-1).min() > 1e-4
    assert infini.gate.grad.abs().min() > 1e-4


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_update_and_segment_are_those_of_the_op(update):
    infini, x = mixer(update=update, rope=None), random_input(1, LENGTH, HIDDEN, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (infini.q_proj, infini.k_proj, infini.v_proj))
    out = ops.infini_attention(q, k, v, infini.gate, segment=7, update=update)
    assert_close(run(infini, x), infini.o_proj(out.flatten(-2)))
    assert (
        run(infini, x) - run(mixer(update={"linear": "delta", "delta": "linear"}[update], rope=None), x)
    ).norm() > 0.1


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("segment", [1, 2, 7])
@torch.no_grad()
def test_the_state_does_not_grow(segment, update):
    infini, x = mixer(segment=segment, update=update), random_input(2, 64, HIDDEN, dtype=torch.float64)
    state, sizes, outs = infini.new_state(2, x.device, x.dtype), [], []
    for t in range(64):
        outs.append(run(infini, x[:, t : t + 1], state, seen=torch.full((2,), t)))
        sizes.append(state.nbytes())
    assert max(sizes) == max(sizes[:segment]) and sizes[-1] == sizes[63 % segment]
    assert_close(torch.cat(outs, 1), run(infini, x))


@torch.no_grad()
def test_a_long_prompt_is_not_held_on_to():
    infini, x = mixer(), random_input(1, 703, HIDDEN, dtype=torch.float64)
    state = infini.new_state(1, x.device, x.dtype)
    run(infini, x, state)
    assert sum(x.untyped_storage().nbytes() for x in state.tensors.values()) == state.nbytes()
    assert state["1.keys"].shape[1] == 3


@torch.no_grad()
def test_rows_that_complete_segments_at_different_times():
    """A prompt padded on the left, then 40 tokens: what stays of a row is its own unfinished segment."""
    infini, x = mixer(update="delta"), random_input(2, 52, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :3] = False
    state = infini.new_state(2, x.device, x.dtype)
    outs, seen = [run(infini, x[:, :12], state, padding_mask=mask)], mask.sum(1)
    for t in range(12, 52):
        outs.append(run(infini, x[:, t : t + 1], state, seen=seen))
        seen = seen + 1
        assert state["1.mask"].sum(1).tolist() == [(t + 1) % 7, (t - 2) % 7]
    out = torch.cat(outs, 1)
    assert_close(out[:1], run(infini, x[:1]))
    assert_close(out[1:, 3:], run(infini, x[1:, 3:]))


def test_a_state_refuses_packed_documents():
    infini, x = mixer(), random_input(1, 9, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="infini cannot continue a state with cu_seqlens; pad the rows"):
        run(infini, x, infini.new_state(1, x.device, x.dtype), cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))


def test_defaults():
    config = model_config(hidden_size=HIDDEN, mixer={"kind": "infini", "num_heads": 2}).layers[0].mixer.config
    assert (config.num_kv_heads, config.head_dim, config.segment, config.update) == (2, 8, 2048, "linear")
    assert config.rope.rotary_dim == 8


def test_gates_start_half_open_and_stay_float32():
    model = build({"vocab_size": 8, "hidden_size": HIDDEN, "blocks": {"a": {"mixer": GQA}}, "pattern": "a"})
    gate = model.bfloat16().model.layers[0].mixer.gate
    assert gate.dtype == torch.float32 and gate.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads: must divide num_heads \(4\), got 3"),
        ({"num_heads": 3, "num_kv_heads": 3}, r"num_heads: must divide hidden_size \(16\), got 3; or give head_dim"),
        ({"segment": 0}, "segment: .*got 0"),
        ({"update": "sum"}, "update: .*sum"),
        ({"rope": {"rotary_dim": 3}}, "rope.rotary_dim: must be even"),
        ({"segmnt": 8}, "segment"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        model_config(hidden_size=HIDDEN, mixer=GQA | fields)
    assert "\n" not in str(error.value)
