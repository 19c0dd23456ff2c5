"""compressive: the block beside its formula one token at a time, and what a query sees of the past."""

from itertools import pairwise

import pytest
import torch

import zoo
from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext
from zoo.schema import FieldError

HIDDEN = 24
FIELDS = {"kind": "compressive", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 4, "slots": 2}


def build(dtype=torch.float64, **fields):
    mixer = perturb(build_part(model_config(hidden_size=HIDDEN, mixer={**FIELDS, **fields}))).to(dtype)
    if dtype == torch.float64 and mixer.rotary is not None:
        mixer.rotary.inv_freq.data = mixer.rotary.inv_freq.double()
    return mixer


def cached(mixer, x, sizes):
    """A chunk at a time through a state; the state too."""
    state, seen, outs = mixer.new_state(x.shape[0], x.device, x.dtype), 0, []
    for part in x.split(sizes, 1):
        outs.append(mixer(part, SequenceContext.of(part, seen=torch.full((len(x),), seen)), state))
        seen += part.shape[1]
    return torch.cat(outs, 1), state


def slow(mixer, x):
    """One token and head at a time; slots from the equations, by recursion."""
    w, m, shared = mixer.config.window, mixer.config.slots, mixer.num_heads // mixer.num_kv_heads
    q, k, v = (p(x).view(len(x), -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def turned(vector, position):
        if mixer.rotary is None:
            return vector
        one = vector.view(1, 1, 1, -1)
        return mixer.rotary(one, one, torch.tensor([[position]]))[0].flatten()

    def slot(tokens, weight, level, i):
        if level == 0:
            return tokens[i]
        older, newer = (slot(tokens, weight, level - 1, 2 * i + n) for n in (0, 1))
        gate = torch.sigmoid(weight @ torch.cat([older, newer]))
        return gate * older + (1 - gate) * newer

    outs = []
    for t in range(len(x)):
        end, level, slots = w * max(0, t // w - 1), 0, []
        window = range(end, t + 1)
        while end > 0:
            level += 1
            start = max(0, end - 2**level * m) // 2 ** (level + 1) * 2 ** (level + 1)
            slots += [(level, i) for i in range(start // 2**level, end // 2**level)]
            end = start
        for head in range(mixer.num_heads):
            kv, query = head // shared, q[t, head]
            near = [turned(query, t) @ turned(k[j, kv], j) for j in window]
            far = [query @ slot(k[:, kv], mixer.merge_k.gate_proj.weight, *each) for each in slots]
            values = [v[j, kv] for j in window]
            values += [slot(v[:, kv], mixer.merge_v.gate_proj.weight, *each) for each in slots]
            outs.append((torch.stack(near + far) * 6**-0.5).softmax(0) @ torch.stack(values))
    return mixer.o_proj(torch.cat(outs).view(len(x), -1))


@pytest.mark.parametrize(
    "fields", [{}, {"rope": None, "slots": 1}, {"window": 2, "slots": 3}, {"window": 6, "slots": 2, "num_kv_heads": 4}]
)
@torch.no_grad()
def test_the_block_is_its_formula(fields):
    mixer, x = build(**fields), random_input(2, 57, HIDDEN, dtype=torch.float64)
    expected = torch.stack([slow(mixer, row) for row in x])
    assert_close(mixer(x, SequenceContext.of(x)), expected)
    for sizes in ([1] * 57, [23, 1, 1, 20, 12], [8, 40, 9]):
        assert_close(cached(mixer, x, sizes)[0], expected)


@pytest.mark.parametrize(("window", "slots"), [(2, 1), (4, 2), (6, 3), (16, 5), (64, 8)])
def test_every_token_before_the_window_is_in_one_visible_slot(window, slots):
    mixer = build(window=window, slots=slots)
    for position in [*range(700), 2**20 + 12345]:
        end = mixer.recent(position)
        assert end == 0 or window <= position - end < 2 * window
        for i, (first, stop) in enumerate(mixer.visible(position)):
            size = 2 ** (i + 1)
            assert stop * size == end and 0 < stop - first <= slots + 1
            end = first * size
        assert end == 0


def test_what_a_query_sees_and_what_a_state_holds_grow_like_the_logarithm():
    mixer = build(window=64, slots=8)
    count = [sum(stop - first for first, stop in mixer.visible(2**n)) for n in range(10, 31)]
    steps = {later - earlier for earlier, later in pairwise(count)}
    assert steps <= {8, 9}
    assert mixer.state_bytes(1, 2**30) < 3 * mixer.state_bytes(1, 2**12)
    x = random_input(1, 300, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = cached(mixer, x, [200, 100])
    assert state["keys"].shape[1] == 300 - 192 and state["slot_keys"].shape[1] == 8 + 8 + 8 + 5


def test_nothing_is_lost_of_equal_tokens():
    """Slots of equal tokens are equal to them, at any depth; so is what every query gets."""
    mixer = build(rope=None)
    x = random_input(1, 1, HIDDEN, dtype=torch.float64).expand(1, 100, -1)
    out = mixer(x, SequenceContext.of(x))
    assert_close(out, out[:, :1].expand_as(out))


def test_gradients_reach_the_oldest_tokens_and_both_merges():
    mixer, x = build(), random_input(1, 80, HIDDEN, dtype=torch.float64).requires_grad_()
    mixer(x, SequenceContext.of(x))[:, -1].square().sum().backward()
    assert (x.grad.norm(dim=-1) > 0).all()
    assert mixer.merge_k.gate_proj.weight.grad.any() and mixer.merge_v.gate_proj.weight.grad.any()


def test_a_window_that_holds_everything_is_plain_attention():
    mixer = build(window=40)
    fields = {"kind": "attention", **{name: FIELDS[name] for name in ("num_heads", "num_kv_heads", "head_dim")}}
    plain = build_part(model_config(hidden_size=HIDDEN, mixer=fields)).double()
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if "merge" not in name})
    plain.rotary.inv_freq.data = mixer.rotary.inv_freq
    x = random_input(2, 80, HIDDEN, dtype=torch.float64)
    assert_close(mixer(x, SequenceContext.of(x)), plain(x, SequenceContext.of(x)))


def test_mistakes_are_named():
    for fields, message in [
        ({"window": 5}, "blocks.b.mixer.window: must be even, as a slot is made of two tokens, got 5"),
        ({"window": -2}, "blocks.b.mixer.window"),
        ({"slots": 0}, "blocks.b.mixer.slots"),
        ({"num_kv_heads": 3}, "blocks.b.mixer.num_kv_heads: must divide num_heads"),
        ({"rope": {"rotary_dim": 5}}, "blocks.b.mixer.rope.rotary_dim: must be even"),
    ]:
        with pytest.raises((zoo.config.ConfigError, FieldError), match=message):
            build_part(model_config(hidden_size=HIDDEN, mixer={**FIELDS, **fields}))
    x = random_input(1, 5, HIDDEN, dtype=torch.float64)
    mixer = build()
    with pytest.raises(ValueError, match="compressive cannot continue a state with cu_seqlens"):
        context = SequenceContext.of(x, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
        mixer(x, context, mixer.new_state(1, x.device, x.dtype))
