"""The tokenised corpus on disk: written once, then memory-mapped by every process that trains on it.

<cache_dir>/<key>/
    tokens.bin       every document's tokens, eos after each; uint16, or uint32 for vocabularies beyond 65,536
    documents.npz    offsets int64 [n + 1] (in tokens), byte_lengths int64 [n] (of UTF-8 text), hashes uint64 [n]
    tokenizer.json   only for bpe:N, which is trained on this corpus
    meta.json        sizes, checksum, source, tokenizer

`key` is a hash of the source (files with sizes and modification times, or the data set's id) and the tokenizer. The
folder is written under another name and renamed when it is complete and on disk, under a lock that the operating
system drops when its holder dies; so readers see a whole cache or none, and a killed builder leaves nothing but a
temporary folder, which the next builder removes.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from zoo.data.errors import DataError
from zoo.data.sources import Source
from zoo.data.tokenizer import bpe_size, bytes_per_token, load_tokenizer, wrap

FORMAT = 1  # part of the key: a change of the layout makes new caches
BATCH_BYTES = 4 << 20  # text given to the tokenizer at once, so that it can use all cores


def held_out_documents(hashes: np.ndarray, byte_lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are kept from training: bool [n].

    Those with the smallest hashes of their content, until they hold `fraction` of the bytes; at least one. Equal
    documents have equal hashes and stay together, so no held-out document has a copy in training.

    Args:
        hashes: uint64 [n]. byte_lengths: int64 [n]. fraction: above 0, below 1.
    """
    order = np.argsort(hashes, kind="stable")
    held = np.cumsum(byte_lengths[order])
    last = order[np.searchsorted(held, fraction * held[-1])]
    return hashes <= hashes[last]


class TokenCache:
    """A complete cache folder, checked and memory-mapped.

    Raises OSError, ValueError or KeyError if a file is missing or damaged.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        arrays = np.load(folder / "documents.npz")
        self.offsets: np.ndarray = arrays["offsets"]
        self.byte_lengths: np.ndarray = arrays["byte_lengths"]
        self.hashes: np.ndarray = arrays["hashes"]
        self.tokens = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        if len(self.tokens) != self.offsets[-1] or zlib.crc32(self.tokens) != self.meta["crc32"]:
            raise ValueError(f"{folder}: damaged")
        if tokenizer is None:
            tokenizer = wrap(Tokenizer.from_str((folder / "tokenizer.json").read_text()))
        self.tokenizer = tokenizer

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its eos included: int64 [n]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Differs when the documents, their order or their tokens differ."""
        return _digest(self.hashes.tobytes() + self.offsets.tobytes() + str(self.meta["crc32"]).encode())

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the documents to train on and of those held out, int64, in the corpus's order."""
        held_out = held_out_documents(self.hashes, self.byte_lengths, fraction)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def text(self, documents: np.ndarray) -> bytes:
        """The documents' text without anything between them, from their tokens."""
        pieces = (self.tokens[self.offsets[i] : self.offsets[i + 1] - 1].tolist() for i in documents)
        return "".join(self.tokenizer.decode(piece) for piece in pieces).encode()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _documents(source: Source) -> Iterator[tuple[str, bytes]]:
    """The documents that are not empty, as text and as UTF-8."""
    for text in source:
        if text:
            try:
                yield text, text.encode("utf-8")
            except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry
                raise DataError(
                    f"data.source: {source.name}: character {error.start} of a document cannot be written as UTF-8; "
                    "remove the lone surrogate"
                ) from None


def _train_tokenizer(spec: str, source: Source, fraction: float) -> PreTrainedTokenizerFast:
    """A tokenizer for `bpe:N` that has not seen the held-out documents."""
    facts = [(_hash(encoded), len(encoded)) for _, encoded in _documents(source)]
    if not facts:
        raise _empty(source)
    hashes, byte_lengths = np.array(facts, dtype=np.uint64).T
    used = ~held_out_documents(hashes, byte_lengths.astype(np.int64), fraction)
    return load_tokenizer(spec, compress((text for text, _ in _documents(source)), used))


def _empty(source: Source) -> DataError:
    return DataError(f"data.source: {source.name}: the corpus is empty, it holds no text; give files with text in them")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer:
    """Writes tokens.bin document by document; counts what goes into documents.npz and meta.json."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.token_bytes = 0
        self.crc32 = 0
        self.lengths: list[int] = []
        self.byte_lengths: list[int] = []
        self.hashes: list[int] = []
        self._bytes_per_token = bytes_per_token(tokenizer).numpy()
        self.dtype = _dtype(len(self._bytes_per_token))
        self._eos = tokenizer.eos_token_id
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True  # "<eos>" in a document is text, not the end of it
        self._file = (folder / "tokens.bin").open("wb")

    def write(self, batch: list[tuple[str, bytes]]) -> None:
        encodings = self._backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (_, encoded), encoding in zip(batch, encodings, strict=True):
            tokens = np.array([*encoding.ids, self._eos], dtype=self.dtype)
            self._file.write(tokens)
            self.crc32 = zlib.crc32(tokens, self.crc32)
            self.token_bytes += int(self._bytes_per_token[tokens[:-1]].sum())
            self.lengths.append(len(tokens))
            self.byte_lengths.append(len(encoded))
            self.hashes.append(_hash(encoded))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _tokenise(source: Source, writer: _Writer) -> None:
    title = f"tokenising {source.name}"[:60]
    with tqdm(total=source.num_bytes or None, unit="B", unit_scale=True, desc=title) as progress:
        batch, size = [], 0
        for document in _documents(source):
            batch.append(document)
            size += len(document[1])
            if size >= BATCH_BYTES:
                writer.write(batch)
                progress.update(size)
                batch, size = [], 0
        writer.write(batch)
        progress.update(size)


def _build(folder: Path, source: Source, spec: str, tokenizer: PreTrainedTokenizerFast | None, fraction: float) -> None:
    """Writes a complete cache into the empty folder and makes sure that it is on disk."""
    trained = tokenizer is None
    if tokenizer is None:
        tokenizer = _train_tokenizer(spec, source, fraction)
    writer = _Writer(folder, tokenizer)
    try:
        _tokenise(source, writer)
    finally:
        writer.close()
    if not writer.lengths:
        raise _empty(source)

    offsets = np.concatenate([[0], np.cumsum(writer.lengths)])
    with (folder / "documents.npz").open("wb") as file:
        np.savez(
            file,
            offsets=offsets.astype(np.int64),
            byte_lengths=np.array(writer.byte_lengths, dtype=np.int64),
            hashes=np.array(writer.hashes, dtype=np.uint64),
        )
    if trained:
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    meta = {
        "source": source.name,
        "tokenizer": spec,
        "documents": len(writer.lengths),
        "bytes": sum(writer.byte_lengths),
        "token_bytes": writer.token_bytes,
        "tokens": int(offsets[-1]),
        "skipped_files": source.skipped,
        "dtype": writer.dtype.name,
        "crc32": writer.crc32,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    for path in [*folder.iterdir(), folder]:
        _sync(path)
    _report(meta)


def _report(meta: dict[str, Any]) -> None:
    """One line on what was read, and one more if the tokenizer does not keep every byte."""
    skipped = f"; skipped {meta['skipped_files']} files that are not UTF-8" if meta["skipped_files"] else ""
    sizes = f"{meta['documents']:,} documents, {meta['bytes']:,} bytes, {meta['tokens']:,} tokens"
    _say(f"{meta['source']}: {sizes}{skipped}")
    if meta["token_bytes"] != meta["bytes"]:
        _say(
            f"{meta['tokenizer']}: its tokens stand for {meta['token_bytes']:,} bytes, the text has {meta['bytes']:,}: "
            "the tokenizer changes the text, so its bits per byte are not comparable with another's"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _replace(folder: Path, complete: Path) -> None:
    """Puts the complete folder where nothing or a damaged cache stands."""
    if folder.exists():
        damaged = folder.with_suffix(".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        folder.rename(damaged)
        complete.rename(folder)
        shutil.rmtree(damaged)
    else:
        complete.rename(folder)
    _sync(folder.parent)


def _open(folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> TokenCache | None:
    """The cache in the folder, or None where there is none or it cannot be used."""
    if not folder.exists():
        return None
    try:
        return TokenCache(folder, tokenizer)
    except Exception as error:  # a damaged file can make json, zipfile, numpy and tokenizers raise almost anything
        _say(f"{folder}: unusable token cache ({' '.join(str(error).split())}); building it again")
        return None


def _disk_error(cache_dir: Path, source: Source, vocab_size: int, error: OSError) -> DataError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{cache_dir}: the token cache cannot be written ({error.strerror}); set data.cache_dir elsewhere"
        )
    needed = "more bytes than that for its token cache"
    if source.num_bytes:  # local files: at most one token per byte, an eos and three int64 per document
        size = _dtype(vocab_size).itemsize
        total = sum((len(encoded) + 1) * size + 24 for _, encoded in _documents(source))
        needed = f"up to {total:,} bytes for its token cache"
    return DataError(
        f"{cache_dir}: the disk is full, {shutil.disk_usage(cache_dir).free:,} bytes are free and {source.name} needs "
        f"{needed}; free space or set data.cache_dir elsewhere"
    )


def load_corpus(source: Source, tokenizer_spec: str, cache_dir: str | Path, validation_fraction: float) -> TokenCache:
    """The tokenised corpus, from its cache if there is a good one; otherwise tokenises it with a progress bar.

    Safe when several processes call it at once (one builds, the others wait) and when one is killed.

    Args:
        source: the documents (zoo.data.open_source).
        tokenizer_spec: as for zoo.data.load_tokenizer.
        cache_dir: where caches lie; made if missing.
        validation_fraction: the part of the text that a tokenizer `bpe:N` must not see.

    Raises DataError for text that is not UTF-8, an empty corpus, a tokenizer that cannot be loaded, a disk that is
    full.
    """
    trained_size = bpe_size(tokenizer_spec)
    if trained_size is not None:
        tokenizer, vocab_size, identity = None, trained_size, [tokenizer_spec, validation_fraction]
    else:
        tokenizer = load_tokenizer(tokenizer_spec)
        vocab_size, identity = len(tokenizer), [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]
    key = _digest(json.dumps([FORMAT, source.identity, identity]).encode())
    cache_dir = Path(cache_dir).expanduser().resolve()
    folder, temporary = cache_dir / key, cache_dir / f"{key}.tmp"

    cache = _open(folder, tokenizer)
    if cache is not None:
        return cache
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{key}.lock"):
            if _open(folder, tokenizer) is None:  # nobody built it while this process waited
                shutil.rmtree(temporary, ignore_errors=True)  # of a builder that was killed
                temporary.mkdir()
                try:
                    _build(temporary, source, tokenizer_spec, tokenizer, validation_fraction)
                    _replace(folder, temporary)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _disk_error(cache_dir, source, vocab_size, error) from error
    return TokenCache(folder, tokenizer)
