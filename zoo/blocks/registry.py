"""Which kinds of mixer and feed-forward exist, and the classes behind each.

A package outside the zoo adds kinds through the entry-point group `zoo.blocks`: each entry point names a function
without arguments that calls `zoo.register`. It runs the first time a kind is looked up.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from zoo.blocks.base import FeedForward, FeedForwardConfig, Mixer, MixerConfig, Part
from zoo.schema import FieldError, check, expected, get_hints, join, nearest, shown

if TYPE_CHECKING:
    from zoo.config import ZooConfig

Role = Literal["mixer", "ffn"]
_BASES: dict[Role, tuple[type, type[Part]]] = {
    "mixer": (MixerConfig, Mixer),
    "ffn": (FeedForwardConfig, FeedForward),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind: its name in YAML, its role, its config dataclass and its module."""

    name: str
    role: Role
    config_class: type
    module_class: type[Part]


_kinds: dict[tuple[Role, str], Kind] = {}
_plugins_loaded = False


def register(kind: str, config_class: type, module_class: type[Part]) -> None:
    """Make `kind` available in YAML. The role follows from the base class of the config.

    Args:
        kind: the name under `kind:`.
        config_class: a dataclass derived from `MixerConfig` or `FeedForwardConfig`.
        module_class: likewise from `Mixer` or `FeedForward`; built as `module_class(config, model_config, layer_idx)`.

    Raises:
        TypeError: the classes are not such, or a field has a type that the schema cannot check.
        ValueError: the kind is taken by other classes.
    """
    role: Role | None = next((role for role, (base, _) in _BASES.items() if issubclass(config_class, base)), None)
    if role is None or not dataclasses.is_dataclass(config_class):
        raise TypeError(f"{config_class.__name__} must be a dataclass derived from MixerConfig or FeedForwardConfig")
    if not issubclass(module_class, _BASES[role][1]):
        raise TypeError(f"{module_class.__name__} must be derived from {_BASES[role][1].__name__}, as its config says")
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


@dataclasses.dataclass(frozen=True)
class _Part:
    """A mixer or feed-forward as a model file gives it: `{kind: ..., ...}`."""

    role: ClassVar[Role]
    kind: str
    config: Any

    @classmethod
    def read(cls, mapping: Any, path: str) -> Self:
        """From a mapping; null is `{kind: none}`.

        Raises:
            FieldError: no mapping, no kind or an unknown one, a field that is wrong, missing or unknown.
        """
        mapping = {"kind": "none"} if mapping is None else mapping
        if not isinstance(mapping, dict):
            raise FieldError(path, f"must be a mapping with a kind, got {shown(mapping)}")
        if "kind" not in mapping:
            raise FieldError(join(path, "kind"), "is missing; `zoo describe --kinds` lists them")
        try:
            kind = kind_of(cls.role, mapping["kind"])
        except FieldError as error:
            raise error.within(path) from None
        fields = {key: value for key, value in mapping.items() if key != "kind"}
        return cls(kind.name, check(kind.config_class, fields, path))

    def resolve(self, model: ZooConfig, path: str) -> Self:
        """A copy whose config is resolved; its mistakes are reported below `path`."""
        try:
            return dataclasses.replace(self, config=self.config.resolve(model))
        except FieldError as error:
            raise error.within(path) from None

    def __str__(self) -> str:
        """Its kind, with those of the parts it is made of: `parallel(mamba2, attention)`."""
        lists = [value for value in vars(self.config).values() if isinstance(value, list)]
        inner = [str(each) for values in lists for each in values if isinstance(each, _Part)]
        return f"{self.kind}({', '.join(inner)})" if inner else self.kind

    def build(self, model: ZooConfig, layer_idx: int) -> Any:
        """The module."""
        return kind_of(self.role, self.kind).module_class(self.config, model, layer_idx)


@dataclasses.dataclass(frozen=True)
class MixerPart(_Part):
    """A mixer: the name of its kind, and its config."""

    role = "mixer"
    config: MixerConfig


@dataclasses.dataclass(frozen=True)
class FeedForwardPart(_Part):
    """A feed-forward: the name of its kind, and its config."""

    role = "ffn"
    config: FeedForwardConfig


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
