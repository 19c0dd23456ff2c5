"""Reads YAML from people one does not know: plain data only, within limits, every refusal one line.

No tags, no duplicate keys, one document, at most 1 MB, aliases only up to 1,000 expanded nodes, finite numbers.
`1e-5` is a number here, as everyone who writes it means (YAML 1.1 alone would call it a text).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_ALIASED_NODES = 1_000
MAX_DEPTH = 100


class YamlError(ValueError):
    """What is wrong with the text, and on which line."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        # Only a tag that was written out stands in the event; the ones that follow from the text come later.
        if getattr(event, "tag", None) is not None:
            raise YamlError(
                f"line {event.start_mark.line + 1}: {event.tag!r} is a tag; remove it, a file holds plain data"
            )
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
# YAML 1.1 reads 010 as 8 and 1:30 as 90, which nobody who writes a model file means.
_SURPRISING = re.compile(r"[-+]?(0[0-7_]+|.*:.*)")
_NUMBER_TAGS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def _cut(text: str) -> str:
    """`text` as an error message can hold it: one short line."""
    return text if text.isprintable() and len(text) <= 60 else repr(text[:57]) + "..."


def load_file(path: Path) -> Any:
    """The data in the file.

    Raises:
        YamlError: missing, unreadable, too large, not UTF-8, or not plain YAML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise YamlError("no such file; check the path") from None
    except IsADirectoryError:
        raise YamlError("is a folder; give a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise YamlError(f"cannot be read ({reason}); check its name and permissions") from None
    if len(data) > MAX_BYTES:
        raise YamlError(f"is larger than {MAX_BYTES} bytes; give a YAML file of a few thousand")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise YamlError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return load_text(text)


def load_text(text: str) -> Any:
    """The data in `text`.

    Raises:
        YamlError: as load_file.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise YamlError(f"character {error.character:#x} at position {error.position} is no text; remove it") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, loader)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        if error.problem == "but found another document":
            raise YamlError(f"line {mark.line + 1}: a second document starts; keep one document in a file") from None
        raise YamlError(f"{place}{error.problem or error.context}; this is not valid YAML") from None
    except yaml.YAMLError as error:
        raise YamlError(f"{' '.join(str(error).split())}; this is not valid YAML") from None
    except RecursionError:
        raise YamlError(f"nests deeper than {MAX_DEPTH} levels; flatten it") from None
    except YamlError:
        raise
    except (ValueError, OverflowError):  # an escape beyond Unicode, a version of thousands of digits
        raise YamlError(
            f"line {loader.get_mark().line + 1}: a number is out of range; this is not valid YAML"
        ) from None
    finally:
        loader.dispose()


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuse what `construct_document` would do or accept in silence."""
    expanded = 0
    on_path: set[int] = set()
    seen: set[int] = set()

    def visit(node: yaml.Node, depth: int) -> None:
        nonlocal expanded
        line = f"line {node.start_mark.line + 1}"
        if id(node) in on_path:
            raise YamlError(f"{line}: an alias contains itself; write the value out")
        expanded += id(node) in seen
        seen.add(id(node))
        if expanded > MAX_ALIASED_NODES:
            raise YamlError(f"{line}: aliases expand to more than {MAX_ALIASED_NODES} nodes; write the values out")
        if depth > MAX_DEPTH:
            raise YamlError(f"{line}: nests deeper than {MAX_DEPTH} levels; flatten it")
        if node.tag not in _PLAIN_TAGS:
            # A date, or one of YAML 1.1's signs `=` and `<<`.
            raise YamlError(f"{line}: {_cut(node.value)} is neither a text nor a number; put quotes around it")
        on_path.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                place = key.start_mark.line + 1
                if key.tag == "tag:yaml.org,2002:merge":
                    raise YamlError(
                        f"line {place}: merge keys (<<) are not allowed; write the fields out or use defaults"
                    )
                if not isinstance(key, yaml.ScalarNode):
                    raise YamlError(f"line {place}: a key must be a name, not a list or a mapping; write a name")
                if key.tag != "tag:yaml.org,2002:str":
                    raise YamlError(f"line {place}: key {_cut(key.value)} is not a text; put quotes around it")
                if key.value in keys:
                    first = keys[key.value]
                    raise YamlError(
                        f"line {place}: key {_cut(key.value)!r} stands twice (first on line {first}); remove one"
                    )
                keys[key.value] = place
                visit(key, depth + 1)
                visit(value, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                visit(entry, depth + 1)
        elif node.tag in _NUMBER_TAGS:
            try:
                value = loader.construct_object(node)
                if _SURPRISING.fullmatch(node.value):
                    raise ValueError
            except ValueError:  # `0x_`, or more than 4,300 digits
                raise YamlError(f"{line}: {_cut(node.value)} is not a plain decimal number; write one") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise YamlError(f"{line}: {_cut(node.value)} is not a finite number; write one")
        on_path.discard(id(node))

    visit(root, 0)
