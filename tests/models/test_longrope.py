"""LongRoPE in a model: its factors follow each row's and document's length, and a cache cannot cross the switch."""

import pytest
import torch

from tests.blocks.helpers import perturb
from tests.models.helpers import ATTENTION, MLP, VOCAB, model, tokens
from tests.ops.helpers import relative_error
from zoo import build

SWITCH = 12
ROPE = {
    "type": "longrope", "theta": 100.0, "factor": 4.0, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0],
}  # fmt: skip
GENERATE = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def net():
    blocks = {"attention": {"mixer": {**ATTENTION, "rope": ROPE}, "ffn": MLP}, "mamba": {"mixer": {"kind": "mamba"}}}
    config = {"vocab_size": VOCAB, "hidden_size": 16, "blocks": blocks, "pattern": "attention mamba attention"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturb(build(config)).eval()


def padded(rows):
    """Left-padded ids and their mask."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    return ids, mask.long()


@torch.no_grad()
def test_rows_and_documents_go_by_their_own_length():
    ours, rows = net(), [tokens(1, length, seed=length)[0] for length in (9, SWITCH, SWITCH + 1, 20)]
    alone = [ours(row[None]).logits[0] for row in rows]
    ids, mask = padded(rows)
    logits = ours(ids, attention_mask=mask).logits
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    packed = ours(torch.cat(rows)[None], cu_seqlens=cu_seqlens).logits[0]
    for i, (row, expected) in enumerate(zip(rows, alone, strict=True)):
        assert relative_error(logits[i, -len(row) :], expected) < 1e-5
        assert relative_error(packed[cu_seqlens[i] : cu_seqlens[i + 1]], expected) < 1e-5
    assert relative_error(alone[3][:9], ours(rows[3][None, :9]).logits[0]) > 1e-3  # the first tokens turn otherwise


@torch.no_grad()
@pytest.mark.parametrize(("start", "stop"), [(1, 2 * SWITCH), (0, SWITCH), (SWITCH + 1, 2 * SWITCH)])
def test_a_cache_on_one_side_of_the_switch_is_exact(start, stop):
    """A first token alone is on both."""
    ours, ids = net(), tokens(1, stop)
    cache = ours.model.new_cache(1, "cpu", torch.float32)
    logits = [ours(ids[:, :start], past_key_values=cache).logits] if start else []
    if start == 1:
        logits.append(ours(ids[:, 1 : SWITCH + 4], past_key_values=cache).logits)
    for t in range(cache.get_seq_length(), stop):
        logits.append(ours(ids[:, t : t + 1], past_key_values=cache).logits)
    assert relative_error(torch.cat(logits, 1), ours(ids).logits) < 1e-5


@torch.no_grad()
def test_a_cache_carried_across_the_switch_is_refused():
    ours, (ids, mask) = net(), padded([tokens(1, 5)[0], tokens(1, SWITCH)[0]])
    cache = ours(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="begun within 12 tokens, beyond which LongRoPE turns all of them otherwise"):
        ours(tokens(2, 1), past_key_values=cache)
    # Padding alone does not carry a row across.
    ours(tokens(2, 1), attention_mask=torch.tensor([[1], [0]]), past_key_values=cache)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_makes_the_cache_anew(beams):
    """Rows cross at different steps; each is as alone and without a cache."""
    ours, rows = net(), [tokens(1, length, seed=length)[0] for length in (3, 8, SWITCH, 20)]
    ids, mask = padded(rows)
    together = ours.generate(ids, attention_mask=mask, num_beams=beams, **GENERATE)
    for row, full in zip(rows, together, strict=True):
        alone = ours.generate(row[None], use_cache=False, num_beams=beams, **GENERATE)
        assert torch.equal(full[-len(row) - 12 :], alone[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_embeddings_makes_the_cache_anew(beams):
    ours, rows = net(), [tokens(1, length, seed=length)[0] for length in (3, 8, SWITCH)]
    ids, mask = padded(rows)
    expected = ours.generate(ids, attention_mask=mask, num_beams=beams, **GENERATE)[:, ids.shape[1] :]
    embeds = ours.get_input_embeddings()(ids)
    assert torch.equal(ours.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=beams, **GENERATE), expected)


def test_a_prompt_beyond_the_switch_comes_in_one_piece():
    ours, long, short = net(), tokens(1, 20), tokens(1, 8)
    for size in (7, 13):
        with pytest.raises(ValueError, match=f"prefill_chunk_size={size} is not available for a prompt of 20 tokens"):
            ours.generate(long, prefill_chunk_size=size, **GENERATE)
    for ids, size in ((long, 20), (short, 3)):
        assert torch.equal(ours.generate(ids, prefill_chunk_size=size, **GENERATE), ours.generate(ids, **GENERATE))
    (ids, mask) = padded([short[0], tokens(1, 5)[0]])
    ours.generate(ids, attention_mask=mask, prefill_chunk_size=3, **GENERATE)


def test_without_longrope_no_cache_is_outgrown():
    plain = model()
    assert plain.model.switches == []
    assert plain.generate(tokens(1, 5), **GENERATE).shape == (1, 17)
