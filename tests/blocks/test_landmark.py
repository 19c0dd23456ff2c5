"""Landmark attention: the block beside its formula, and retrieval beside the rule as it is written."""

import copy

import pytest
import torch

import zoo
from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo import ops
from zoo.blocks import SequenceContext, landmark
from zoo.schema import FieldError

HIDDEN = 24
FIELDS = {"kind": "landmark", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "block_size": 4}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def build(dtype=torch.float64, hidden_size=HIDDEN, **fields):
    mixer = perturb(build_part(model_config(hidden_size=hidden_size, mixer={**FIELDS, **fields}))).to(dtype)
    if dtype == torch.float64 and mixer.rotary is not None:
        mixer.rotary.inv_freq.data = mixer.rotary.inv_freq.double()
    return mixer


def cached(mixer, x, sizes, mask=None):
    """A chunk at a time through a state."""
    state, seen, outs = mixer.new_state(x.shape[0], x.device, x.dtype), None, []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    for part, m in zip(x.split(sizes, 1), masks, strict=True):
        context = SequenceContext.of(part, padding_mask=m, seen=seen)
        real = torch.ones(part.shape[:2], dtype=torch.bool) if m is None else m
        seen = real.sum(1) + (0 if seen is None else seen)
        outs.append(mixer(part, context, state))
    return torch.cat(outs, 1)


def test_defaults_are_the_paper_s_and_mistakes_are_named():
    config = build_part(model_config(hidden_size=HIDDEN, mixer={"kind": "landmark", "num_heads": 4})).config
    assert (config.block_size, config.top_k, config.num_kv_heads, config.head_dim) == (50, None, 4, 6)
    for fields, message in [
        ({"num_kv_heads": 3}, "blocks.b.mixer.num_kv_heads: must divide num_heads"),
        ({"num_heads": 5, "num_kv_heads": None, "head_dim": None}, "blocks.b.mixer.num_heads: must divide hidden_size"),
        ({"block_size": 0}, "blocks.b.mixer.block_size"),
        ({"top_k": 0}, "blocks.b.mixer.top_k"),
        ({"train_top_k": 0}, "blocks.b.mixer.train_top_k"),
        ({"rope": {"rotary_dim": 5}}, "blocks.b.mixer.rope.rotary_dim: must be even"),
        ({"top_k": 2, "rope": {"type": "longrope"}}, "blocks.b.mixer.rope.type: longrope has no length"),
    ]:
        with pytest.raises((zoo.config.ConfigError, FieldError), match=message):
            build_part(model_config(hidden_size=HIDDEN, mixer={**FIELDS, **fields}))


@pytest.mark.parametrize("rope", [{}, None, YARN])
@pytest.mark.parametrize("length", [1, 5, 33])
def test_the_block_is_its_formula(length, rope):
    mixer, x = build(rope=rope), random_input(2, length, HIDDEN, dtype=torch.float64)
    q, k, v = (p(x).view(2, length, -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    positions = torch.arange(length).expand(2, -1)
    if rope is not None:
        q, k = mixer.rotary(q, k, positions)
    with ops.backend("reference"):
        out = ops.landmark_attention(q, k, v, positions % 5 == 4)
    assert_close(mixer(x, SequenceContext.of(x)), mixer.o_proj(out.flatten(-2)))


def test_a_block_that_holds_everything_is_plain_attention():
    mixer = build(block_size=40)
    fields = {"kind": "attention", **{name: FIELDS[name] for name in ("num_heads", "num_kv_heads", "head_dim")}}
    plain = build_part(model_config(hidden_size=HIDDEN, mixer=fields)).double()
    plain.load_state_dict(mixer.state_dict())
    plain.rotary.inv_freq.data = mixer.rotary.inv_freq
    x = random_input(2, 40, HIDDEN, dtype=torch.float64)
    assert_close(mixer(x, SequenceContext.of(x)), plain(x, SequenceContext.of(x)))


def slow(mixer, x):
    """One token and head at a time, with keys as they are projected, turned anew wherever they are read."""
    top_k, size, period = mixer.config.top_k, mixer.config.block_size, mixer.config.block_size + 1
    length, heads, shared = x.shape[0], mixer.num_heads, mixer.num_heads // mixer.num_kv_heads
    q, k, v = (p(x).view(length, -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def turned(vector, position):
        if mixer.rotary is None:
            return vector
        one = vector.view(1, 1, 1, -1)
        return mixer.rotary(one, one, torch.tensor([[position]]))[0].flatten()

    outs = []
    for t in range(length):
        block, place = divmod(t, period)
        for head in range(heads):
            # Slot 0 is for all blocks older than the last top_k, slots 1 to top_k for those, the next for its own.
            query = turned(q[t, head], (top_k + 1) * period + place)

            def logit(token, slot, query=query, kv=head // shared):
                return query @ turned(k[token, kv], slot * period + token % period) * 6**-0.5

            slots = [max(0, top_k + 1 - (block - b)) for b in range(block)]
            scores = [logit(b * period + size, slots[b]) for b in range(block)]
            chosen = sorted(range(block), key=lambda b: -scores[b].item())[:top_k]
            own = [block * period + i for i in range(min(place + 1, size))]
            p = torch.stack([scores[b] for b in chosen] + [logit(j, top_k + 1) for j in own]).softmax(0)
            out = p[len(chosen) :] @ v[own, head // shared]
            for share, b in zip(p, chosen, strict=False):
                inside = [b * period + i for i in range(size)]
                weights = torch.stack([logit(j, slots[b]) for j in inside]).softmax(0)
                out = out + share * (weights @ v[inside, head // shared])
            outs.append(out)
    return mixer.o_proj(torch.cat(outs).view(length, -1))


@pytest.mark.parametrize("rope", [{"theta": 100.0, "rotary_dim": 4}, None, YARN], ids=["rope", "none", "yarn"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
@torch.no_grad()
def test_retrieval_is_the_rule_as_it_is_written(top_k, size, rope):
    length = 31 if size == 1 else 43  # many more blocks than are read
    mixer, x = build(top_k=top_k, block_size=size, rope=rope), random_input(2, length, HIDDEN, dtype=torch.float64)
    expected = torch.stack([slow(mixer, row) for row in x])
    for sizes in ([length], [1] * length, [7, 1, 1, length - 12, 2, 1]):
        assert_close(cached(mixer, x, sizes), expected)
    full = mixer(x, SequenceContext.of(x))
    assert (full - expected).norm() > 1e-2 * full.norm()  # it does read less


@pytest.mark.parametrize("rope", [{}, None])
@torch.no_grad()
def test_training_that_reads_the_best_blocks(rope):
    """At the positions of the text; a state without top_k reads the same."""
    mixer, x = build(rope=rope, train_top_k=2), random_input(2, 43, HIDDEN, dtype=torch.float64)
    q, k, v = (p(x).view(2, 43, -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    positions = torch.arange(43).expand(2, -1)
    if rope is not None:
        q, k = mixer.rotary(q, k, positions)
    with ops.backend("reference"):
        out = mixer.o_proj(ops.landmark_attention(q, k, v, positions % 5 == 4, top_k=2).flatten(-2))
    full = build(rope=rope)(x, SequenceContext.of(x))
    assert (full - out).norm() > 1e-2 * full.norm()
    assert_close(mixer(x, SequenceContext.of(x)), out)
    assert_close(cached(mixer, x, [30] + [1] * 13), out)
    # Without positions there is no other rule for them, and retrieval is the same computation.
    retrieved = cached(build(rope=rope, train_top_k=2, top_k=2), x, [30] + [1] * 13)
    assert (rope is None) == ((retrieved - out).norm() < 1e-9 * out.norm())


@torch.no_grad()
def test_retrieval_in_small_tiles(monkeypatch):
    mixer, x = build(top_k=2), random_input(2, 40, HIDDEN, dtype=torch.float64)
    whole = cached(mixer, x, [40])
    monkeypatch.setattr(landmark, "MAX_RETRIEVED", 1)
    assert_close(cached(mixer, x, [40]), whole)


@torch.no_grad()
def test_retrieval_of_padded_rows_is_each_row_alone():
    mixer, x = build(top_k=2), random_input(3, 37, HIDDEN, dtype=torch.float64)
    mask = torch.ones(3, 37, dtype=torch.bool)
    mask[1, :9], mask[2, 12:30] = False, False
    x[~mask] *= 1e4
    out = cached(mixer, x, [20, 11, 1, 1, 4], mask)
    for row in range(3):
        assert_close(out[row, mask[row]], cached(mixer, x[row, mask[row]][None], [int(mask[row].sum())])[0])


@torch.no_grad()
def test_reading_all_blocks_is_a_full_forward():
    x = random_input(2, 43, HIDDEN, dtype=torch.float64)
    for top_k in (8, 9, 50):
        mixer = build(top_k=top_k)
        assert_close(cached(mixer, x, [30] + [1] * 13), mixer(x, SequenceContext.of(x)))


def test_gradients_through_retrieval():
    """Reading all blocks, they are those of a full forward."""
    mixer, gradients = build(top_k=9), []
    for run in (lambda x: cached(mixer, x, [20, 1, 22]), lambda x: mixer(x, SequenceContext.of(x))):
        x = random_input(2, 43, HIDDEN, dtype=torch.float64).requires_grad_()
        out = run(x)
        loss = (out * random_input(*out.shape, dtype=out.dtype, seed=2)).sum()
        gradients.append(torch.autograd.grad(loss, [x, *mixer.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, tolerance=1e-9)


@torch.no_grad()
def test_positions_stay_small_however_long_the_text():
    """No rotation beyond top_k + 2 blocks, and none of a key beyond its own block."""
    mixer, x, seen = build(top_k=2), random_input(1, 200, HIDDEN, dtype=torch.float64), []
    turn = mixer.rotary.forward
    mixer.rotary.forward = lambda q, k, positions: seen.append(int(positions.max())) or turn(q, k, positions)
    cached(mixer, x, [150] + [1] * 50)
    assert max(seen) == 3 * 5 + 4


@torch.no_grad()
def test_a_block_that_is_not_read_changes_nothing():
    """Not even NaN in its keys."""
    mixer, x = build(top_k=1, num_heads=1, num_kv_heads=1), random_input(1, 41, HIDDEN, dtype=torch.float64)
    state = mixer.new_state(1, x.device, x.dtype)
    mixer(x[:, :40], SequenceContext.of(x[:, :40]), state)
    other, last = copy.deepcopy(state), x[:, 40:]
    context = SequenceContext.of(last, seen=torch.tensor([40]))
    expected = mixer(last, context, state)
    is_read = []
    for block in range(8):
        poisoned = copy.deepcopy(other)
        poisoned["keys"][:, block * 5 : block * 5 + 4] = torch.nan
        is_read.append(not torch.equal(mixer(last, context, poisoned), expected))
    assert sum(is_read) == 1


def test_bfloat16_retrieval_is_near_float32():
    """Its choice may differ in near ties, so all blocks are read."""
    low = build(torch.bfloat16, top_k=40)
    high = copy.deepcopy(low).float()
    x = random_input(1, 150, HIDDEN).bfloat16()
    with torch.no_grad():
        out, reference = cached(low, x, [100] + [1] * 50), cached(high, x.float(), [100] + [1] * 50)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), reference, tolerance=0.02)


def test_packed_documents_do_not_continue_a_state():
    mixer, x = build(), random_input(1, 8, HIDDEN, dtype=torch.float64)
    context = SequenceContext.of(x, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    for top_k in (None, 2):
        mixer = build(top_k=top_k)
        with pytest.raises(ValueError, match="landmark cannot continue a state with cu_seqlens"):
            mixer(x, context, mixer.new_state(1, x.device, x.dtype))
