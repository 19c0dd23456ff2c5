"""Which kinds of mixer and feed-forward exist, and the classes behind each.

A package outside the zoo adds kinds through the entry-point group `zoo.blocks`: each entry point names a function
without arguments that calls `zoo.register`. It runs the first time a kind is looked up.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Literal

from torch import nn

from zoo.blocks.base import FeedForwardConfig, MixerConfig
from zoo.schema import FieldError, expected, get_hints, nearest, shown

Role = Literal["mixer", "ffn"]
_BASES: dict[Role, type] = {"mixer": MixerConfig, "ffn": FeedForwardConfig}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind: its name in YAML, its role, its config dataclass and its module."""

    name: str
    role: Role
    config_class: type
    module_class: type[nn.Module]


_kinds: dict[tuple[Role, str], Kind] = {}
_plugins_loaded = False


def register(kind: str, config_class: type, module_class: type[nn.Module]) -> None:
    """Make `kind` available in YAML. The role follows from the base class of the config.

    Args:
        kind: the name under `kind:`.
        config_class: a dataclass derived from `MixerConfig` or `FeedForwardConfig`.
        module_class: built as `module_class(config, model_config, layer_idx)`.

    Raises:
        TypeError: config_class is not such a dataclass, or a field has a type that the schema cannot check.
        ValueError: the kind is taken by other classes.
    """
    role: Role | None = next((role for role, base in _BASES.items() if issubclass(config_class, base)), None)
    if role is None or not dataclasses.is_dataclass(config_class):
        raise TypeError(f"{config_class.__name__} must be a dataclass derived from MixerConfig or FeedForwardConfig")
    for hint in get_hints(config_class).values():
        expected(hint)
    entry = Kind(kind, role, config_class, module_class)
    if _kinds.setdefault((role, kind), entry) != entry:
        raise ValueError(f"{role} kind {kind!r} is taken by {_kinds[role, kind].module_class.__qualname__}")


def kinds() -> list[Kind]:
    """Every kind, mixers first, each role in alphabetical order."""
    _load_plugins()
    return [_kinds[key] for key in sorted(_kinds, key=lambda key: (key[0] != "mixer", key[1]))]


def kind_of(role: Role, name: object) -> Kind:
    """The kind called `name`.

    Raises:
        FieldError: at `kind`, with the nearest known one.
    """
    _load_plugins()
    if isinstance(name, str) and (role, name) in _kinds:
        return _kinds[role, name]
    raise FieldError(
        "kind", f"unknown {role} {shown(name)}; {nearest(name, [k.name for k in kinds() if k.role == role])}"
    )


def _load_plugins() -> None:
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True  # before the calls: a plugin may itself look a kind up
        for entry_point in entry_points(group="zoo.blocks"):
            try:
                entry_point.load()()
            except Exception as error:  # whatever somebody else's code raises
                _plugins_loaded = False
                reason = " ".join(str(error).split())
                problem = f"the plugin {entry_point.value} cannot be loaded ({reason}); fix or uninstall it"
                raise FieldError("kind", problem) from error
