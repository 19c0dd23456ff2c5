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
    pass


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


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
    except OSError as error:
        raise YamlError(f"cannot be read ({error.strerror}); check its permissions") from None
    if len(data) > MAX_BYTES:
        raise YamlError(f"is larger than {MAX_BYTES} bytes; a model file is a few kilobytes")
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
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, loader)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise YamlError(f"{place}{error.problem or error.context}; this is not valid YAML") from None
    except yaml.YAMLError as error:
        raise YamlError(f"{' '.join(str(error).split())}; this is not valid YAML") from None
    except RecursionError:
        raise YamlError(f"nests deeper than {MAX_DEPTH} levels; flatten it") from None
    except ValueError as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"{str(error).splitlines()[0]}; write a smaller number") from None
    finally:
        loader.dispose()


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuse what `construct_document` would do or accept in silence."""
    nodes, aliased, on_path = 0, False, set()
    seen: set[int] = set()

    def visit(node: yaml.Node, depth: int) -> None:
        nonlocal nodes, aliased
        nodes += 1
        line = f"line {node.start_mark.line + 1}"
        if id(node) in on_path:
            raise YamlError(f"{line}: an alias contains itself; write the value out")
        aliased = aliased or id(node) in seen
        seen.add(id(node))
        if aliased and nodes > MAX_ALIASED_NODES:
            raise YamlError(f"{line}: aliases expand to more than {MAX_ALIASED_NODES} nodes; write the values out")
        if depth > MAX_DEPTH:
            raise YamlError(f"{line}: nests deeper than {MAX_DEPTH} levels; flatten it")
        if node.tag not in _PLAIN_TAGS:
            raise YamlError(f"{line}: {node.tag!r} is not plain data; remove the tag, merge key or date")
        on_path.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                place = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    raise YamlError(f"line {place}: a key must be a name; put quotes around it")
                if key.value in keys:
                    raise YamlError(f"line {place}: key {key.value!r} stands twice (first on line {keys[key.value]})")
                keys[key.value] = place
                visit(key, depth + 1)
                visit(value, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                visit(entry, depth + 1)
        elif node.tag == "tag:yaml.org,2002:float":
            value = loader.construct_object(node)
            if not math.isfinite(value):
                raise YamlError(f"{line}: {node.value} is not a finite number; write one")
        on_path.discard(id(node))

    visit(root, 0)
