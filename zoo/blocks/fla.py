"""Any layer of flash-linear-attention (https://github.com/fla-org/flash-linear-attention), by name, on a GPU.

    mixer: {kind: fla, layer: gla, num_heads: 4, expand_k: 0.5}

`layer` is a module of fla.layers (gla, delta_net, rwkv7 ...) or the class itself (GatedLinearAttention); the rest are
that class's own arguments. hidden_size and layer_idx are the model's. A padded batch runs as packed documents, as
everywhere in the zoo; a layer that does not take them (cu_seqlens) is refused there, not run wrong.

x `[batch, length, hidden]` to y of the same shape. What a layer carries is its own: recurrent, convolution and
attention states, kept here as tensors by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.state import State
from zoo.schema import FieldError, check, join, nearest, shown

if TYPE_CHECKING:
    from zoo.config import ZooConfig

OWN = ("self", "hidden_size", "layer_idx")  # arguments that are not the user's
STATES = ("recurrent_state", "attn_state", "conv_state", "ffn_state")


@dataclass(frozen=True, kw_only=True)
class FlaConfig(MixerConfig):
    """A layer of flash-linear-attention, by name.

    layer      a module of fla.layers, such as gla, or a class, such as GatedLinearAttention.
    arguments  that layer's own; in a model file they stand beside `layer`.
    """

    layer: str
    arguments: dict = field(default_factory=dict)

    @classmethod
    def read(cls, mapping: Any, path: str) -> Self:
        """From `{layer: ..., any argument: ...}`.

        Raises:
            FieldError: layer is missing.
        """
        if not isinstance(mapping, Mapping):
            raise FieldError(path, f"must be a mapping, got {shown(mapping)}")
        if "layer" not in mapping:
            raise FieldError(join(path, "layer"), "is missing; give a layer of fla.layers, such as gla")
        arguments = {name: value for name, value in mapping.items() if name != "layer"}
        return cls(layer=check(str, mapping["layer"], join(path, "layer")), arguments=arguments)

    def resolve(self, model: ZooConfig) -> Self:
        parameters = inspect.signature(layer_class(self.layer).__init__).parameters.values()
        known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in OWN]
        for name in self.arguments:
            if name in OWN:
                raise FieldError(name, "is the model's; remove it")
            if name not in known:
                raise FieldError(name, f"is no argument of fla's {self.layer}; {nearest(name, known)}")
        with torch.device("meta"):
            self.new_layer(model.hidden_size)
        return self

    def new_layer(self, hidden_size: int) -> nn.Module:
        """The layer itself.

        Raises:
            FieldError: it does not take these arguments.
        """
        found = layer_class(self.layer)
        place = {"layer_idx": 0} if _takes(found.__init__, "layer_idx") else {}
        try:
            return found(**self.arguments, hidden_size=hidden_size, **place)
        except Exception as error:  # whatever a layer makes of a wrong value
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FieldError("layer", f"fla's {self.layer} cannot be built ({reason}); change its arguments") from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument so called, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def layer_class(name: str) -> type[nn.Module]:
    """The class of fla.layers called so, or defined in its module of that name.

    Raises:
        FieldError: flash-linear-attention is not installed, or has no such layer.
    """
    try:
        layers = importlib.import_module("fla.layers")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        problem = f"needs flash-linear-attention ({reason}); pip install flash-linear-attention"
        raise FieldError("layer", problem) from None
    classes = {each: getattr(layers, each) for each in layers.__all__}
    modules = {found.__module__.rpartition(".")[2]: found for found in reversed(classes.values())}
    if name in classes or name in modules:
        return classes.get(name) or modules[name]
    raise FieldError("layer", f"unknown layer {shown(name)}; {nearest(name, [*modules, *classes])}")


def check_device(layer: str, device: torch.device) -> None:
    """Raise ValueError where fla's kernels cannot run."""
    if device.type == "cpu":
        raise ValueError(f"fla's {layer} runs kernels that need a GPU, got a tensor on the CPU; move the model to one")


class FlaState(State):
    """What the layer gave to remember; nothing before the first token. `seen` `[batch]` counts tokens."""

    def remember(self, seen: Tensor, states: Mapping[str, Any]) -> None:
        """Keep `states`, each a tensor or a sequence of tensors and None, after so many tokens.

        Raises:
            ValueError: a state is something else.
        """
        tensors = dict(self.tensors)
        for name, value in states.items():
            parts = {name: value} if isinstance(value, Tensor) else _parts(name, value)
            tensors = {key: x for key, x in tensors.items() if key != name and not key.startswith(f"{name}.")} | parts
        self.tensors = tensors | {"seen": seen}

    def recalled(self) -> dict[str, Any]:
        """As the layer gave them: by name, a tensor, a tuple of tensors and None, or None."""
        recalled: dict[str, Any] = {}
        for name in STATES:
            parts = {key.rpartition(".")[2]: x for key, x in self.tensors.items() if key.startswith(f"{name}.")}
            count = max(map(int, parts), default=-1) + 1
            recalled[name] = tuple(parts.get(str(i)) for i in range(count)) if parts else self.tensors.get(name)
        return recalled

    def length(self) -> int:
        """Tokens seen."""
        return int(self.tensors["seen"].max()) if self.tensors else 0

    def reset(self) -> None:
        self.tensors = {}


def _parts(name: str, value: Any) -> dict[str, Tensor]:
    """By name and place, the tensors of a state that is several."""
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if any(not isinstance(x, Tensor) for x in parts if x is not None):
        raise ValueError(f"{name} of this fla layer is no tensor ({type(value).__name__}): the zoo cannot keep it")
    return {f"{name}.{i}": x for i, x in enumerate(parts) if x is not None}


class _Cache:
    """A state as fla's layers want it: their cache of a model of one layer, which gets the tokens `x`."""

    def __init__(self, state: FlaState, x: Tensor) -> None:
        self.state, self.x, self.updated = state, x, False

    def __len__(self) -> int:
        return 1 if self.state.tensors else 0

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.state.recalled()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length()

    def update(self, layer_idx: int = 0, offset: int = 1, cache_kwargs: Any = None, **states: Any) -> dict[str, Any]:
        new = {name: value for name, value in states.items() if value is not None}
        past = self.state.recalled()
        if "attn_state" in new and past["attn_state"] is not None:
            new["attn_state"] = [torch.cat(pair, 1) for pair in zip(past["attn_state"], new["attn_state"], strict=True)]
        seen = self.state.length() + offset
        self.state.remember(torch.full((len(self.x),), seen, dtype=torch.long, device=self.x.device), new)
        self.updated = True
        return self.state.recalled()


def _left_to_the_mixer() -> None:
    """Of a module within the layer: Fla.reset_parameters fills them all."""


class Fla(Mixer):
    def __init__(self, config: FlaConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.hidden_size = config, model.hidden_size
        self.layer = config.new_layer(model.hidden_size)
        for module in self.layer.modules():
            # Some layers fill their parts otherwise than these would: who goes through all modules must not undo that.
            module.reset_parameters = _left_to_the_mixer  # type: ignore[assignment]
        self.takes_documents = "cu_seqlens" in inspect.getsource(type(self.layer).forward)

    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            fresh = self.config.new_layer(self.hidden_size)
        values = dict([*fresh.named_parameters(), *fresh.named_buffers()])
        for name, tensor in (*self.layer.named_parameters(), *self.layer.named_buffers()):
            init.copy_(tensor, values[name])

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        name = self.config.layer
        check_device(name, x.device)
        x, cu_seqlens = context.pack(x)
        if cu_seqlens is not None and not self.takes_documents:
            raise ValueError(f"fla's {name} takes neither padding nor packed documents; give rows of one length")
        if cu_seqlens is not None and state is not None:
            raise ValueError(f"fla's {name} cannot continue a state with padding; give rows of one length")
        given: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        cache = None
        if state is not None:
            assert isinstance(state, FlaState), "new_state() makes one"
            cache = _Cache(state, x)
            given |= {"past_key_values": cache, "use_cache": True}
        y = self.layer(x, **given)
        if cache is not None and not cache.updated:
            raise ValueError(f"fla's {name} keeps no state; give it whole texts (use_cache=False)")
        return context.unpack(y if isinstance(y, Tensor) else y[0])

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return FlaState()

    def state_bytes(self, batch: int, length: int) -> int:
        """As far as the layer says (`state_size`, in numbers); 0 where it does not."""
        size = getattr(self.layer, "state_size", 0)
        numbers = size() if callable(size) else size
        return batch * int(numbers) * 4

    def flops(self, batch: int, length: int) -> int:
        """Of the projections: what else a layer computes it does not say."""
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        return 2 * batch * length * weights
