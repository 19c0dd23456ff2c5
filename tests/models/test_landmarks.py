"""The landmark tokens of a model: where they stand in the stream, and that nobody outside ever sees one."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch

from tests.blocks.helpers import assert_close
from tests.models.helpers import ATTENTION, LIGHTNING, MLP, MOE, VOCAB, realigned, tokens
from tests.models.helpers import perturb as randomised
from zoo import ZooForCausalLM, build, load_config
from zoo.blocks import SequenceContext
from zoo.config import ConfigError
from zoo.models.landmarks import LandmarkToken, take_out
from zoo.models.summary import summarize

LANDMARK = {"kind": "landmark", "num_heads": 4, "num_kv_heads": 2, "block_size": 3}


def config(**fields) -> dict:
    blocks = {
        "lightning": {"mixer": LIGHTNING, "ffn": MOE},
        "landmark": {"mixer": LANDMARK, "ffn": MLP},
        "window": {"mixer": {**ATTENTION, "window": 5}},
    }
    return {"vocab_size": VOCAB, "hidden_size": 16, "blocks": blocks, "pattern": "lightning landmark window*2"} | fields


def model(**fields) -> ZooForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(build(config(**fields)), 0).eval()


def by_hand(rows: list[list[int]], block_size: int, seen: list[int]) -> list[list[tuple[int, int]]]:
    """For each row of tokens, the stream as (token, position), with -1 for a landmark."""
    streams = []
    for row, past in zip(rows, seen, strict=True):
        stream, count = [], past
        for token in row:
            stream.append((token, count + count // block_size))
            count += 1
            if count % block_size == 0:
                stream.append((-1, count + count // block_size - 1))
        streams.append(stream)
    return streams


def put_in(ids, block_size, mask=None, seen=None, cu_seqlens=None):
    """The stream of `ids`, as (token, position) of its real tokens, row by row; and the ids that come back out."""
    landmark = LandmarkToken(1, block_size, 0.0)
    landmark.weight.data.fill_(-1.0)
    x = ids[..., None].float()
    context = SequenceContext.of(x, padding_mask=mask, seen=seen, cu_seqlens=cu_seqlens)
    stream, context, columns = landmark.put_in(x, context, seen)
    real = torch.ones(stream.shape[:2], dtype=torch.bool) if context.padding_mask is None else context.padding_mask
    rows = [
        [(int(token), int(position)) for token, position in zip(tokens[m, 0], positions[m], strict=True)]
        for tokens, positions, m in zip(stream, context.position_ids, real, strict=True)
    ]
    return rows, take_out(stream, columns)[..., 0].long(), context


@pytest.mark.parametrize("block_size", [1, 3, 4, 50])
@pytest.mark.parametrize("seen", [None, [0, 0, 0], [2, 3, 7]])
@pytest.mark.parametrize("padding", [None, "left", "right", "between"])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_landmarks_stand_after_every_so_many_real_tokens(length, padding, seen, block_size):
    ids = torch.arange(1, 3 * length + 1).view(3, length)
    index, real = torch.arange(length), torch.tensor([[length], [length // 2], [0]])
    masks = {"left": index >= length - real, "right": index < real, "between": (index + real) % 3 > 0}
    mask = masks.get(padding)
    rows, back, _ = put_in(ids, block_size, mask, None if seen is None else torch.tensor(seen))
    kept = [
        row.tolist() if mask is None else row[m].tolist() for row, m in zip(ids, mask if padding else ids, strict=True)
    ]
    assert rows == by_hand(kept, block_size, seen or [0, 0, 0])
    assert torch.equal(back, ids)


def test_documents_count_from_their_own_start():
    cu_seqlens = torch.tensor([0, 0, 2, 5, 6, 6, 13], dtype=torch.int32)
    ids = torch.arange(1, 14)[None]
    rows, back, context = put_in(ids, 3, cu_seqlens=cu_seqlens)
    documents = [ids[0, start:stop].tolist() for start, stop in pairwise(cu_seqlens)]
    assert rows == [list(chain.from_iterable(by_hand(documents, 3, [0] * 6)))]
    assert context.cu_seqlens.tolist() == [0, 0, 2, 6, 7, 7, 16] and context.cu_seqlens.dtype == torch.int32
    assert torch.equal(back, ids)


def test_positions_that_are_given_are_stretched_alike():
    net, ids = model(), tokens(2, 11)
    positions = torch.arange(11).expand(2, -1)
    assert_close(net(ids, position_ids=positions).logits, net(ids).logits)
    context = SequenceContext.of(ids, position_ids=positions + 6)
    _, context, _ = net.model.landmark.put_in(torch.zeros(2, 11, 16), context, None)
    assert context.position_ids[0].tolist() == list(range(8, 8 + 14))


def test_nothing_that_comes_out_has_a_landmark():
    net, ids = model(), tokens(2, 11)
    output = net(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert output.logits.shape == (2, 11, VOCAB)
    assert [each.shape for each in output.hidden_states] == [(2, 11, 16)] * 5
    assert_close(output.hidden_states[0], net.model.embed_tokens(ids))
    assert output.past_key_values.get_seq_length() == 11 and output.past_key_values.seen.tolist() == [11, 11]
    targets = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(output.cross_entropy, targets)
    assert output.past_key_values.layers[1]["keys"].shape[1] == 14  # with three landmarks
    assert_close(net(inputs_embeds=net.model.embed_tokens(ids)).logits, output.logits)


def test_every_layer_sees_the_landmarks():
    """Changing their embedding changes what comes after the first, and nothing before."""
    net, ids = model(), tokens(1, 11)
    before = net(ids, output_hidden_states=True).hidden_states
    net.model.landmark.weight.data += 1
    after = net(ids, output_hidden_states=True).hidden_states
    for i in (1, 2, 3, 4):
        change = (after[i] - before[i]).norm(dim=-1)[0]
        assert not change[:3].any() and (change[3:5] > 0).all()
    net.zero_grad()
    net(ids, labels=ids).loss.backward()
    assert net.model.landmark.weight.grad.norm() > 0


def test_without_landmark_mixers_there_is_no_landmark():
    net = model(pattern="lightning window")
    assert net.model.landmark is None and net.config.landmark_block is None and net.config.stream_length(90) == 90


def test_all_landmark_mixers_share_one_block_size():
    other = {"mixer": {**LANDMARK, "block_size": 4}}
    beside = {"mixer": {"kind": "parallel", "branches": [LIGHTNING, {**LANDMARK, "block_size": 4}]}}
    for block, path in ((other, "block_size"), (beside, r"branches\[1\].block_size")):
        mapping = config(pattern="lightning landmark other")
        mapping["blocks"]["other"] = block
        message = rf"^blocks.other.mixer.{path}: must be 3, as blocks.landmark.mixer.block_size.*got 4$"
        with pytest.raises(ConfigError, match=message):
            load_config(mapping)
        mapping["pattern"] = "lightning other"  # one that is not used does not count
        assert load_config(mapping).landmark_block == 4


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_with_and_without_a_cache(mode):
    net, prompt, texts = model(), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(net.generate(prompt, max_new_tokens=14, use_cache=use_cache, **MODES[mode]))
    assert torch.equal(*texts)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generate_from_a_left_padded_batch_is_each_row_alone(mode):
    net, rows = model(), [tokens(1, length, seed=length)[0] for length in (9, 4, 2)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    arguments = {"max_new_tokens": 11, **MODES[mode]}
    out = net.generate(ids, attention_mask=mask, **arguments).view(3, -1, 20)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, :, 9:], net.generate(row[None], **arguments)[:, len(row) :])


def test_generate_with_retrieval():
    """It reads two blocks of many, whatever the chunks of the prompt; and the text is its own."""
    net = model()
    mapping = config()
    mapping["blocks"]["landmark"]["mixer"] = {**LANDMARK, "top_k": 2}
    reading = build(mapping).eval()
    reading.load_state_dict(net.state_dict())
    ids = tokens(2, 40)
    cache, logits = reading.model.new_cache(2, "cpu", torch.float32), []
    for part in ids.split([17, 1, 20, 1, 1], 1):
        logits.append(reading(part, past_key_values=cache).logits)
    whole = reading(ids, use_cache=True).logits
    assert_close(torch.cat(logits, 1), whole)
    assert (whole - net(ids).logits).norm() > 1e-3 * whole.norm()
    assert reading.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 45)


@pytest.mark.parametrize("rope", [{"theta": 100.0}, None], ids=["rope", "none"])
@pytest.mark.parametrize("option", ["top_k", "train_top_k"])
@torch.no_grad()
def test_landmarks_that_are_all_alike(option, rope):
    """Below the first mixer they are, but for rounding: which blocks are read must not hang on that."""
    mixer = {**LANDMARK, option: 2, "rope": rope}
    net = model(blocks={"landmark": {"mixer": mixer, "ffn": MLP}}, pattern="landmark*2").double()
    ids = tokens(2, 90)

    def read(chunks, rows=ids, **arguments):
        cache = net.model.new_cache(len(rows), "cpu", torch.float64)
        parts, start = [], 0
        for part in rows.split(chunks, 1):
            mask = arguments.get("attention_mask")
            start += part.shape[1]
            given = {} if mask is None else {"attention_mask": mask[:, :start]}
            parts.append(net(part, past_key_values=cache, **given).logits)
        return torch.cat(parts, 1)

    whole = read(90)
    for chunks in (1, [45, *[1] * 45], [17, 31, 1, 41]):
        assert_close(read(chunks), whole, tolerance=1e-10)
    if option == "train_top_k":
        assert_close(net(ids, use_cache=False).logits, whole, tolerance=1e-10)
    padded, mask = torch.cat([torch.zeros(2, 9, dtype=torch.long), ids], 1), torch.ones(2, 99, dtype=torch.long)
    mask[:, :9] = 0
    mask[1, 9:12] = 0  # the second row begins later
    both = read([60, *[1] * 39], padded, attention_mask=mask)
    assert_close(both[0, 9:], whole[0], tolerance=1e-10)
    assert_close(both[1, 12:], read(87, ids[1:, 3:])[0], tolerance=1e-10)


def test_saved_and_loaded(tmp_path):
    net, ids = model(), tokens(2, 11)
    net.save_pretrained(tmp_path)
    loaded = realigned(ZooForCausalLM.from_pretrained(tmp_path)).eval()
    assert torch.equal(loaded.model.landmark.weight, net.model.landmark.weight)
    assert_close(loaded(ids).logits, net(ids).logits)


def test_gradient_checkpointing():
    net, ids, gradients = model(), tokens(2, 11), []
    net.train()
    for on in (False, True):
        if on:
            net.gradient_checkpointing_enable()
        net.zero_grad()
        net(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)


def test_the_summary_counts_them():
    settings = load_config(config())
    net, total = build(settings, device="meta", dtype=torch.bfloat16), summarize(settings, 3000).total
    assert total.params == net.num_params()
    assert total.flops == net.flops(1, 3000) and total.state_bytes == net.state_bytes(1, 3000)


def test_the_plain_path_asks_the_device_for_nothing():
    """On the meta device a value cannot be read: the training forward's shapes follow from shapes."""
    net = build(config(), device="meta")
    assert net.model.landmark.put_in(
        torch.zeros(2, 11, 16, device="meta"), SequenceContext.of(torch.zeros(2, 11, device="meta")), None
    )[0].shape == (2, 14, 16)
