import numpy as np
import pytest
import torch

from zoo.data import PackedText, load_corpus, open_source

FRACTION = 0.2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    random = np.random.RandomState(0)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"{i:02}:" + "".join(random.choice(list("abc \n"), random.randint(1, 90))))
    return load_corpus(open_source(str(folder)), "bytes", tmp_path_factory.mktemp("cache"), FRACTION)


def epoch_documents(stream):
    """Splits a list of byte tokens at eos into documents."""
    return bytes(0 if token == 256 else token for token in stream).decode().split("\0")


WHOLE = 10**6  # longer than the corpus: one block, so that documents stay whole


def read(text, start, stop, sequence_length=16):
    return text.batch(start, stop, sequence_length)["input_ids"][0].tolist()


def test_an_epoch_holds_every_document_once_in_its_own_order(corpus):
    training, _ = corpus.split(FRACTION)
    text = PackedText(corpus, training, 3, WHOLE)
    assert text.num_tokens == corpus.lengths[training].sum()
    epochs = [epoch_documents(read(text, e * text.num_tokens, (e + 1) * text.num_tokens)) for e in range(3)]
    expected = sorted(corpus.text(np.array([i])).decode() for i in training)
    for documents in epochs:
        assert documents.pop() == ""
        assert sorted(documents) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = PackedText(corpus, training, 3, WHOLE)
    assert read(again, 0, 500) == read(text, 0, 500)
    assert read(PackedText(corpus, training, 4, WHOLE), 0, 500) != read(text, 0, 500)


def test_the_order_is_frozen(corpus):
    # A new numpy, or a change here, must not reorder the data of runs that will be resumed.
    text = PackedText(corpus, np.arange(40), 7, WHOLE)
    documents = epoch_documents(read(text, 0, text.num_tokens))
    assert [int(document[:2]) for document in documents[:7]] == [16, 36, 28, 18, 33, 22, 23]
    order = [text.batch(8 * i, 8 * i + 8, 8)["input_ids"].tolist() for i in range(text.num_tokens // 8)]
    blocks = PackedText(corpus, np.arange(40), 7, 8)
    first = [order.index(blocks.batch(8 * i, 8 * i + 8, 8)["input_ids"].tolist()) for i in range(6)]
    assert first == [114, 258, 142, 256, 223, 238]


def test_an_epoch_holds_every_block_once_in_its_own_order(corpus):
    training, _ = corpus.split(FRACTION)
    documents, text = PackedText(corpus, training, 3, WHOLE), PackedText(corpus, training, 3, 16)
    whole = text.num_tokens // 16

    def blocks(stream):
        tokens = read(stream, 0, stream.num_tokens)
        return [tuple(tokens[i : i + 16]) for i in range(0, len(tokens), 16)]

    assert sorted(blocks(documents)[:whole]) == sorted(blocks(text)[:whole])
    assert blocks(documents)[whole:] == blocks(text)[whole:]
    in_place = sum(a == b for a, b in zip(blocks(documents), blocks(text), strict=True))
    assert in_place < whole / 4
    assert read(text, 0, 320) != read(text, text.num_tokens, text.num_tokens + 320)
    # A row that spans two blocks is cut where they meet, though no document ends there.
    boundaries = text.batch(8, 40, 32)["cu_seqlens"].tolist()
    assert {0, 8, 24, 32} <= set(boundaries)


def test_any_slices_join_to_the_same_stream(corpus):
    text = PackedText(corpus, corpus.split(FRACTION)[0], 1, 16)
    whole = read(text, 0, 3 * text.num_tokens)  # crosses two epoch borders
    random = np.random.RandomState(1)
    for start in random.randint(0, 2 * text.num_tokens, 50):
        length = random.randint(1, text.num_tokens)
        assert read(text, start, start + length) == whole[start : start + length]


def test_labels_and_boundaries(corpus):
    text = PackedText(corpus, corpus.split(FRACTION)[0], 1, WHOLE)
    start, stop, length = text.num_tokens - 333, text.num_tokens + 307, 64
    batch = text.batch(start, stop, length)
    ids, labels, boundaries = batch["input_ids"], batch["labels"], batch["cu_seqlens"]
    assert ids.shape == labels.shape == (1, 640)
    assert (ids.dtype, labels.dtype, boundaries.dtype) == (torch.int64, torch.int64, torch.int32)
    tokens = ids[0].tolist()
    expected = {0, 640, *range(0, 640, length), *(i + 1 for i, token in enumerate(tokens) if token == 256)}
    assert boundaries.tolist() == sorted(expected)
    for i, token in enumerate(tokens):
        assert labels[0, i] == (-100 if i in expected else token)


def test_held_out_text_is_in_order_and_shares_nothing(corpus):
    training, held_out = corpus.split(FRACTION)
    text = PackedText(corpus, held_out, None, 16)
    documents = epoch_documents(read(text, 0, text.num_tokens))[:-1]
    assert "".join(documents).encode() == corpus.text(held_out)
    assert not set(documents) & {corpus.text(np.array([i])).decode() for i in training}
    assert sorted([*training, *held_out]) == list(range(40))
