"""Other mixers in a model that has its weights: which layers get which mixer, and what a new mixer takes over.

    softmax@1,3,5=lightning                          layers counted from 0
    softmax@8-15={kind: mamba2, state_size: 64}      with fields of the new mixer
    softmax=lightning                                every layer with softmax attention

What is replaced is a block's name or a kind of mixer; `softmax` is another word for `attention`. From softmax attention
to a linear one, q, k, v and o are taken over (T2R, Kasai et al. 2021, arXiv:2103.13076; to Mamba-2 as C, B, x and
output, Wang et al. 2024, arXiv:2408.15237, section 3). Between any other two mixers, so are tensors of the same name
and shape. The rest starts as it would in a new model.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import yaml
from zoo.blocks import kind_of
from zoo.config import ConfigError, Layer, ZooConfig, load_config
from zoo.models.landmarks import LandmarkToken
from zoo.pattern import spell
from zoo.schema import FieldError, nearest

KINDS = {"softmax": "attention"}
LANDMARK = "model.landmark.weight"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Hybrid:
    """A model's configuration with other mixers: `config`, and the layers, from 0, that were given one."""

    before: ZooConfig
    config: ZooConfig
    replaced: tuple[int, ...]


def hybridize(model: ZooConfig, replacements: Iterable[str]) -> Hybrid:
    """The configuration in which `replacements` (`softmax@1,3,5=lightning`) are made, one after the other.

    Raises:
        ConfigError: a replacement that does not parse, layers that are not there or hold another mixer, or a mixer that
            does not fit.
    """
    config, replaced = model, set()
    for text in replacements:
        config, layers = _replace(config, text)
        replaced.update(layers)
    return Hybrid(model, config, tuple(sorted(replaced)))


def _replace(model: ZooConfig, text: str) -> tuple[ZooConfig, list[int]]:
    left, equals, right = text.partition("=")
    name, at, places = (part.strip() for part in left.partition("@"))
    if not equals or not name or (at and not places):
        raise ConfigError(f"{text!r}: is no replacement; write WHAT@LAYERS=MIXER, such as softmax@1,3,5=lightning")
    kind = KINDS.get(name, name)
    having = [i for i, layer in enumerate(model.layers) if kind in (layer.mixer.kind, layer.name)]
    if not having:
        known = {layer.mixer.kind for layer in model.layers} | {layer.name for layer in model.layers}
        raise ConfigError(f"{text!r}: no layer has {name!r}; {nearest(name, sorted(known - {'none'}))}")
    layers = _layers(text, places, model.num_hidden_layers) if at else having
    if wrong := sorted(set(layers) - set(having)):
        has = model.layers[wrong[0]].mixer.kind
        raise ConfigError(f"{text!r}: layer {wrong[0]} has {has}, not {name}; it stands at {_ranges(having)}")
    if fixed := [i for i in layers if model.layers[i].shared is not None or _concatenates(model.layers[i])]:
        raise ConfigError(f"{text!r}: layer {fixed[0]} shares its weights or reads the embeddings; leave it out")
    mixer = _mixer(text, right.strip())
    try:
        known = {field.name for field in dataclasses.fields(kind_of("mixer", mixer["kind"]).config_class)}
    except FieldError as error:
        raise ConfigError(f"{text!r}: {error.problem}") from None
    mapping = model.to_mapping()
    names = [layer.name for layer in model.layers]
    for i in layers:
        old = model.layers[i]
        new = f"{old.name}_{mixer['kind']}"
        block = copy.deepcopy(mapping["blocks"][old.name])
        block["mixer"] = _inherited(old, mixer["kind"], known) | mixer
        if mapping["blocks"].setdefault(new, block) != block:
            raise ConfigError(f"{text!r}: a block {new!r} with other fields is there already; replace all in one")
        names[i] = new
    mapping["blocks"] = {each: block for each, block in mapping["blocks"].items() if each in names}
    mapping["pattern"] = spell(names)
    try:
        return load_config(mapping), layers
    except ConfigError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def _layers(text: str, places: str, count: int) -> list[int]:
    """`1,3,8-15` as numbers."""
    layers: set[int] = set()
    for place in places.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", place, re.ASCII)
        if match is None:
            raise ConfigError(f"{text!r}: {place.strip()!r} is no layer; write numbers and ranges such as 1,3,8-15")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise ConfigError(f"{text!r}: layers {place.strip()} are not there; the model has 0 to {count - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def _mixer(text: str, right: str) -> dict[str, Any]:
    """The new mixer as a model file has it."""
    try:
        mixer = yaml.load_text(right)
    except yaml.YamlError as error:
        raise ConfigError(f"{text!r}: {error}") from None
    if isinstance(mixer, str):
        mixer = {"kind": mixer}
    if not isinstance(mixer, dict) or not isinstance(mixer.get("kind"), str):
        raise ConfigError(f"{text!r}: {right!r} is no mixer; write its kind, or {{kind: mamba2, state_size: 64}}")
    if mixer["kind"] == "none":
        raise ConfigError(f"{text!r}: takes the mixer away; name the one to put there")
    return mixer | {"kind": KINDS.get(mixer["kind"], mixer["kind"])}


def _concatenates(layer: Layer) -> bool:
    return getattr(layer.mixer.config, "concat_embeddings", False)


# How a new mixer's fields follow from softmax attention's, so that its projections fit.
_FROM_ATTENTION: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lightning": lambda old: {"num_heads": old.num_heads, "head_dim": old.head_dim},
    "mamba2": lambda old: {
        "num_heads": old.num_heads,
        "head_dim": old.head_dim,
        "state_size": old.head_dim,
        "num_groups": old.num_heads,
    },
}


def _inherited(old: Layer, kind: str, known: set[str]) -> dict[str, Any]:
    """Fields of a new mixer, of those `known` to it, that the old one gives: all of its own kind's, or by rule, or
    those that most mixers have."""
    if old.mixer.kind == kind:
        return _plain(old.mixer.config)
    if old.mixer.kind == "attention" and kind in _FROM_ATTENTION:
        return _FROM_ATTENTION[kind](old.mixer.config)
    return {
        name: value
        for name, value in _plain(old.mixer.config).items()
        if name in known and name in ("num_heads", "num_kv_heads", "head_dim", "rope", "bias")
    }


def _plain(config: Any) -> dict[str, Any]:
    """A config dataclass as YAML has it, without what is null by default and not given."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.default is None}
    absent = {name for name, value in given.items() if value is None}
    return {
        field.name: _plain(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
        if field.name not in absent
    }


def replaced(hybrid: Hybrid, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `hybrid.config`, of those of `hybrid.before` by name (a layer's stand together), one mixer in
    memory at a time. The landmark token comes with the first landmark mixer and goes with the last."""
    prefixes = {f"model.layers.{i}.mixer.": i for i in hybrid.replaced}
    old: dict[str, Tensor] = {}
    now: str | None = None
    for name, tensor in tensors:
        if name == LANDMARK and hybrid.config.landmark_block is None:
            continue
        head, dot, rest = name.partition(".mixer.")
        prefix = head + dot
        if now is not None and prefix != now:
            yield from _new(hybrid, prefixes[now], now, old, dtype)
            old, now = {}, None
        if prefix in prefixes:
            now = prefix
            old[rest] = tensor
        else:
            yield name, tensor
    if now is not None:
        yield from _new(hybrid, prefixes[now], now, old, dtype)
    block_size, config = hybrid.config.landmark_block, hybrid.config
    if block_size is not None and hybrid.before.landmark_block is None:
        yield (
            LANDMARK,
            LandmarkToken(config.hidden_size, block_size, config.initializer_range).weight.detach().to(dtype),
        )


def _new(hybrid: Hybrid, i: int, prefix: str, old: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    before, after = hybrid.before.layers[i].mixer, hybrid.config.layers[i].mixer
    device = next(iter(old.values())).device
    module = kind_of("mixer", after.kind).module_class(after.config, hybrid.config, i).to(device, dtype)
    tensors = dict(module.named_parameters())
    rule = _RULES.get((before.kind, after.kind))
    taken = dict(old) if rule is None else rule(old, before.config, after.config, module)
    for name, tensor in tensors.items():
        fits = name in taken and taken[name].shape == tensor.shape
        yield prefix + name, taken[name].to(tensor.dtype) if fits else tensor.detach()


def _heads(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """`[heads * head_dim, ...]` as `[heads, head_dim, ...]`, shared heads repeated for each that uses them."""
    split = weight.unflatten(0, (-1, head_dim))
    return split.repeat_interleave(heads // split.shape[0], dim=0)


def _to_lightning(old: Tensors, before: Any, after: Any, module: torch.nn.Module) -> dict[str, Tensor]:
    if (before.num_heads, before.head_dim) != (after.num_heads, after.head_dim):
        return {}
    qkv = [_heads(old[f"{part}_proj.weight"], before.num_heads, before.head_dim) for part in "qkv"]
    return {"qkv_proj.weight": torch.cat(qkv, dim=1).flatten(0, 1), "o_proj.weight": old["o_proj.weight"]}


def _to_mamba2(old: Tensors, before: Any, after: Any, module: torch.nn.Module) -> dict[str, Tensor]:
    """The convolution starts as the identity, so that x, B and C are what attention had as v, k and q."""
    if (before.num_heads, before.head_dim) != (after.num_heads, after.head_dim):
        return {}
    taken = {"out_proj.weight": old["o_proj.weight"]}
    if (after.num_groups, after.state_size) == (before.num_heads, before.head_dim):
        v, k, q = (
            _heads(old[f"{part}_proj.weight"], before.num_heads, before.head_dim).flatten(0, 1) for part in "vkq"
        )
        fresh = module.get_parameter("in_proj.weight").detach()
        inner = v.shape[0]
        taken["in_proj.weight"] = torch.cat([fresh[:inner], v, k, q, fresh[4 * inner :]])
        taken["conv.weight"] = torch.zeros_like(module.get_parameter("conv.weight"))
        taken["conv.weight"][:, -1] = 1
        if after.conv_bias:
            taken["conv.bias"] = torch.zeros(3 * inner)
    return taken


_RULES: dict[tuple[str, str], Callable[[Tensors, Any, Any, torch.nn.Module], dict[str, Tensor]]] = {
    ("attention", "lightning"): _to_lightning,
    ("attention", "mamba2"): _to_mamba2,
}


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 7]` as `1-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
