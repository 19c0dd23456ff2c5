"""What a family is: its configuration read as a model file and written back, and its tensors' names, as data.

Names are given by part: `blocks[kind]` holds the tensors of a mixer or feed-forward of that kind, ours relative to
`mixer.` or `ffn.`, theirs relative to the layer. `proj.*` stands for a module's weight and bias. A Form says how the
tensors behind the names are the same numbers; a plain name is the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from zoo.config import Layer, ZooConfig, load_config
from zoo.pattern import MAX_LAYERS
from zoo.schema import shown


class FamilyError(ValueError):
    """A model that cannot be read or written: one line with what stands in the way."""


class Form:
    """How a group of our tensors and a group of theirs hold the same numbers. `{i}` in a name is the layer."""

    def names(self) -> list[str]:
        """Theirs."""
        raise NotImplementedError

    def at(self, rename: Callable[[str], str], experts: int = 0) -> Form:
        """The same with other names, for a part with so many experts."""
        raise NotImplementedError

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Ours, of these shapes, of theirs in the order of `names`. ValueError or RuntimeError if they do not fit."""
        raise NotImplementedError

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `join`."""
        raise NotImplementedError


# What a configuration with values of wrong types or sizes raises, in transformers or in the code of a family.
_WRONG = (
    StrictDataclassError, AttributeError, ArithmeticError, IndexError, KeyError, RecursionError, TypeError, ValueError
)  # fmt: skip


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """What goes wrong inside is a FamilyError of one line."""
    try:
        yield
    except FamilyError:
        raise
    except _WRONG as error:
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise FamilyError(f"{where}: {name}{' '.join(str(error).split())[:300]}") from None


@dataclass(frozen=True)
class Same(Form):
    """The same tensor by another name."""

    name: str

    def names(self) -> list[str]:
        return [self.name]

    def at(self, rename: Callable[[str], str], experts: int = 0) -> Same:
        return replace(self, name=rename(self.name))

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [theirs[0]]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0]]


@dataclass(frozen=True)
class Taps(Same):
    """The weight of an nn.Conv1d of one channel per group, `[channels, 1, kernel]`; ours is `[channels, kernel]`."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [theirs[0].squeeze(1)]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0].unsqueeze(1)]


@dataclass(frozen=True)
class Rows(Same):
    """One tensor: ours one under the other."""

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return list(theirs[0].split([shape[0] for shape in shapes]))

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(ours))]


@dataclass(frozen=True)
class PerExpert(Form):
    """One tensor per expert `{e}` and pattern; ours is `[experts, rows of all patterns, columns]`."""

    patterns: tuple[str, ...]
    experts: int = 0

    def names(self) -> list[str]:
        return [pattern.replace("{e}", str(e)) for e in range(self.experts) for pattern in self.patterns]

    def at(self, rename: Callable[[str], str], experts: int = 0) -> PerExpert:
        return replace(self, patterns=tuple(rename(pattern) for pattern in self.patterns), experts=experts)

    def join(self, theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        return [torch.cat(list(theirs)).unflatten(0, (self.experts, -1))]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [part for expert in ours[0] for part in expert.chunk(len(self.patterns))]


# Ours, one name or several, to theirs: one layout, or several of them, the checkpoint's first and that of transformers'
# module last.
Names = Mapping[str | tuple[str, ...], str | Form | Sequence[str | Form]]


class Pair(NamedTuple):
    """Tensors of ours, and the layouts in which a checkpoint may hold them."""

    ours: tuple[str, ...]
    layouts: list[Form]


# Fields that are the same in both.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    model_type   as in its config.json.
    model_class  its causal language model, in transformers or in the code that was released with it.
    config_class its configuration, where transformers has none.
    read         the model file of a configuration, from its Fields.
    write        the configuration's fields for a model, or FamilyError; may assume more than is so: the result is read
                 back and compared.
    outside      tensors that belong to no layer, and others by their whole name; may be a function of the model.
    layer        tensors of a layer beside its mixer and feed-forward; may be a function of the Layer.
    blocks       tensors by kind of mixer or feed-forward; each may be a function of its config.
    prefix       of a layer's tensors there.
    place        the prefix of layer i's, where their layers are not ours one by one.
    copies       starts of names of tensors that are others once more (shared ones, at each depth); not read.
    derived      endings of tensors that follow from the configuration; not read.
    derive       those of layer i, for a checkpoint that is written, by name within the layer.
    immaterial   fields of the configuration that change no number.
    beside       starts of names of tensors beside the language model; not read.
    notes        what a user should know of a model that was read, one line each.
    original     a config.json without model_type, as the architecture's own authors write it, in transformers' fields;
                 None for one of another.
    former       starts of names in released checkpoints, and what transformers' module calls them.
    further_layers  whether checkpoints hold layers after the last, for the prediction of further tokens; not read.
    """

    model_type: str
    model_class: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ZooConfig], dict[str, Any]]
    outside: Names | Callable[[ZooConfig], Names]
    layer: Names | Callable[[Layer], Names]
    blocks: Mapping[str, Names | Callable[[Any], Names]]
    prefix: str = "model.layers.{i}."
    place: Callable[[ZooConfig, int], str] | None = None
    copies: Callable[[ZooConfig], tuple[str, ...]] = lambda model: ()
    derived: tuple[str, ...] = ()
    derive: Callable[[PreTrainedConfig, int], Mapping[str, Tensor]] = lambda config, i: {}
    immaterial: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    config_class: type[PreTrainedConfig] | None = None
    notes: Callable[[ZooConfig], tuple[str, ...]] = lambda model: ()
    original: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda values: None
    former: Mapping[str, str] = field(default_factory=dict)
    further_layers: bool = False

    def is_read(self, name: str, model: ZooConfig) -> bool:
        """Whether their tensor `name` holds something that the configuration does not say, of a layer that ours has."""
        start = self.prefix.partition("{i}")[0]
        layer = name.removeprefix(start).partition(".")[0] if name.startswith(start) else ""
        further = self.further_layers and layer.isdigit() and int(layer) >= model.num_hidden_layers
        return not (further or name.endswith(self.derived) or name.startswith((*self.beside, *self.copies(model))))

    def configuration(self) -> type[PreTrainedConfig]:
        """The class of its configurations."""
        return self.config_class or transformers.CONFIG_MAPPING[self.model_type]

    def config(self, model: ZooConfig) -> PreTrainedConfig:
        """The family's configuration of a model.

        Raises:
            FamilyError: the family has no such model.
        """
        try:
            given = self.write(model)
            # A token that is None must be so there, whatever that class's default.
            carried = {name: getattr(model, name) for name in CARRIED}
            if model.max_position_embeddings is None:
                del carried["max_position_embeddings"]
            common = {
                "vocab_size": model.vocab_size,
                "hidden_size": model.hidden_size,
                "num_hidden_layers": model.num_hidden_layers,
                "initializer_range": model.initializer_range,
                "tie_word_embeddings": model.tie_word_embeddings,
            }
            config = self.configuration()(**carried | common | given)
            again = self.model_file(config)
        except _WRONG as error:
            raise FamilyError(f"is no {self.model_type}: {' '.join(str(error).split())}") from None
        difference = _difference(model, again)
        if difference:
            raise FamilyError(f"is no {self.model_type}: {difference}")
        return config

    def model_file(self, config: PreTrainedConfig) -> ZooConfig:
        """The model that a configuration describes.

        Raises:
            FamilyError: an option that ours does not have, with its name and value.
        """
        with one_line(self.model_type):
            return self._model_file(Fields(config, self.immaterial))

    def _model_file(self, given: Fields) -> ZooConfig:
        common = {
            "vocab_size": given("vocab_size"),
            "hidden_size": given("hidden_size"),
            "initializer_range": given("initializer_range"),
            "tie_word_embeddings": given("tie_word_embeddings"),
            **{name: given(name) for name in CARRIED},
        }
        layers = given("num_hidden_layers")  # the pattern says it again
        if layers is not None and (not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS):
            raise FamilyError(f"{self.model_type}: num_hidden_layers is {shown(layers)}; give 1 to {MAX_LAYERS}")
        mapping = common | self.read(given)
        given.finish()
        return load_config({name: value for name, value in mapping.items() if value is not None})

    def present(self, name: str) -> str:
        """What a tensor of a checkpoint is called in transformers' module, where only the start of its name changed."""
        return _other_start(name, self.former)

    def released(self, name: str) -> str:
        """The inverse of `present`."""
        return _other_start(name, {now: before for before, now in self.former.items()})

    def pairs(self, model: ZooConfig, names: Iterable[str]) -> list[Pair]:
        """Where the tensors of a model, `names`, are there."""
        outside = self.outside(model) if callable(self.outside) else self.outside
        pairs, done = [], set()
        for name in names:
            if name not in done:
                pairs.append(self._pair(model, name, outside))
                done.update(pairs[-1].ours)
        return pairs

    def _pair(self, model: ZooConfig, name: str, outside: Names) -> Pair:
        """The pair that our tensor `name` is in."""
        names, ours, theirs, rest, experts = outside, "", "", name, 0
        if name.startswith("model.layers.") and name not in outside:
            _, _, i, rest = name.split(".", 3)
            layer, ours = model.layers[int(i)], f"model.layers.{i}."
            theirs = self.prefix.replace("{i}", i) if self.place is None else self.place(model, int(i))
            role, _, inner = rest.partition(".")
            names = self.layer(layer) if callable(self.layer) else self.layer
            if role in ("mixer", "ffn"):
                part = getattr(layer, role)
                given = self.blocks[part.kind]
                names, ours, rest = given(part.config) if callable(given) else given, f"{ours}{role}.", inner
                experts = getattr(part.config, "num_experts", 0)
        module, _, leaf = rest.rpartition(".")
        keys = {each: key for key in names for each in ((key,) if isinstance(key, str) else key)}
        key = keys[rest] if rest in keys else keys[f"{module}.*"]

        def full(prefix: str, name: str) -> str:
            return prefix + (name[:-1] + leaf if name.endswith(".*") else name)

        layouts = [names[key]] if isinstance(names[key], str | Form) else names[key]
        forms = [Same(layout) if isinstance(layout, str) else layout for layout in layouts]
        return Pair(
            tuple(full(ours, each) for each in ((key,) if isinstance(key, str) else key)),
            [form.at(lambda name: full(theirs, name), experts) for form in forms],
        )


def _other_start(name: str, starts: Mapping[str, str]) -> str:
    start = next((start for start in starts if name.startswith(start)), "")
    return starts.get(start, "") + name.removeprefix(start)


# Of a router, what is about its training alone.
_TRAINING = ("correction_rate", "aux_loss_coef", "z_loss_coef")


def _difference(one: Any, other: Any) -> str | None:
    """The first thing in which two models, or parts of them, differ; None if they are the same once built."""
    names: Sequence[str]
    if isinstance(one, ZooConfig):
        names = ("vocab_size", "hidden_size", "tie_word_embeddings", "embedding_scale", "logit_scale", "logit_softcap",
                 "norm_config", "num_hidden_layers", "layers")  # fmt: skip
    elif isinstance(one, Layer):
        names = ("mixer", "ffn", "norm", "residual", "shared")
    elif is_dataclass(one) and type(one) is type(other):
        names = [field.name for field in fields(one) if field.name not in _TRAINING]
    elif isinstance(one, tuple):
        found = ((i, _difference(*pair)) for i, pair in enumerate(zip(one, other, strict=True)))
        return next((f"{i}.{difference}" for i, difference in found if difference), None)
    else:
        return None if one == other else f" is {shown(one)}, there {shown(other)}"
    found = ((name, _difference(getattr(one, name), getattr(other, name))) for name in names)
    return next((f"{name}.{difference}".replace(". ", " ") for name, difference in found if difference), None)


# Fields that change no number of a forward pass without dropout, or only how transformers computes it.
_IMMATERIAL = {
    "max_position_embeddings", "use_cache", "use_mamba_kernels", "use_mambapy", "use_associative_scan", "chunk_size",
    "block_size", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "residual_in_fp32",
    "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor", "time_step_init_scheme",
    "time_step_scale", "time_step_rank", "auto_map",
    # Bookkeeping of tools that saved a configuration.
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "neftune_noise_alpha", "tie_encoder_decoder",
    "transformers.js_config", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Parts that a family without such a field never has: switched off, they may be named.
_SWITCHES = ("attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window", "_dropout")


class Fields:
    """A configuration's fields, each of which must be read, be at its default, or not matter."""

    def __init__(self, config: PreTrainedConfig, immaterial: Collection[str] = ()) -> None:
        self.immaterial = _IMMATERIAL | set(immaterial)
        self.model_type = config.model_type
        self.stored = config.attribute_map  # other names that transformers knows a field by
        self.values = config.to_dict()
        # What every configuration has is about saving, generating and training, except for these.
        inherited = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings", "bos_token_id", "pad_token_id"}
        self.defaults = {**type(config)().to_dict(), **{name: self.values.get(name) for name in inherited}}
        self.read: set[str] = set()

    def __call__(self, name: str, default: Any = None) -> Any:
        name = self.stored.get(name, name)
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def own(self, name: str, default: Any = None) -> Any:
        """The field's value where the family has such a field: the others ignore it, and then it must not be there."""
        return self(name, default) if name in self.defaults else default

    def only(self, name: str, *allowed: Any) -> Any:
        """The field's value, one of `allowed`.

        Raises:
            FamilyError: it is another one.
        """
        value = self(name)
        if value not in allowed:
            choices = " or ".join(shown(each) for each in allowed)
            raise FamilyError(f"{self.model_type}: {name} is {shown(value)}; supported is {choices}")
        return value

    def finish(self) -> None:
        """Raises FamilyError at the first field that nobody read and that is not at its default."""
        for name, value in self.values.items():
            off = name not in self.defaults and name.endswith(_SWITCHES) and not value
            if name not in self.read | self.immaterial and value != self.defaults.get(name) and not off:
                raise FamilyError(f"{self.model_type}: {name} is {shown(value)}, which is not supported")
