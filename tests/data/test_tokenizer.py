import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zoo.data import DataError, bytes_per_token, load_tokenizer

BYTES = load_tokenizer("bytes")
DOCUMENTS = [f"def function_{i}(value):\n    return value * {i}  # número {i}\n" for i in range(400)]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_byte_ids_are_byte_values():
    assert (BYTES.eos_token_id, BYTES.pad_token_id, len(BYTES)) == (256, 257, 258)
    assert bytes_per_token(BYTES).tolist() == [1] * 256 + [0, 0]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    assert ids(BYTES, text) == list(text.encode())
    assert BYTES.decode(ids(BYTES, text)) == text


def test_special_tokens_written_in_a_text_stay_text():
    for text in ["<eos>", "a <pad> b<eos>", "\ufeff \r\n\t  é\u0301 <unk>"]:
        assert BYTES.decode(ids(BYTES, text)) == text
        assert ids(BYTES, text) == list(text.encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257)))
def test_decode_of_any_ids_never_raises(tokens):
    assert isinstance(BYTES.decode(tokens), str)
    assert isinstance(BYTES.decode(tokens, skip_special_tokens=True), str)


def test_saved_folder_loads_without_this_project(tmp_path):
    text = "naïve <eos>\n\t☃ end  "
    load_tokenizer("bytes").save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "i = t(sys.argv[2])['input_ids']; assert i == list(sys.argv[2].encode()); assert t.decode(i) == sys.argv[2];"
        "assert (t.eos_token_id, t.pad_token_id) == (256, 257);"
        "assert not any(name.startswith('zoo') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), text], check=True, timeout=120)
    assert ids(load_tokenizer(str(tmp_path)), text) == list(text.encode())


def test_trained_bpe_is_exact_and_deterministic(tmp_path):
    first, second = (load_tokenizer("bpe:300", iter(DOCUMENTS)) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    assert first.eos_token and first.pad_token
    lengths = bytes_per_token(first)
    for text in [*DOCUMENTS[:5], "日本語 <eos> \r\n  x", ""]:
        tokens = ids(first, text)
        assert first.decode(tokens) == text
        assert lengths[torch.tensor(tokens, dtype=torch.int64)].sum() == len(text.encode())
    assert len(ids(first, DOCUMENTS[7])) < 0.7 * len(DOCUMENTS[7])
    first.save_pretrained(tmp_path)
    assert ids(AutoTokenizer.from_pretrained(tmp_path), DOCUMENTS[3] + "<eos>") == ids(first, DOCUMENTS[3] + "<eos>")


def test_bytes_per_token_of_a_sentencepiece_style_tokenizer(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{b:02X}>": b + 2 for b in range(256)}}
    vocabulary |= {"▁": 258, "é": 259, "▁cat": 260}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == "</s>"  # it had none
    lengths = bytes_per_token(tokenizer)
    assert lengths[[0, 1, 2, 258, 259, 260]].tolist() == [0, 0, 1, 1, 2, 4]
    text = "é ☃"
    assert lengths[torch.tensor(ids(tokenizer, text))].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bpe:many", "write bpe:N"),
        ("bpe:257", "at least 258"),
        ("bpe:5000", "yields"),
        ("/nowhere/tokenizer", "cannot be loaded"),
    ],
)
def test_errors_are_one_line(spec, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        load_tokenizer(spec, DOCUMENTS)
    assert expected in str(caught.value) and spec in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no eos_token"):
        load_tokenizer(str(tmp_path))
