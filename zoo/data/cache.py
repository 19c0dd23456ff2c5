"""The tokenised corpus on disk: written once, then memory-mapped by every process that trains on it.

<cache_dir>/<key>/
    tokens.bin       every document's tokens, each document ended by eos; uint16, or uint32 for vocabularies beyond 65,536
    documents.npz    offsets int64 [n + 1] (in tokens), byte_lengths int64 [n] (of UTF-8 text), hashes uint64 [n]
    tokenizer.json   only for bpe:N, which is trained on this corpus
    meta.json        sizes, checksum, source, tokenizer

`key` is a hash of the source (files with sizes and modification times, or the data set's id) and the tokenizer. The folder is
written under another name and renamed when it is complete and on disk, under a lock that the operating system drops when its
holder dies; so readers see a whole cache or none, and a killed builder leaves nothing but a temporary folder, which the next
builder removes.
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

    Those with the smallest hashes of their content, until they hold `fraction` of the bytes; at least one. Equal documents
    have equal hashes and stay together, so no held-out document has a copy in training.

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
    facts = np.array([(_hash(encoded), len(encoded)) for _, encoded in _documents(source)], dtype=np.uint64).reshape(-1, 2)
    if not len(facts):
        raise _empty(source)
    used = ~held_out_documents(facts[:, 0], facts[:, 1].astype(np.int64), fraction)
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
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        self.lengths: list[int] = []
        self.byte_lengths: list[int] = []
        self.hashes: list[int] = []
        self.crc32 = 0
        self._file = (folder / "tokens.bin").open("wb")
        self._eos = tokenizer.eos_token_id
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True  # "<eos>" in a document is text, not the end of it

    def write(self, batch: list[tuple[str, bytes]]) -> None:
        encodings = self._backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (_, encoded), encoding in zip(batch, encodings, strict=True):
            data = np.array([*encoding.ids, self._eos], dtype=self.dtype).tobytes()
            self._file.write(data)
            self.crc32 = zlib.crc32(data, self.crc32)
            self.lengths.append(len(encoding.ids) + 1)
            self.byte_lengths.append(len(encoded))
            self.hashes.append(_hash(encoded))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _build(folder: Path, source: Source, spec: str, tokenizer: PreTrainedTokenizerFast | None, fraction: float) -> None:
    """Writes a complete cache into the empty folder and makes sure that it is on disk."""
    trained = tokenizer is None
    if tokenizer is None:
        tokenizer = _train_tokenizer(spec, source, fraction)
    writer = _Writer(folder, tokenizer)
    try:
        with tqdm(total=source.num_bytes or None, unit="B", unit_scale=True, desc=f"tokenising {source.name}"[:60]) as progress:
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
    finally:
        writer.close()
    if not writer.lengths:
        raise _empty(source)

    offsets = np.concatenate([[0], np.cumsum(writer.lengths)]).astype(np.int64)
    byte_lengths = np.array(writer.byte_lengths, dtype=np.int64)
    with (folder / "documents.npz").open("wb") as file:
        np.savez(file, offsets=offsets, byte_lengths=byte_lengths, hashes=np.array(writer.hashes, dtype=np.uint64))
    if trained:
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    meta = {
        "source": source.name,
        "tokenizer": spec,
        "documents": len(writer.lengths),
        "bytes": int(byte_lengths.sum()),
        "tokens": int(offsets[-1]),
        "skipped_files": source.skipped,
        "dtype": writer.dtype.name,
        "crc32": writer.crc32,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    for path in [*folder.iterdir(), folder]:
        _sync(path)
    _report(folder, meta, tokenizer)


def _report(folder: Path, meta: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """One line on what was read, and one more if the tokenizer does not keep every byte."""
    skipped = f"; skipped {meta['skipped_files']} files that are not UTF-8" if meta["skipped_files"] else ""
    print(
        f"{meta['source']}: {meta['documents']:,} documents, {meta['bytes']:,} bytes, {meta['tokens']:,} tokens{skipped}",
        file=sys.stderr,
    )
    counts = np.bincount(np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"), minlength=len(tokenizer))
    covered = int(counts @ bytes_per_token(tokenizer).numpy())
    if covered != meta["bytes"]:
        print(
            f"{meta['tokenizer']}: its tokens stand for {covered:,} bytes, the text has {meta['bytes']:,}: the tokenizer "
            "changes the text, so bits per byte are not comparable with other tokenizers'",
            file=sys.stderr,
        )


def _replace(folder: Path, complete: Path) -> None:
    """Puts the complete folder where nothing or a damaged cache stands."""
    if folder.exists():
        damaged = complete.with_suffix(".tmp-damaged")
        folder.rename(damaged)
        complete.rename(folder)
        shutil.rmtree(damaged)
    else:
        complete.rename(folder)
    _sync(folder.parent)


def _open(folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> TokenCache | None:
    """The cache in the folder, or None where there is none or it cannot be used."""
    try:
        return TokenCache(folder, tokenizer)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can make json, zipfile, numpy and tokenizers raise almost anything
        print(f"{folder}: unusable token cache ({' '.join(str(error).split())}); building it again", file=sys.stderr)
        return None


def _disk_error(cache_dir: Path, source: Source, written: int, error: OSError) -> DataError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{cache_dir}: the token cache cannot be written ({error.strerror}); set data.cache_dir elsewhere")
    # A token is at least one byte of text and takes at most 4 bytes here; a data set of unknown size needs more than was written.
    return DataError("")


def load_corpus(source: Source, tokenizer_spec: str, cache_dir: str | Path, validation_fraction: float) -> TokenCache:
    """The tokenised corpus, from its cache if there is a good one; otherwise tokenises it with a progress bar.

    Safe when several processes call it at once (one builds, the others wait) and when one is killed.

    Args:
        source: the documents (zoo.data.open_source).
        tokenizer_spec: as for zoo.data.load_tokenizer.
        cache_dir: where caches lie; made if missing.
        validation_fraction: the part of the text that a tokenizer `bpe:N` must not see.

    Raises DataError for text that is not UTF-8, an empty corpus, a tokenizer that cannot be loaded, a disk that is full.
    """
    is_trained = bpe_size(tokenizer_spec) is not None
    tokenizer = None if is_trained else load_tokenizer(tokenizer_spec)
    tokenizer_identity = [tokenizer_spec, validation_fraction] if tokenizer is None else [
        tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]  # fmt: skip
    key = _digest(json.dumps([FORMAT, source.identity, tokenizer_identity]).encode())
    cache_dir = Path(cache_dir).expanduser()
    folder, temporary = cache_dir / key, cache_dir / f"{key}.tmp"

    cache = _open(folder, tokenizer)
    if cache is not None:
        return cache
    ...
