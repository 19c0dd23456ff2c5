"""Tokenizers: plain bytes (no download), a folder or Hub id, or a byte-level BPE trained on the corpus.

All are transformers fast tokenizers, so `save_pretrained` writes a folder that AutoTokenizer loads without this
project. Byte-level: each of the 256 bytes has its own printable character in the vocabulary (GPT-2, Radford et al.
2019, section 2.2), so any text can be written and no token is unknown.
"""

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from zoo.data.errors import DataError

EOS, PAD = "<eos>", "<pad>"
BPE_PREFIX = "bpe:"
BYTE_CHARACTERS: dict[int, str] = bytes_to_unicode()


def bpe_size(spec: str) -> int | None:
    """N of `bpe:N`, or None for any other spec. Raises DataError if N is not a number from 258 on."""
    if not spec.startswith(BPE_PREFIX):
        return None
    digits = spec.removeprefix(BPE_PREFIX)
    smallest = len(BYTE_CHARACTERS) + 2
    if not digits.isdecimal() or int(digits) < smallest:
        raise DataError(f"data.tokenizer: {spec}: write bpe:N with N at least {smallest} (256 bytes, {EOS} and {PAD})")
    return int(digits)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a byte-level one. "<eos>" written in a text stays text, or round trips would
    break."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)  # adds <eos> as 256 and <pad> as 257


def _train_bpe(size: int, documents: Iterable[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(BYTE_CHARACTERS.values()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if backend.get_vocab_size() < size:
        raise DataError(
            f"data.tokenizer: bpe:{size}: the corpus is too small, it yields {backend.get_vocab_size()} entries; "
            f"write bpe:{backend.get_vocab_size()} or give more text"
        )
    return wrap(backend)


def load_tokenizer(spec: str, documents: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Loads or trains a tokenizer; it always has eos_token and pad_token.

    Args:
        spec: "bytes" (ids 0 to 255 are the byte values, <eos> is 256, <pad> is 257), "bpe:N" (N entries, trained on
            `documents`; the same documents give the same tokenizer), a tokenizer folder, or a Hub id.
        documents: the training text, for "bpe:N" only.

    Raises DataError for a spec that cannot be loaded, a slow tokenizer, one without an end-of-sequence token, or a
    corpus too small for N entries.
    """
    if spec == "bytes":
        return _bytes_tokenizer()
    size = bpe_size(spec)
    if size is not None:
        if documents is None:
            raise DataError(f"data.tokenizer: {spec}: needs a corpus to be trained on; give its saved folder instead")
        return _train_bpe(size, documents)
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec)
    except Exception as error:  # what a broken folder, an unknown id or no network raise differs by version
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.tokenizer: {spec}: cannot be loaded ({reason}); give bytes, bpe:N, a tokenizer folder or a Hub id"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"data.tokenizer: {spec}: has no tokenizer.json (fast tokenizer); choose one that has")
    if tokenizer.eos_token is None:
        raise DataError(f"data.tokenizer: {spec}: has no eos_token; add one to its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """How many bytes of text each token stands for: int64 [vocabulary]; 0 for special tokens such as eos.

    Summed over a document's tokens it is the document's length in bytes, exactly for byte-level tokenizers, and for
    SentencePiece ones (U+2581 is a space, <0xAB> one byte) unless they normalise the text or put a space before it.
    """
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    characters = set(BYTE_CHARACTERS.values())
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    is_byte_level = '"ByteLevel"' in json.dumps(decoder)
    lengths = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif is_byte_level and characters.issuperset(token):
            lengths[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths
