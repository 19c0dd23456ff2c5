"""Where text comes from: files, folders, globs, the standard library's own sources, or a Hugging Face data set.

A source yields documents. One document is one `str`; nothing in it is changed (no newline translation, no stripping),
and its bytes are UTF-8 everywhere, so that generated text, tokenizers of the Hub and bits per byte agree.

    path/to/text.txt      one file is one long text: cut into documents (see `cut`)
    path/to/folder        every file below it that is not hidden, one document each
    path/**/*.txt         every file that matches, one document each
    python-stdlib         the .py files of the running interpreter's standard library, tests included, one document each
    hf:org/name           a Hugging Face data set, streamed, one row each; hf:org/name?config=en&split=train&field=text
                          (a local folder of .jsonl or .parquet files may stand for org/name)
"""

import glob
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from zoo.data.errors import DataError

STDLIB = "python-stdlib"
HUB_PREFIX = "hf:"


class Source(Protocol):
    """Documents that can be read any number of times, always in the same order.

    name: what the user wrote. identity: JSON-able; differs whenever the text may differ. num_bytes: the size of the
    text, 0 where it is not known before reading. skipped: files left out by the last reading because they are not
    UTF-8.
    """

    name: str
    identity: Any
    num_bytes: int
    skipped: int

    def __iter__(self) -> Iterator[str]: ...


def cut(text: str) -> list[str]:
    """Cuts one long text into documents; joined, they are the text again.

    A document ends at the first blank line after 1/256 of the text, but not before 2,048 and not after 65,536
    characters; if there is none within four times that, at a line's end; if there is none either, anywhere.
    """
    shortest = min(max(len(text) // 256, 2048), 65536)
    longest = 4 * shortest
    pattern = rf".{{{shortest},{longest}}}?\n\s*\n|.{{{shortest},{longest}}}\n|.{{1,{longest}}}"
    return re.findall(pattern, text, re.DOTALL)


def _fingerprint(files: list[Path]) -> list[tuple[str, int, int]]:
    stats = [path.stat() for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)]


class Files:
    """Text files. Those in `whole` are one document each; those in `long` are cut."""

    def __init__(self, name: str, whole: list[Path], long: list[Path], skip_undecodable: bool = False) -> None:
        self.name = name
        self.skipped = 0
        self._files = [(path, False) for path in whole] + [(path, True) for path in long]
        self._skip_undecodable = skip_undecodable
        self.identity = [_fingerprint(whole), _fingerprint(long)]
        self.num_bytes = sum(size for files in self.identity for _, size, _ in files)

    def __iter__(self) -> Iterator[str]:
        self.skipped = 0
        for path, is_long in self._files:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                if self._skip_undecodable:
                    self.skipped += 1
                    continue
                raise DataError(
                    f"{path}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8 text; convert "
                    "the file (iconv -f latin1 -t utf-8) or leave it out with a glob"
                ) from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
            yield from cut(text) if is_long else [text]


class HubDataset:
    """One split of a Hugging Face data set, streamed: nothing but the tokens is kept on disk."""

    num_bytes = 0
    skipped = 0

    def __init__(self, name: str) -> None:
        path, _, query = name.removeprefix(HUB_PREFIX).partition("?")
        options = dict(parse_qsl(query))
        unknown = sorted(options.keys() - {"config", "split", "field"})
        if not path or unknown:
            reason = f"unknown option {unknown[0]}" if unknown else "no id"
            raise DataError(f"data.source: {name}: {reason}; write hf:org/name?config=NAME&split=train&field=text")
        self.name = name
        # A local folder may change under its name.
        self.identity = [name, _fingerprint(_visible_files(Path(path)))]
        self._path = path
        self._config = options.get("config")
        self._split = options.get("split", "train")
        self._field = options.get("field", "text")

    def __iter__(self) -> Iterator[str]:
        import datasets

        try:
            rows = datasets.load_dataset(self._path, self._config, split=self._split, streaming=True)
            for number, row in enumerate(rows):
                text = row.get(self._field)
                if not isinstance(text, str):
                    raise DataError(
                        f"data.source: {self.name}: row {number} has no text in field {self._field!r}; "
                        f"its fields are {', '.join(row)}; write ?field=NAME"
                    )
                yield text
        except DataError:
            raise
        except Exception as error:  # load_dataset raises whatever its readers and the network raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"data.source: {self.name}: the data set cannot be read ({reason}); check the id, ?config=, "
                "?split= and the network"
            ) from error


class _Chain:
    """Several sources, one after another."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self.name = ", ".join(source.name for source in sources)
        self.identity = [source.identity for source in sources]
        known = [source.num_bytes for source in sources]
        self.num_bytes = sum(known) if all(known) else 0

    @property
    def skipped(self) -> int:
        return sum(source.skipped for source in self._sources)

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            yield from source


def _visible_files(folder: Path, without: tuple[str, ...] = ()) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _standard_library() -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    found = _visible_files(root, without=("site-packages", "dist-packages", "__pycache__"))
    files = [path for path in found if path.suffix == ".py"]
    # Some test files are deliberately not UTF-8.
    return Files(STDLIB, whole=files, long=[], skip_undecodable=True)


def _open_one(name: str) -> Source:
    if name == STDLIB:
        return _standard_library()
    if name.startswith(HUB_PREFIX):
        return HubDataset(name)
    path = Path(name).expanduser()
    if path.is_file():
        return Files(name, whole=[], long=[path.resolve()])
    if path.is_dir():
        files = _visible_files(path.resolve())
        if not files:
            raise DataError(f"data.source: {name}: the folder holds no files; name a folder with text files")
        return Files(name, whole=files, long=[])
    if glob.has_magic(name):
        files = sorted(Path(match).resolve() for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if not files:
            raise DataError(f"data.source: {name}: no file matches this pattern; check it with ls (from {Path.cwd()})")
        return Files(name, whole=files, long=[])
    raise DataError(
        f"data.source: {name}: no such file or folder (from {Path.cwd()}); give a file, a folder, a glob, {STDLIB} or "
        "hf:org/name"
    )


def open_source(names: str | Iterable[str]) -> Source:
    """Opens one source or several in a row (see the top of this file). Reads no text yet.

    Raises DataError for a missing file or folder, a pattern without a match, or a data set id that is not written
    right.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError(f"data.source: an empty list; give a file, a folder, a glob, {STDLIB} or hf:org/name")
    return _Chain([_open_one(name) for name in names])
