"""Option values, checked by the schema of the model files, so that mistakes read alike everywhere."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from typing import Any

from zoo import yaml
from zoo.schema import FieldError, check, expected

SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


class Option:
    """A type for add_argument(): reads the text as YAML and checks it against an annotation."""

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation

    def __repr__(self) -> str:  # what --help prints
        return expected(self.annotation)

    def __call__(self, text: Any) -> Any:
        try:
            value = yaml.load_text(text) if isinstance(text, str) else text
        except yaml.YamlError:
            value = text
        try:
            return check(self.annotation, value, "")
        except FieldError as error:
            raise ArgumentTypeError(str(error)) from None


def file_name(text: Any) -> str:
    """The name of a file or folder. An empty one would be the current folder."""
    if not text:
        raise ArgumentTypeError("is empty; give a name")
    return str(text)


def length(text: Any) -> int:
    """A number of tokens: 4096, 4k, 128k, 1M. k and M are powers of 1,024, as context lengths are."""
    match = re.fullmatch(r"(\d{1,13})([kmg]?)", str(text).strip().lower(), re.ASCII)
    tokens = int(match[1]) * SUFFIXES[match[2]] if match else 0
    if not 1 <= tokens <= 2**40:
        raise ArgumentTypeError(f"must be a number of tokens such as 4096, 128k or 1M, at most 1024G, got {text!r}")
    return tokens


def byte_size(text: Any) -> int:
    """A size in bytes: 5GB, 200MB, 1.5GB. Powers of 1,000, as file sizes are."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?)b?", str(text).strip().lower(), re.ASCII)
    size = round(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else 0
    if not 1 <= size < 10**15:  # more digits than are read above
        raise ArgumentTypeError(f"must be a size such as 5GB or 200MB, got {text!r}")
    return size
