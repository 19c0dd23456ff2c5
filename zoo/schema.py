"""Turns a plain mapping (from YAML, JSON or the command line) into a typed dataclass, or names the field that is wrong.

The dataclass is the schema: its annotations give types, ranges (`Annotated[int, Ge(1)]`) and choices (`Literal`).
Values are checked, never converted: a number in quotes stays a mistake, except that a whole number will do for a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

Size = Annotated[int, Ge(1), Le(2**31 - 1)]
"""A dimension or a count: at least 1."""
Count = Annotated[int, Ge(0), Le(2**31 - 1)]
"""A count that may be 0."""
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]


class DataclassInstance(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=DataclassInstance)

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_BOUNDS: dict[type, tuple[str, str]] = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}


class FieldError(ValueError):
    """A mistake at one field: `path` is its dotted path, `problem` says what is wrong and what would be right."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem

    def within(self, parent: str) -> FieldError:
        """The same mistake seen from `parent`."""
        return FieldError(join(parent, self.path), self.problem)


def join(parent: str, key: object) -> str:
    """`parent.key`, without the dot where either is empty."""
    text = key if isinstance(key, str) and key.isprintable() and len(key) <= 200 else shown(key)
    return ".".join(part for part in (parent, text) if part)


def nearest(key: object, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(key if isinstance(key, str) else shown(key), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "remove it, there are no keys here"


def expected(annotation: Any) -> str:
    """An annotation in words: `a whole number >= 1`.

    Raises:
        TypeError: check() has no rule for it.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(bound, name)}"
            for bound in arguments[1:]
            for kind, (name, sign) in _BOUNDS.items()
            if isinstance(bound, kind) and getattr(bound, name) != 2**31 - 1
        ]
        return " ".join([expected(arguments[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(expected(a) for a in arguments if a is not type(None)) + (
            " or null" if type(None) in arguments else ""
        )
    if origin is list:
        entry = expected(arguments[0])
        return f"a list, each entry {f'({entry})' if ' or ' in entry else entry}"
    if dataclasses.is_dataclass(annotation):
        return "a mapping"
    if annotation not in _NAMES:
        raise TypeError(f"{annotation} cannot be checked; use {', '.join(t.__name__ for t in _NAMES)} or a dataclass")
    return _NAMES[annotation]


def check(annotation: Any, value: Any, path: str) -> Any:
    """`value` as `annotation` wants it (mappings become dataclasses).

    Raises:
        FieldError: wrong type, out of range, not finite, an unknown or missing key.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    wrong = FieldError(path, f"must be {expected(annotation)}, got {shown(value)}")
    if origin is Annotated:
        checked = check(arguments[0], value, path)
        for bound in arguments[1:]:
            name, sign = _BOUNDS[type(bound)]
            limit = getattr(bound, name)
            if not {">=": checked >= limit, ">": checked > limit, "<=": checked <= limit, "<": checked < limit}[sign]:
                if limit == 2**31 - 1:
                    raise FieldError(path, f"must be {sign} {limit}, got {shown(value)}")
                raise wrong
        return checked
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        hint = difflib.get_close_matches(value if isinstance(value, str) else shown(value), map(str, arguments), n=1)
        raise FieldError(path, wrong.problem + (f"; did you mean {hint[0]!r}?" if hint else ""))
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in arguments:
                return None
            raise wrong
        members = [a for a in arguments if a is not type(None)]
        if isinstance(value, Mapping):  # so that a mistake inside it is named
            members = [member for member in members if dataclasses.is_dataclass(member)] or members
        if isinstance(value, list | tuple):  # likewise
            members = [member for member in members if get_origin(member) is list] or members
        if len(members) == 1:
            return check(members[0], value, path)
        for member in members:
            try:
                return check(member, value, path)
            except FieldError:
                continue
        raise wrong
    if origin is list:
        if not isinstance(value, list | tuple):
            raise wrong
        return [check(arguments[0], entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        read = getattr(annotation, "read", None)  # where the fields depend on the mapping's kind
        return read(value, path) if read else from_mapping(annotation, value, path)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        quoted = annotation in (int, float) and isinstance(value, str) and _NUMBER.fullmatch(value)
        raise FieldError(path, f"{wrong.problem}; remove the quotes") if quoted else wrong
    if annotation is float and not math.isfinite(value):
        raise FieldError(path, f"must be a finite number, got {value}")
    return value


def from_mapping(cls: type[T], mapping: Any, path: str) -> T:
    """Build the dataclass `cls` from `mapping`, checking every field.

    Raises:
        FieldError: with the dotted path of the first field that is wrong.
    """
    if not isinstance(mapping, Mapping):
        raise FieldError(path, f"must be a mapping, got {shown(mapping)}")
    hints = get_hints(cls)
    for key in mapping:
        if key not in hints:
            raise FieldError(join(path, key), f"unknown key; {nearest(key, hints)}")
    values = {}
    for field in dataclasses.fields(cls):
        name = field.name
        if name in mapping:
            values[name] = check(hints[name], mapping[name], join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FieldError(join(path, name), f"is missing; give {expected(hints[name])}")
    return cls(**values)


@functools.cache
def get_hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation, in the order of the fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def shown(value: object) -> str:
    """A value as an error message quotes it: as YAML spells it, on one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print whole numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
