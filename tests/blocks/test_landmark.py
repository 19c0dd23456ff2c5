"""Landmark attention: the block beside its formula, and retrieval beside the rule as it is written."""

import copy
import errno
import gc
import os
from pathlib import Path

import pytest
import torch

import zoo
from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo import ops
from zoo.blocks import SequenceContext, landmark
from zoo.blocks.storage import Storage, StorageError
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
            chosen = sorted(range(block), key=lambda b: (-round(64 * scores[b].item()), -b))[:top_k]
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


PLACES = pytest.mark.parametrize("place", ["cpu", "files"])


def in_place(mixer, place, tmp_path, rows=2):
    state = mixer.new_state(rows, torch.device("cpu"), torch.float64)
    assert state.keep_in("cpu" if place == "cpu" else tmp_path)
    return state


def steps(mixer, x, state, sizes, mask=None):
    seen, outs = state["mask"].sum(1), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    for part, m in zip(x.split(sizes, 1), masks, strict=True):
        outs.append(mixer(part, SequenceContext.of(part, padding_mask=m, seen=seen), state))
        seen = state["mask"].sum(1)
    return torch.cat(outs, 1)


def mapped_files():
    """Bytes of each of our files that is mapped, by its place in memory."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "zoo-cache-" in line:
            start, stop = (int(number, 16) for number in line.split()[0].split("-"))
            found[start] = stop - start
    return found


@PLACES
@pytest.mark.parametrize("kind", [None, "left", "right", "between"])
@torch.no_grad()
def test_a_cache_kept_elsewhere_gives_the_same_bits(kind, place, tmp_path):
    mixer, x = build(top_k=2), random_input(3, 53, HIDDEN, dtype=torch.float64)
    mask = None
    if kind is not None:
        index, real = torch.arange(53), torch.tensor([[53], [30], [12]])
        drawn = torch.rand(3, 53, generator=torch.Generator().manual_seed(0)) > 0.4
        mask = {"left": index >= 53 - real, "right": index < real, "between": drawn}[kind]
    sizes = [20, 7, 1, 1, 13, *[1] * 11]
    plain = mixer.new_state(3, x.device, x.dtype)
    expected = steps(mixer, x, plain, sizes, mask)
    state = in_place(mixer, place, tmp_path, 3)
    assert torch.equal(steps(mixer, x, state, sizes, mask), expected)
    for name in plain.tensors:
        assert torch.equal(state[name], plain[name])


@PLACES
@torch.no_grad()
def test_what_stays_on_the_device_is_the_landmarks(place, tmp_path):
    """And the mask, a byte a token. All else is in the files, which have no name, and go with the state."""
    before = mapped_files()
    mixer, x = build(top_k=2), random_input(2, 1000, HIDDEN, dtype=torch.float64)
    state = in_place(mixer, place, tmp_path)
    steps(mixer, x, state, [900] + [1] * 100)
    token = 2 * 6 * 8  # kv heads, head_dim, bytes
    assert state.nbytes() == 2 * (200 * token + 1000)
    assert sum(tensor.nbytes for tensor in state.tensors.values()) == 2 * (1000 * 2 * token + 1000)
    new = {start: size for start, size in mapped_files().items() if start not in before}
    if place == "files":
        assert not list(tmp_path.iterdir())
        for name in ("keys", "values"):
            address = state[name].data_ptr()
            assert any(start <= address and address + state[name].nbytes <= start + size for start, size in new.items())
    del state
    gc.collect()
    assert not set(new) & set(mapped_files())


@torch.no_grad()
def test_what_is_kept_elsewhere_does_not_move_to_the_device():
    """The meta device stands for it."""
    mixer, x = build(top_k=2), random_input(2, 30, HIDDEN, dtype=torch.float64)
    state = in_place(mixer, "cpu", None)
    steps(mixer, x, state, [30])
    state.to("meta")
    assert "mask" not in state._buffers  # which would stay behind
    assert {name: state[name].device.type for name in state.tensors} == {"keys": "cpu", "values": "cpu", "mask": "meta"}
    assert state.nbytes() == 2 * (6 * 2 * 6 * 8 + 30)


@PLACES
@torch.no_grad()
def test_a_cache_kept_elsewhere_can_be_rearranged_saved_and_reset(place, tmp_path):
    mixer, x = build(top_k=2), random_input(4, 60, HIDDEN, dtype=torch.float64)
    prompt, rest = x[:2, :37], x[:, 37:]
    for rearrange, rows in [
        (lambda state: state.reorder(torch.tensor([1, 0])), 2),
        (lambda state: state.select(torch.tensor([1])), 1),
        (lambda state: state.repeat(2), 4),
        (lambda state: state.to("cpu"), 2),
        (lambda state: state.offload(), 2),
        (lambda state: state.load({name: tensor.clone() for name, tensor in state.tensors.items()}), 2),
        (lambda state: state.reset(), 2),
        (copy.deepcopy, 2),
    ]:
        outs = []
        for state in (mixer.new_state(2, x.device, x.dtype), in_place(mixer, place, tmp_path)):
            steps(mixer, prompt, state, [30, 7])
            state = rearrange(state) or state
            outs.append(steps(mixer, rest[:rows], state, [1] * 12 + [11]))
        assert torch.equal(*outs)
        assert state.storage is not None and state["keys"].shape[0] == rows
        if place == "files":
            places = mapped_files()
            address = state["keys"].data_ptr()
            assert any(start <= address < start + size for start, size in places.items())


@PLACES
def test_a_cache_kept_elsewhere_has_no_gradient(place, tmp_path):
    mixer, x = build(top_k=2), random_input(2, 9, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"has no gradient; run under torch.no_grad\(\)"):
        mixer(x, SequenceContext.of(x), in_place(mixer, place, tmp_path))


def test_what_can_be_kept_elsewhere():
    """Keys and values of layers that read few of them, also beside others."""
    device, dtype = torch.device("cpu"), torch.float64
    assert not build().new_state(1, device, dtype).keep_in("cpu")
    branches = [{**FIELDS, "top_k": 2}, {"kind": "lightning", "num_heads": 4}]
    beside = build_part(model_config(hidden_size=HIDDEN, mixer={"kind": "parallel", "branches": branches}))
    state = beside.new_state(1, device, dtype)
    assert state.keep_in("cpu") and state.branches[0].storage is not None
    moved = state.branches[0]["keys"].data_ptr()
    assert state.to("cpu") is state and state.branches[0]["keys"].data_ptr() == moved


def test_places_that_cannot_keep_a_cache(tmp_path, monkeypatch):
    state = build(top_k=2).new_state(1, torch.device("cpu"), torch.float64)
    (tmp_path / "file").write_text("")
    for place, reason in [("missing", "No such file or directory"), ("file", "Not a directory")]:
        with pytest.raises(StorageError, match=f"{tmp_path / place}: cannot keep .* \\({reason}\\); give `cpu`"):
            state.keep_in(tmp_path / place)
    assert state.storage is None

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device"):
        state.keep_in(tmp_path)
    assert not list(tmp_path.glob("zoo-cache-*"))


def test_files_where_no_system_call_takes_their_room(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    tensor = Storage(tmp_path).empty((3, 5), torch.float64)
    assert tensor.fill_(2.0).sum() == 30 and tensor.data_ptr() in {start for start in mapped_files()}


def test_packed_documents_do_not_continue_a_state():
    mixer, x = build(), random_input(1, 8, HIDDEN, dtype=torch.float64)
    context = SequenceContext.of(x, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    for top_k in (None, 2):
        mixer = build(top_k=top_k)
        with pytest.raises(ValueError, match="landmark cannot continue a state with cu_seqlens"):
            mixer(x, context, mixer.new_state(1, x.device, x.dtype))
