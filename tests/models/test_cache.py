"""The cache of a whole model: continuing, choosing rows, resetting, and what it costs."""

import copy
from itertools import pairwise

import pytest
import torch

from tests.blocks.helpers import assert_close
from tests.models.helpers import PATTERNS, model, tokens
from zoo.models import ZooCache


def run(net, ids, cache, pieces=None, **arguments):
    """Logits of the chunks, joined."""
    parts = ids.split(pieces or [ids.shape[1]], dim=1)
    return torch.cat([net(part, past_key_values=cache, **arguments).logits for part in parts], 1)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 11], [3, 17]], ids=str)
def test_chunks_give_what_one_pass_gives(pattern, pieces):
    net, ids = model(pattern), tokens(2, 20)
    cache = net.model.new_cache(2, "cpu", torch.float32)
    assert_close(run(net, ids, cache, pieces), net(ids).logits)
    assert cache.get_seq_length() == 20 and cache.seen.tolist() == [20, 20]


@torch.no_grad()
def test_no_past_is_copied_for_a_token():
    """The keys of a layer stay where they are while tokens come, one move per doubling."""
    net, ids, places = model("attention"), tokens(1, 60), []
    cache = net.model.new_cache(1, "cpu", torch.float32)
    for token in ids.split(1, dim=1):
        net(token, past_key_values=cache)
        places.append(cache.layers[0]["keys"].data_ptr())
    moves = sum(first != second for first, second in pairwise(places))
    assert moves <= 6  # 2, 4, ... 64


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_are_chosen_repeated_and_reset(pattern):
    net, ids, more = model(pattern), tokens(3, 9), tokens(4, 3, seed=5)

    def fresh():
        cache = net(ids, use_cache=True).past_key_values
        assert isinstance(cache, ZooCache)
        return cache

    for change, rows in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        cache = fresh()
        change(cache)
        new = more[torch.arange(len(rows)) % 4]
        expected = net(torch.cat([ids[rows], new], 1)).logits[:, 9:]
        assert_close(run(net, new, cache), expected)
    cache = fresh()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(run(net, ids, cache), net(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_keep_their_own_past(pattern):
    """Rows of different lengths, chosen anew: each goes on from its own position."""
    net, ids, lengths = model(pattern), tokens(3, 9), torch.tensor([9, 4, 6])
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    for change, rows in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        cache = net(ids, attention_mask=mask, use_cache=True).past_key_values
        change(cache)
        assert cache.seen.tolist() == lengths[rows].tolist()
        new = tokens(len(rows), 3, seed=5)
        logits = run(net, new, cache)
        for i, row in enumerate(rows):
            alone = torch.cat([ids[row, 9 - lengths[row] :], new[i]])[None]
            assert_close(logits[i], net(alone).logits[0, -3:])


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_copy_goes_its_own_way(pattern):
    net, ids = model(pattern), tokens(2, 9)
    cache = net(ids, use_cache=True).past_key_values
    fork = copy.deepcopy(cache)
    for seed, each in ((1, cache), (2, fork), (3, cache), (4, fork)):
        run(net, tokens(2, 1, seed=seed), each)
    for seeds, each in (((1, 3), cache), ((2, 4), fork)):
        whole = torch.cat([ids, *[tokens(2, 1, seed=seed) for seed in seeds], tokens(2, 2, seed=7)], 1)
        assert_close(run(net, whole[:, -2:], each), net(whole).logits[:, -2:])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("modes", ["in", "ni", "nin", "gn", "ngn"])
def test_one_cache_in_several_modes(pattern, modes):
    """inference_mode, no_grad and training may take turns."""
    net, ids = model(pattern), tokens(2, 6 + 3 * len(modes))
    cache, outputs = net.model.new_cache(2, "cpu", torch.float32), []
    pieces = ids.split([6] + [1] * 3 * len(modes), dim=1)
    for i, part in enumerate(pieces):
        mode = modes[max(0, i - 1) // 3]
        with {"g": torch.enable_grad, "n": torch.no_grad, "i": torch.inference_mode}[mode]():
            outputs.append(net(part, past_key_values=cache).logits)
    assert_close(torch.cat([output.detach() for output in outputs], 1), net(ids).logits.detach())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_pass_through_the_cache(pattern):
    net, ids = model(pattern), tokens(2, 12)
    cache = net.model.new_cache(2, "cpu", torch.float32)
    weight = torch.randn(2, 12, net.config.vocab_size, generator=torch.Generator().manual_seed(0))
    (run(net, ids, cache, [5, 1, 6]) * weight).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    (net(ids).logits * weight).sum().backward()
    for name, parameter in net.named_parameters():
        assert_close(ours[name], parameter.grad, f"gradient of {name}", tolerance=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("whole_mask", [True, False])
def test_a_padded_past(whole_mask):
    """With the mask of the present chunk, or of the past as well, as generate() gives it."""
    net, ids = model(), tokens(3, 14)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[0, :4] = mask[1, :7] = 0
    cache, outputs, end = net.model.new_cache(3, "cpu", torch.float32), [], 0
    for part in ids.split([5, 1, 6, 1, 1], dim=1):
        start, end = end, end + part.shape[1]
        given = mask[:, :end] if whole_mask else mask[:, start:end]
        outputs.append(net(part, attention_mask=given, past_key_values=cache).logits)
    logits = torch.cat(outputs, 1)
    assert cache.seen.tolist() == [10, 7, 14]
    for row, padding in enumerate((4, 7, 0)):
        assert_close(logits[row, padding:], net(ids[row : row + 1, padding:]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_are_those_foretold(pattern):
    net = model(pattern)
    for length in (1, 4, 17):
        cache = net(tokens(2, length), use_cache=True).past_key_values
        assert cache.nbytes() == net.state_bytes(2, length)
    assert f"{cache.nbytes()} bytes" in repr(cache) and "17 tokens" in repr(cache)


@torch.no_grad()
def test_offloaded_states_come_back():
    net, ids = model(), tokens(2, 9)
    cache = net(ids, use_cache=True).past_key_values
    for state in cache.layers:
        if state is not None:
            state.offload()
    more = tokens(2, 2, seed=3)
    assert_close(run(net, more, cache), net(torch.cat([ids, more], 1)).logits[:, 9:])


def test_mistakes_are_named():
    net, ids = model(), tokens(1, 6)
    cache = net.model.new_cache(1, "cpu", torch.float32)
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        net(ids, cu_seqlens=offsets, past_key_values=cache)
    for columns in (9, 5):
        for past in (None, cache):
            with pytest.raises(ValueError, match=r"attention_mask must be \[1, 6\]"):
                net(ids, attention_mask=torch.ones(1, columns), past_key_values=past)
    with pytest.raises(ValueError, match="the cache holds 1 rows, the input 2"):
        net(tokens(2, 6), past_key_values=cache)
