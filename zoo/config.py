"""The model file: one schema, one loader. YAML, the command line and config.json on the Hub are the same fields.

`load_config` reads and checks; `ZooConfig` is the checked result, a transformers configuration whose `layers` are the
pattern written out, every block with its typed configs.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from zoo import yaml
from zoo.blocks import kind_of
from zoo.blocks.norm import NormConfig
from zoo.blocks.registry import FeedForwardPart, MixerPart
from zoo.blocks.residual import Residual, residual_from_mapping
from zoo.blocks.shared import SharedConfig, shared_from_value
from zoo.pattern import PatternError, parse
from zoo.schema import (
    Count,
    FieldError,
    Positive,
    Size,
    check,
    from_mapping,
    get_hints,
    join,
    nearest,
    shown,
)


class ConfigError(ValueError):
    """A mistake in a model file: one line with the file, the field, the value and the remedy."""


@dataclass(frozen=True)
class Layer:
    """One layer: the block that the pattern names there, with everything resolved."""

    name: str
    mixer: MixerPart
    ffn: FeedForwardPart
    norm: NormConfig
    residual: Residual
    shared: SharedConfig | None = None


@dataclass(frozen=True, kw_only=True)
class _ModelFile:
    """The top level of a model file.

    vocab_size           tokens the embedding knows.
    hidden_size          width of the residual stream.
    blocks               name -> {mixer, ffn, norm, residual, shared}.
    pattern              the order of blocks, bottom to top.
    defaults             merged under every block.
    residual             how sublayers join the stream: {kind: pre}.
    norm                 {kind: rms, eps: 1e-6, zero_centered: false}.
    tie_word_embeddings  whether the output head is the embedding.
    embedding_scale      multiplies embeddings (Gemma: hidden_size ** 0.5).
    logit_scale          multiplies what the output head reads (Granite, Falcon-H1).
    logit_softcap        bounds logits: softcap * tanh(logits / softcap) (Gemma 2).
    initializer_range    standard deviation of initial weights.
    max_position_embeddings  the length it was trained for; limits nothing here, and goes along to other software.
    """

    vocab_size: Size
    hidden_size: Size
    blocks: dict
    pattern: str | list[str]
    defaults: dict | None = None
    residual: dict | None = None
    norm: NormConfig | None = None
    tie_word_embeddings: bool = False
    embedding_scale: Positive = 1.0
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    initializer_range: Positive = 0.02
    max_position_embeddings: Size | None = None
    bos_token_id: Count | None = None
    eos_token_id: Count | list[Count] | None = None
    pad_token_id: Count | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(_ModelFile))
_STRUCTURE = ("hidden_size", "blocks", "pattern", "defaults", "residual", "norm", "initializer_range")
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(_ModelFile)
    if field.default not in (dataclasses.MISSING, None)
}
_BLOCK_FIELDS = ("mixer", "ffn", "norm", "residual", "shared")


class ZooConfig(PreTrainedConfig):
    """A hybrid model, as a transformers configuration. The fields are those of a model file (DESIGN section 3).

    Raises:
        ConfigError: a field is wrong, missing or unknown.
    """

    model_type: ClassVar[str] = "zoo"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: Any = None
    hidden_size: Any = None
    blocks: Any = None
    pattern: Any = None
    defaults: Any = None
    residual: Any = None
    norm: Any = None
    tie_word_embeddings: Any = False
    embedding_scale: Any = 1.0
    logit_scale: Any = 1.0
    logit_softcap: Any = None
    initializer_range: Any = 0.02
    max_position_embeddings: Any = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if not key.startswith("_") and key not in _TRANSFORMERS_KEYS:
                raise ConfigError(f"{key}: unknown key; {nearest(key, FIELDS)}")
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None:  # null is the same as not given
                setattr(self, name, default)
        mapping = self.to_mapping()
        super().__post_init__(**kwargs)
        try:
            self._layers, self._norm = _resolve(mapping, self)
        except FieldError as error:
            raise ConfigError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        # from_pretrained(folder, pattern=...) sets fields after the check; `layers` would then say something else.
        if name in FIELDS and "_layers" in self.__dict__ and value != getattr(self, name):
            if name in _STRUCTURE:
                raise ConfigError(f"{name}: cannot be changed in a built configuration; override it in load_config")
            try:
                check(get_hints(_ModelFile)[name], value, name)
            except FieldError as error:
                raise ConfigError(str(error)) from None
        super().__setattr__(name, value)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The pattern written out, bottom to top."""
        return self._layers

    @property
    def num_hidden_layers(self) -> int:
        return self._num_layers

    @property
    def norm_config(self) -> NormConfig:
        """The norm of the model's own places (the final norm, norms inside mixers)."""
        return self._norm

    @property
    def landmark_block(self) -> int | None:
        """After how many tokens the model puts a landmark token; None without landmark mixers."""
        return next((size for layer in self.layers for size in layer.mixer.config.landmark_blocks().values()), None)

    def stream_length(self, length: int) -> int:
        """How many tokens the layers see of `length`: those, and the landmarks among them."""
        return length if self.landmark_block is None else length + length // self.landmark_block

    def to_mapping(self) -> dict[str, Any]:
        """The plain model-file mapping, without fields left at null."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: copy.deepcopy(value) for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for derived in ("_layers", "_norm", "_num_layers"):
            output.pop(derived, None)
        return output


# What transformers itself may hand to a configuration beside our fields.
_TRANSFORMERS_KEYS = (
    {field.name for field in dataclasses.fields(PreTrainedConfig)}
    | {
        "torch_dtype",
        "num_labels",
        "name_or_path",
        "output_attentions",
        "attn_implementation",
        "experts_implementation",
    }
    | {"transformers_version", "architectures", "dtype", "model_type", "auto_map", "use_cache"}
    | set(GenerationConfig().to_dict())
)


def load_config(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> ZooConfig:
    """Read and check a model file.

    Args:
        source: a YAML (or JSON) file, or the mapping one would hold.
        overrides: `dotted.path=value` texts, the value as YAML: `blocks.softmax.mixer.num_heads=8`, an entry of a list
            as `branches[0]`. They win.

    Raises:
        ConfigError: one line with the file, the field, the value and the remedy.
    """
    prefix = "" if isinstance(source, Mapping) else f"{source}: "
    try:
        mapping = _copy(source if isinstance(source, Mapping) else yaml.load_file(Path(source)))
        if not isinstance(mapping, dict):
            raise FieldError("", f"must be a mapping of fields such as vocab_size and blocks, got {shown(mapping)}")
        for override in overrides:
            _override(mapping, override)
        return ZooConfig(**_own_fields(mapping))
    except RecursionError:
        raise ConfigError(f"{prefix}nests too deep, or contains itself; flatten it") from None
    except (FieldError, yaml.YamlError, ConfigError) as error:
        raise ConfigError(f"{prefix}{error}") from None


def _copy(value: Any) -> Any:
    """Plain data made of dicts and lists, shared with nobody."""
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return value


def _own_fields(mapping: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model file. One with a model_type is a config.json, and has transformers' keys beside ours."""
    model_type = mapping.get("model_type", "zoo")
    if model_type != "zoo":
        raise FieldError("model_type", f"must be 'zoo', got {shown(model_type)}")
    foreign = {"model_type", "_name_or_path"} | _TRANSFORMERS_KEYS if "model_type" in mapping else set()
    for key in mapping:
        if key not in FIELDS and key not in foreign:
            raise FieldError(join("", key), f"unknown key; {nearest(key, FIELDS)}")
    return {key: value for key, value in mapping.items() if key in FIELDS}


def _override(mapping: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    if not equals or not all(keys):
        raise FieldError(override, "is not an override; write field.path=value")
    blocks = mapping.get("blocks")
    # A whole new block may be given, but a field of a block that is not there is a slip of the pen.
    if len(keys) > 2 and keys[0] == "blocks" and isinstance(blocks, dict) and keys[1] not in blocks:
        raise FieldError(".".join(keys[:2]), f"unknown block; {nearest(keys[1], blocks)}")
    inner: Any = mapping
    for depth in range(len(keys) - 1):
        key = _key(inner, keys, depth)
        if isinstance(inner, dict) and inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]
        if not isinstance(inner, dict | list):
            raise FieldError(_spelled(keys[: depth + 1]), f"has no fields to override, it is {shown(inner)}")
    try:
        value = yaml.load_text(text)
    except yaml.YamlError:
        value = text  # a pattern such as `*2` is no YAML; the schema will say what is wrong with it
    inner[_key(inner, keys, len(keys) - 1)] = value


def _spelled(keys: list[str]) -> str:
    """The path of an override, as other messages spell it."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(keys))


def _key(inner: dict | list, keys: list[str], depth: int) -> Any:
    """What keys[depth] is in `inner`: a key, or an index of a list."""
    key = keys[depth]
    if isinstance(inner, dict):
        return key
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(inner):
        raise FieldError(_spelled(keys[: depth + 1]), f"must be an index below {len(inner)}, got {shown(key)}")
    return int(key)


def _resolve(mapping: Mapping[str, Any], model: ZooConfig) -> tuple[tuple[Layer, ...], NormConfig]:
    """Check the whole file; the layers written out, and the model's norm.

    Raises:
        FieldError: at the first mistake.
    """
    file = from_mapping(_ModelFile, mapping, "")
    try:
        names = parse(file.pattern)
    except PatternError as error:
        raise FieldError("pattern", str(error)) from None
    model._num_layers = len(names)  # blocks read it while they resolve, and the norm
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(file, name)
        for each in token if isinstance(token, list) else [token]:
            if each is not None and each >= file.vocab_size:
                raise FieldError(name, f"must be below vocab_size ({file.vocab_size}), got {each}")
    norm = file.norm or NormConfig()
    residual = residual_from_mapping(file.residual or {}, "residual")
    model._norm = norm
    _check_defaults(file.defaults or {})
    if not file.blocks:
        raise FieldError("blocks", "is empty; define at least one block")
    blocks = {}
    for name, block in file.blocks.items():
        if not _is_block_name(name):
            raise FieldError(join("blocks", name), "is no block name; use letters, digits, _ - and ., from a letter")
        blocks[name] = _resolve_block(name, block, file.defaults or {}, norm, residual, model)
    for name in names:
        if name not in blocks:
            raise FieldError("pattern", f"unknown block {shown(name)}; {nearest(name, blocks)}")
    if blocks[names[0]].residual.needs_earlier:
        raise FieldError("pattern", f"begins with {names[0]!r}, whose residual needs a layer below; put one before it")
    _check_landmarks(blocks, names)
    return tuple(blocks[name] for name in names), norm


def _check_landmarks(blocks: dict[str, Layer], names: list[str]) -> None:
    """All landmark mixers share the landmark tokens of the one stream."""
    first: tuple[str, int] | None = None
    for name in dict.fromkeys(names):
        for field, size in blocks[name].mixer.config.landmark_blocks().items():
            path = join(join("blocks", name), f"mixer.{field}")
            first = first or (path, size)
            if size != first[1]:
                problem = f"must be {first[1]}, as {first[0]}: all landmark mixers of a model share one; got {size}"
                raise FieldError(path, problem)


def _is_block_name(name: object) -> bool:
    """Whether a pattern could spell it."""
    try:
        return isinstance(name, str) and parse(name) == [name]
    except PatternError:
        return False


def _resolve_block(
    name: str, block: Any, defaults: dict[str, Any], norm: NormConfig, residual: Residual, model: ZooConfig
) -> Layer:
    """One block over the defaults; `norm` and `residual` are the model's, where the block has none of its own."""
    path = join("blocks", name)
    if not isinstance(block, dict):
        raise FieldError(path, f"must be a mapping with mixer and ffn, got {shown(block)}")
    for key in block:
        if key not in _BLOCK_FIELDS:
            raise FieldError(join(path, key), f"unknown key; {nearest(key, _BLOCK_FIELDS)}")
    merged = _merge(defaults, block)
    mixer_path, ffn_path = join(path, "mixer"), join(path, "ffn")
    mixer = MixerPart.read(merged.get("mixer"), mixer_path).resolve(model, mixer_path)
    ffn = FeedForwardPart.read(merged.get("ffn"), ffn_path).resolve(model, ffn_path)
    if mixer.kind == ffn.kind == "none":
        raise FieldError(path, "has neither a mixer nor an ffn; give one of them")
    if merged.get("norm") is not None:
        norm = from_mapping(NormConfig, merged["norm"], join(path, "norm"))
    if merged.get("residual") is not None:
        residual = residual_from_mapping(merged["residual"], join(path, "residual"))
    return Layer(
        name,
        mixer,
        ffn,
        norm,
        residual.resolve(model),
        _resolve_shared(merged.get("shared"), mixer, ffn, join(path, "shared")),
    )


def _resolve_shared(value: Any, mixer: MixerPart, ffn: FeedForwardPart, path: str) -> SharedConfig | None:
    shared = shared_from_value(value, path)
    if shared is not None:
        for role, part in (("mixer", mixer), ("ffn", ffn)):
            rank = getattr(shared, f"{role}_adapter")
            if rank is not None and not getattr(kind_of(role, part.kind).module_class, "adapted", ()):  # type: ignore[arg-type]
                problem = f"{part.kind} has no projections that take one, got {rank}; remove it"
                raise FieldError(join(path, f"{role}_adapter"), problem)
    return shared


def _merge(default: Any, given: Any) -> Any:
    """`given` over `default`, key by key. A part of another kind (or rope of another type) replaces the default
    altogether, and null takes it away."""
    if not isinstance(default, dict) or not isinstance(given, dict):
        return given
    if any(name in default and given.get(name, default[name]) != default[name] for name in ("kind", "type")):
        return given
    return default | {key: _merge(default.get(key), value) for key, value in given.items()}


def _check_defaults(defaults: dict) -> None:
    """Check what `defaults` holds by itself: known keys and right types, though fields may be missing."""
    for key, value in defaults.items():
        path = join("defaults", key)
        if key not in _BLOCK_FIELDS:
            raise FieldError(path, f"unknown key; {nearest(key, _BLOCK_FIELDS)}")
        if key == "shared":
            shared_from_value(value, path)
            continue
        if not isinstance(value, dict):
            raise FieldError(path, f"must be a mapping, got {shown(value)}")
        if key == "norm":
            from_mapping(NormConfig, value, path)
        elif key == "residual":
            residual_from_mapping(value, path)
        elif "kind" not in value:
            raise FieldError(join(path, "kind"), "is missing; `zoo describe --kinds` lists them")
        else:
            try:
                config_class = kind_of(key, value["kind"]).config_class
            except FieldError as error:
                raise error.within(path) from None
            if hasattr(config_class, "read"):  # its fields are not known before the whole is there
                continue
            hints = get_hints(config_class)
            for name, entry in value.items():
                if name == "kind":
                    continue
                if name not in hints:
                    raise FieldError(join(path, name), f"unknown key; {nearest(name, hints)}")
                check(hints[name], entry, join(path, name))
