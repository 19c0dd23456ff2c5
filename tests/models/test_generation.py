"""transformers' generate() with hybrid, pure-attention and pure-recurrent models."""

import pytest
import torch
from transformers import pipeline

from tests.blocks.helpers import assert_close
from tests.models.helpers import PATTERNS, config, model, tokens
from zoo import build
from zoo.data.tokenizer import load_tokenizer
from zoo.models import ZooCache

MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "one of two beams": {"do_sample": False, "num_beams": 2},
    "samples": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "penalised": {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
}


def padded(rows, side="left"):
    """A batch of the rows, padded with 0, and its mask."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_a_cache(pattern, mode):
    net, prompt = model(pattern), tokens(2, 7)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(net.generate(prompt, max_new_tokens=10, use_cache=use_cache, **MODES[mode]))
    assert torch.equal(*texts)
    assert texts[0].shape == (2 * MODES[mode].get("num_return_sequences", 1), 17)
    assert len(texts[0][:, 7:].unique()) > 2  # something happens


def test_sampling_has_a_seed():
    net, prompt = model(), tokens(1, 5)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(net.generate(prompt, max_new_tokens=20, do_sample=True, temperature=2.0))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_left_padded_batch_is_each_row_alone(pattern, mode):
    net, rows = model(pattern), [tokens(1, length, seed=length)[0] for length in (9, 4, 1)]
    ids, mask = padded(rows)
    arguments = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True} | MODES[mode]
    together = net.generate(ids, attention_mask=mask, **arguments)
    returned = MODES[mode].get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        alone = net.generate(row[None], **arguments)
        assert torch.equal(together.sequences[i * returned : (i + 1) * returned, 9:], alone.sequences[:, len(row) :])
        if mode == "greedy":
            for step, expected in zip(together.scores, alone.scores, strict=True):
                assert_close(step[i], expected[0], tolerance=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_in_chunks(pattern):
    net, (ids, mask) = model(pattern), padded([tokens(1, length)[0] for length in (11, 3)])
    whole = net.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    pieces = net.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_from_embeddings(mode):
    net, prompt = model(), tokens(2, 7)
    embeds = net.get_input_embeddings()(prompt)
    expected = net.generate(prompt, max_new_tokens=6, **MODES[mode])[:, 7:]
    assert torch.equal(net.generate(inputs_embeds=embeds, max_new_tokens=6, **MODES[mode]), expected)
    uncached = net.generate(inputs_embeds=embeds, max_new_tokens=6, use_cache=False, **MODES[mode])
    assert torch.equal(uncached, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_are_the_logits_of_one_pass(pattern):
    net, prompt = model(pattern), tokens(2, 7)
    out = net.generate(
        prompt,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    logits = net(out.sequences).logits
    assert isinstance(out.past_key_values, ZooCache)
    assert len(out.scores) == len(out.hidden_states) == 8
    assert_close(torch.stack(out.scores, 1), logits[:, 6:-1])
    assert [step[0].shape[1] for step in out.hidden_states] == [7] + [1] * 7
    assert all(len(step) == len(net.model.layers) + 1 for step in out.hidden_states)


def test_stops_at_eos():
    net, prompt = model(eos_token_id=3, pad_token_id=0), tokens(3, 6)
    free = net.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    stop = int(free[1, 8])  # what row 1 says third
    ended = net.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0)
    for row, expected in zip(ended, free, strict=True):
        ends = (expected[6:] == stop).nonzero()
        length = 7 + int(ends[0]) if len(ends) else ended.shape[1]
        assert torch.equal(row[:length], expected[:length]) and not row[length:].any()
    assert (ended[1, 9:] == 0).all()
    assert net.generation_config.eos_token_id == 3 and net.generation_config.pad_token_id == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_goes_on_from_a_returned_cache(pattern):
    net, prompt = model(pattern), tokens(2, 7)
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    first = net.generate(prompt, max_new_tokens=5, **arguments)
    more = torch.cat([first.sequences, tokens(2, 3, seed=9)], 1)
    cached = net.generate(more, past_key_values=first.past_key_values, max_new_tokens=5, **arguments)
    assert torch.equal(cached.sequences, net.generate(more, max_new_tokens=5, **arguments).sequences)


def test_goes_on_from_a_padded_cache():
    net, (ids, mask) = model(), padded([tokens(1, length)[0] for length in (7, 4)])
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    first = net.generate(ids, attention_mask=mask, max_new_tokens=5, **arguments)
    new_mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    fields = {"attention_mask": new_mask, "max_new_tokens": 5} | arguments
    cached = net.generate(first.sequences, past_key_values=first.past_key_values, **fields)
    assert torch.equal(cached.sequences, net.generate(first.sequences, **fields).sequences)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' is not available"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
    ],
    ids=["static cache", "prompt lookup"],
)
def test_what_a_hybrid_cannot_do_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        model().generate(tokens(1, 5), max_new_tokens=4, do_sample=False, **arguments)


def test_an_assistant_is_refused():
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model().generate(tokens(1, 5), max_new_tokens=4, do_sample=False, assistant_model=model("attention"))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        model().generate(tokens(1, 0), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision(low):
    """The cache is of the weights' dtype but for recurrent states; the text is that of no cache, nearly always."""
    net, prompt = model().to(low), tokens(2, 9)
    out = net.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    dtypes = {
        name: tensor.dtype
        for state in out.past_key_values.layers
        if state is not None
        for name, tensor in state.tensors.items()
    }
    assert dtypes["keys"] == dtypes["values"] == low
    assert {dtypes[name] for name in ("S", "h", "conv")} == {torch.float32}
    logits = net.float()(out.sequences).logits[:, 8:-1]
    assert_close(torch.stack(out.scores, 1).float(), logits, tolerance=0.05)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_under_autocast(pattern):
    net, prompt = model(pattern), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
        logits = net(out.sequences).logits[:, 8:-1]
    assert_close(torch.stack(out.scores, 1), logits.float(), tolerance=0.05)


def test_text_generation_pipeline():
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes")
    net = build(config() | {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257}).eval()
    generate = pipeline("text-generation", model=net, tokenizer=tokenizer, device="cpu")
    prompts = ["Hybrid models", "a longer prompt than the first"]
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [generate(prompt, **arguments)[0]["generated_text"] for prompt in prompts]
    together = [out[0]["generated_text"] for out in generate(prompts, batch_size=2, **arguments)]
    assert alone == together and any(alone)
