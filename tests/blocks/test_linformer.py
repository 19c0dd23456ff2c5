"""linformer: the block beside its formula one token at a time."""

import pytest
import torch

import zoo
from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from tests.blocks.test_compressive import cached
from zoo.blocks import SequenceContext
from zoo.schema import FieldError

HIDDEN = 24
FIELDS = {"kind": "linformer", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "block": 5, "slots": 2}


def build(**fields):
    mixer = perturb(build_part(model_config(hidden_size=HIDDEN, mixer={**FIELDS, **fields}))).double()
    if mixer.rotary is not None:
        mixer.rotary.inv_freq.data = mixer.rotary.inv_freq.double()
    return mixer


def slow(mixer, x):
    """One token and head at a time, from the equations."""
    size, shared = mixer.config.block, mixer.num_heads // mixer.num_kv_heads
    q, k, v = (p(x).view(1, len(x), -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    turned_q, turned_k = (q, k) if mixer.rotary is None else mixer.rotary(q, k, torch.arange(len(x))[None])
    outs = []
    for t in range(len(x)):
        begin = t // size * size
        for head in range(mixer.num_heads):
            kv = head // shared
            logits = [turned_k[0, begin : t + 1, kv] @ turned_q[0, t, head]]
            values = [v[0, begin : t + 1, kv]]
            for first in range(0, begin, size):
                logits.append(mixer.project_k @ k[0, first : first + size, kv] @ q[0, t, head])
                values.append(mixer.project_v @ v[0, first : first + size, kv])
            outs.append((torch.cat(logits) * 6**-0.5).softmax(0) @ torch.cat(values))
    return mixer.o_proj(torch.cat(outs).view(len(x), -1))


@pytest.mark.parametrize("fields", [{}, {"rope": None, "slots": 1}, {"block": 1, "slots": 1}, {"block": 50}])
@torch.no_grad()
def test_the_block_is_its_formula(fields):
    mixer, x = build(**fields), random_input(2, 43, HIDDEN, dtype=torch.float64)
    expected = torch.stack([slow(mixer, row) for row in x])
    assert_close(mixer(x, SequenceContext.of(x)), expected)
    for sizes in ([1] * 43, [23, 1, 1, 5, 13], [5, 38]):
        assert_close(cached(mixer, x, sizes)[0], expected)


def test_projecting_nothing_is_plain_attention():
    """With as many slots as tokens, E = F = 1 and no rotation, a slot is a token."""
    mixer = build(rope=None, slots=5)
    with torch.no_grad():
        for projection in (mixer.project_k, mixer.project_v):
            projection.copy_(torch.eye(5))
    fields = {"kind": "attention", **{name: FIELDS[name] for name in ("num_heads", "num_kv_heads", "head_dim")}}
    plain = build_part(model_config(hidden_size=HIDDEN, mixer={**fields, "rope": None})).double()
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if "project" not in name})
    x = random_input(2, 33, HIDDEN, dtype=torch.float64)
    assert_close(mixer(x, SequenceContext.of(x)), plain(x, SequenceContext.of(x)))


def test_a_state_holds_the_slots_and_the_block_that_is_not_complete():
    mixer, x = build(), random_input(3, 23, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = cached(mixer, x, [9, 14])
    assert state["keys"].shape == (3, 3, 2, 12) and state["slot_keys"].shape == (3, 8, 2, 6)


def test_mistakes_are_named():
    for fields, message in [
        ({"slots": 6}, r"blocks.b.mixer.slots: must be at most block \(5\), got 6"),
        ({"block": 0}, "blocks.b.mixer.block"),
        ({"num_kv_heads": 3}, "blocks.b.mixer.num_kv_heads: must divide num_heads"),
    ]:
        with pytest.raises((zoo.config.ConfigError, FieldError), match=message):
            build_part(model_config(hidden_size=HIDDEN, mixer={**FIELDS, **fields}))
