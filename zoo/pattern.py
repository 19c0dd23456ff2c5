"""The pattern grammar: the order of blocks, bottom to top.

    pattern = item {item}          items stand side by side, separated by spaces
    item    = unit ["*" number]    repeated that many times
    unit    = name | "(" pattern ")"

`(lightning*7 softmax)*10` is 80 layers. A YAML list of names is the same thing written out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_LAYERS = 10_000
MAX_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][\w.-]*)|(?P<number>\d+)|(?P<mark>[()*]))", re.ASCII)


class PatternError(ValueError):
    """A pattern that does not parse; the text shows the place with a caret."""

    def __init__(self, pattern: str, column: int, problem: str) -> None:
        # A long pattern is cut around the mistake, so that the caret stays on the screen.
        start = max(0, column - 60)
        shown = "".join(mark if mark.isprintable() else " " for mark in pattern[start : column + 20])
        super().__init__(f"{problem}\n  {shown}\n  {' ' * (column - start)}^")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def _tokens(pattern: str) -> list[_Token]:
    tokens, position = [], 0
    end = len(pattern.rstrip())
    while position < end:
        match = _TOKEN.match(pattern, position)
        if match is None or match.lastgroup is None:
            column = position + len(pattern[position:]) - len(pattern[position:].lstrip())
            raise PatternError(pattern, column, f"unexpected {pattern[column]!r}; use block names, *, ( and )")
        text = match[match.lastgroup]
        tokens.append(
            _Token(match.lastgroup if match.lastgroup != "mark" else text, text, match.start(match.lastgroup))
        )
        position = match.end()
    tokens.append(_Token("end", "", end))
    return tokens


def parse(pattern: str | Sequence[str]) -> list[str]:
    """The block names that `pattern` spells, one per layer.

    Raises:
        PatternError: it does not parse, is empty, repeats zero times, or has more than 10,000 layers.
    """
    if not isinstance(pattern, str):
        names = list(pattern)
        if not names:
            raise PatternError("[]", 1, "the pattern is empty; name at least one block")
        if len(names) > MAX_LAYERS:
            raise PatternError(f"[{names[0]}, ...]", 0, f"{len(names)} layers; at most {MAX_LAYERS} are allowed")
        return names
    tokens = _tokens(pattern)
    names, position = _sequence(pattern, tokens, 0, depth=0)
    if tokens[position].kind != "end":
        raise PatternError(pattern, tokens[position].column, f"unexpected {tokens[position].text!r}; remove it")
    return names


def _sequence(pattern: str, tokens: list[_Token], position: int, depth: int) -> tuple[list[str], int]:
    names: list[str] = []
    opening = position
    while tokens[position].kind in ("name", "("):
        token = tokens[position]
        if token.kind == "name":
            unit, position = [token.text], position + 1
        elif depth == MAX_DEPTH:
            raise PatternError(pattern, token.column, f"parentheses nest deeper than {MAX_DEPTH}")
        else:
            unit, position = _sequence(pattern, tokens, position + 1, depth + 1)
            if tokens[position].kind != ")":
                raise PatternError(pattern, token.column, "this parenthesis is never closed")
            position += 1
        if tokens[position].kind == "*":
            number = tokens[position + 1]
            if number.kind != "number" or len(number.text) > 9 or int(number.text) < 1:
                got = "nothing" if number.kind == "end" else repr(number.text)
                raise PatternError(pattern, number.column, f"'*' needs a number from 1, got {got}")
            if len(unit) * int(number.text) > MAX_LAYERS:
                raise PatternError(pattern, number.column, f"more than {MAX_LAYERS} layers")
            unit, position = unit * int(number.text), position + 2
        names += unit
        if len(names) > MAX_LAYERS:
            raise PatternError(pattern, token.column, f"more than {MAX_LAYERS} layers")
    if position == opening:
        column = tokens[position].column
        before = "the end" if tokens[position].kind == "end" else repr(tokens[position].text)
        raise PatternError(pattern, column, f"a block name is missing before {before}")
    return names, position


def spell(names: Sequence[str]) -> str:
    """A pattern for `names`: what repeats throughout is counted, and so is one name after itself."""
    period = shortest_period(names)
    runs = [(name, len(list(group))) for name, group in groupby(names[:period])]
    once = " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)
    repeats = len(names) // period
    if repeats == 1:
        return once
    return f"{once}*{repeats}" if period == 1 else f"({once})*{repeats}"


def shortest_period(names: Sequence[str]) -> int:
    """The smallest p such that the first p names, repeated, are all of them."""
    # Knuth, Morris and Pratt's failure function: the longest prefix that is also a suffix gives the period.
    fail = [0] * len(names)
    for i in range(1, len(names)):
        k = fail[i - 1]
        while k and names[i] != names[k]:
            k = fail[k - 1]
        fail[i] = k + (names[i] == names[k])
    period = len(names) - fail[-1]
    return period if len(names) % period == 0 else len(names)
