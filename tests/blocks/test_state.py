"""States: growth, forgetting, and what generate() does to them."""

import copy

import pytest
import torch

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import KeyValueState, SequenceContext, State


def key_values(batch=2, window=None, num_sinks=0):
    empty = torch.empty(batch, 0, 1, 3)
    return KeyValueState(empty, empty.clone(), window, num_sinks)


def chunk(*shape, seed=0):
    return random_input(*shape, 1, 3, seed=seed), random_input(*shape, 1, 3, seed=seed + 100)


def contents(state):
    return {name: tensor.clone() for name, tensor in state.tensors.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@torch.no_grad()
def test_appending_copies_no_past():
    """While a token is appended the buffer stays where it is; it moves once per doubling."""
    state, places = key_values(), []
    for t in range(100):
        keys, values, mask = state.append(*chunk(2, 1, seed=t), None)
        assert keys.shape == values.shape == (2, t + 1, 1, 3) and mask is None
        places.append(keys.data_ptr())
    assert len(set(places)) <= 9  # 1, 2, 4, ... 128
    assert_close(state["keys"], torch.cat([chunk(2, 1, seed=t)[0] for t in range(100)], 1))
    assert_close(state["values"], torch.cat([chunk(2, 1, seed=t)[1] for t in range(100)], 1))


@torch.no_grad()
def test_masks_arrive_late_and_stay():
    state = key_values()
    assert state.append(*chunk(2, 3), None)[2] is None
    mask = torch.tensor([[True, False], [True, True]])
    assert state.append(*chunk(2, 2), mask)[2].tolist() == [[True] * 4 + [False], [True] * 5]
    assert state.append(*chunk(2, 1), None)[2].tolist() == [[True] * 4 + [False, True], [True] * 6]


@torch.no_grad()
@pytest.mark.parametrize(("window", "num_sinks"), [(1, 0), (3, 0), (3, 2), (1, 1)])
def test_a_window_forgets_what_no_query_will_see(window, num_sinks):
    state, lengths = key_values(window=window, num_sinks=num_sinks), []
    keys = torch.arange(1.0, 31).view(1, 30, 1, 1).expand(2, 30, 1, 3)
    for piece in keys.split([7, 1, 1, 4, 1, 1, 1, 9, 5], dim=1):
        before = state["keys"].shape[1]
        seen, _, mask = state.append(piece, piece, None)
        assert mask is None and seen.shape[1] == before + piece.shape[1]
        lengths.append(state["keys"].shape[1])
    assert lengths == [min(window - 1 + num_sinks, 7)] * 9
    expected = [*range(1, num_sinks + 1), *range(30 - window + 2, 31)]
    assert state["keys"][0, :, 0, 0].tolist() == expected


@torch.no_grad()
def test_a_window_keeps_what_any_row_needs():
    state = key_values(window=3, num_sinks=1)
    keys = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 1, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    state.append(keys, keys, mask)
    # Row 0 needs its sink 2 and its last two, 6 and 7; row 1 its sink 0 and its last two, 3 and 4.
    assert state["keys"][0, :, 0, 0].tolist() == [0, 2, 3, 4, 6, 7]
    assert state["mask"].tolist() == [[False, True, True, True, True, True], [True, True, True, True, False, False]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("modes", ["ngn", "gng", "nggnn", "inin", "nini", "igin"])
def test_grad_modes_may_follow_each_other(modes, window):
    """Every order of grad (g), no_grad (n) and inference_mode (i) gives what one pass gives."""
    mixer = perturb(
        build_part(model_config(hidden_size=8, mixer={"kind": "attention", "num_heads": 2, "window": window}))
    )
    pieces = [4, 1] + [1] * (len(modes) - 1)  # the first mode leaves a buffer with room, the others use it
    x = random_input(2, sum(pieces), 8)
    state = mixer.new_state(2, torch.device("cpu"), torch.float32)
    outputs = []
    for mode, token in zip(modes[0] + modes, x.split(pieces, dim=1), strict=True):
        with {"g": torch.enable_grad, "n": torch.no_grad, "i": torch.inference_mode}[mode]():
            outputs.append(mixer(token, SequenceContext.of(token, seen=_seen(outputs)), state))
    assert_close(torch.cat(outputs, 1).detach(), mixer(x, SequenceContext.of(x)).detach())


def _seen(outputs):
    return torch.full((2,), sum(output.shape[1] for output in outputs))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_flow_through_a_state(frozen):
    """Chunk by chunk gives the gradients of one pass, also where only the queries learn."""
    mixer = perturb(build_part(model_config(hidden_size=8, mixer={"kind": "attention", "num_heads": 2})))
    if frozen:
        mixer.k_proj.requires_grad_(False)
        mixer.v_proj.requires_grad_(False)
    x = random_input(2, 9, 8)
    state, outputs = mixer.new_state(2, torch.device("cpu"), torch.float32), []
    for part in x.split([4, 1, 1, 3], dim=1):
        outputs.append(mixer(part, SequenceContext.of(part, seen=_seen(outputs)), state))
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    ours = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), parameters)
    theirs = torch.autograd.grad(mixer(x, SequenceContext.of(x)).square().sum(), parameters)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert_close(gradient, expected)


@torch.no_grad()
def test_a_copy_goes_its_own_way():
    """Two continuations of one past do not write over each other."""
    state = key_values()
    state.append(*chunk(2, 5), None)
    state.append(*chunk(2, 1), None)  # the buffer has room now
    fork = copy.deepcopy(state)
    loaded = key_values()
    loaded.load(state.tensors)
    for seed, each in ((1, state), (2, fork), (3, loaded)):
        each.append(*chunk(2, 1, seed=seed), None)
    for seed, each in ((1, state), (2, fork), (3, loaded)):
        assert torch.equal(each["keys"][:, 6:], chunk(2, 1, seed=seed)[0])
        assert torch.equal(each["keys"][:, :5], chunk(2, 5)[0])


@torch.no_grad()
def test_going_back_to_saved_tensors():
    state = key_values()
    state.append(*chunk(2, 5), None)
    state.append(*chunk(2, 1), None)
    saved, before = dict(state.tensors), contents(state)
    for seed in range(3):
        state.append(*chunk(2, 2, seed=seed), None)
    state.load(saved)
    assert_same(state.tensors, before)
    keys, _, _ = state.append(*chunk(2, 1, seed=9), None)
    assert torch.equal(keys, torch.cat([before["keys"], chunk(2, 1, seed=9)[0]], 1))


def _recurrent():
    state = State(h=torch.zeros(3, 2), conv=torch.ones(3, 4))
    state.update(h=torch.arange(6.0).view(3, 2))
    return state


@torch.no_grad()
def _attending():
    state = key_values(batch=3)
    state.append(*chunk(3, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool())
    return state


@pytest.mark.parametrize("make", [_recurrent, _attending])
def test_rows_are_chosen_repeated_and_reset(make):
    state, before = make(), contents(make())
    state.reorder(torch.tensor([2, 0, 0]))
    assert_same(state.tensors, {name: tensor[[2, 0, 0]] for name, tensor in before.items()})
    state = make()
    state.repeat(2)
    assert_same(state.tensors, {name: tensor[[0, 0, 1, 1, 2, 2]] for name, tensor in before.items()})
    state.select(torch.tensor([5]))
    assert_same(state.tensors, {name: tensor[[2]] for name, tensor in before.items()})
    assert state.nbytes() == sum(tensor.nbytes for tensor in state.tensors.values())
    state.offload()
    assert_same(state.tensors, {name: tensor[[2]] for name, tensor in before.items()})


def test_reset_keeps_the_rows():
    state = _recurrent()
    state.repeat(2)
    state.reset()
    assert_same(state.tensors, {"h": torch.zeros(6, 2), "conv": torch.ones(6, 4)})
    state.update(h=state["h"] + 1)
    state.reset()
    assert not state["h"].any()
    state = _attending()
    state.reset()
    assert {name: tensor.shape[:2] for name, tensor in state.tensors.items()} == dict.fromkeys(state.tensors, (3, 0))
    with torch.no_grad():
        assert state.append(*chunk(3, 2), None)[2] is None


def test_a_loaded_mask_is_remembered():
    state, other = _attending(), key_values(batch=3)
    other.load(state.tensors)
    with torch.no_grad():
        for each in (state, other):
            mask = each.append(*chunk(3, 1, seed=4), None)[2]
            assert mask.sum() == 3 + 4 + 2 + 3


@pytest.mark.parametrize("kind", ["lightning", "mamba", "mamba2", "gated_delta", "kda"])
def test_a_recurrent_state_does_not_share_memory(kind):
    """Continuing one copy leaves the other as it was."""
    fields = {"mamba": {}, "mamba2": {"head_dim": 4, "state_size": 4}}.get(kind, {"num_heads": 2})
    mixer = perturb(build_part(model_config(hidden_size=8, mixer={"kind": kind, **fields})))
    state, x = mixer.new_state(2, torch.device("cpu"), torch.float32), random_input(2, 5, 8)
    with torch.no_grad():
        mixer(x, SequenceContext.of(x), state)
        saved, before = dict(state.tensors), contents(state)
        mixer(x[:, :1], SequenceContext.of(x[:, :1]), state)
        assert_same(saved, before)
        assert all(not torch.equal(state[name], before[name]) for name in before)
