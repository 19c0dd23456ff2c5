"""The mixer contract and the feed-forward contract (docs/decisions.md says why they are so small).

A part of a block is a config dataclass plus a module built as `module_class(config, model_config, layer_idx)`. The
config checks itself against the model it stands in (`resolve`); the module owns its projections and norms, can say
what it costs (`num_params`, `flops`, `state_bytes`), and can fill its own parameters and buffers on any device
(`reset_parameters`), so that a model built on the meta device and materialised later is right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from zoo.blocks.context import SequenceContext
from zoo.blocks.state import State

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of every mixer's fields."""

    @property
    def varies_with_depth(self) -> bool:
        """Whether two layers with these fields may cost differently."""
        return False

    def resolve(self, model: ZooConfig) -> Self:
        """A copy with every default that depends on the model filled in.

        Raises:
            FieldError: the fields do not fit each other or the model (heads that do not divide, ...).
        """
        return self

    def landmark_blocks(self) -> dict[str, int]:
        """After how many tokens it needs a landmark token in the stream, by the field that says so; empty for a mixer
        that needs none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Base of every feed-forward's fields."""

    def resolve(self, model: ZooConfig) -> Self:
        """As MixerConfig.resolve."""
        return self


class Float32Module(nn.Module):
    """A module some of whose own tensors stay float32 when the model is cast: decays, rates, angles. In bfloat16 a
    slow decay would drift by percents over a few thousand tokens.

    Optimisers spare the same ones from weight decay: they are rates, not weights. The class names them because what is
    set on a parameter itself is lost on its way from the meta device.
    """

    float32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: getattr(self, name).data for name in self.float32 if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self


class Part(Float32Module):
    """What mixers and feed-forwards share.

    adapted         names of the projections that read the part's input, to which a shared block may add at each depth
                    (shared.py); those in one group are pieces of one matrix.
    learning_rates  of parameters of its own that need another rate than the model's, by name; optimisers put them in
                    a group by themselves, without weight decay (zoo/train/optimizers.py).
    """

    adapted: ClassVar[tuple[tuple[str, ...], ...]] = ()
    learning_rates: ClassVar[dict[str, float]] = {}

    def num_params(self) -> int:
        """Parameters, counted from the fields without touching a tensor's data (works on the meta device)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_params(self) -> int:
        """Parameters that one token passes through; less than num_params only where tokens choose experts."""
        return self.num_params()

    @abstractmethod
    def flops(self, batch: int, length: int) -> int:
        """Matrix-multiply FLOPs (two per multiply-add) of one forward pass over `[batch, length]` tokens.

        Elementwise work is not counted, as torch.utils.flop_counter does not; of attention only visible pairs are.
        """


class Mixer(Part):
    """Mixes information along the sequence.

    reads_embeddings  whether its input is the stream beside the token embeddings, `[batch, length, 2 * hidden]`.
    reads_token_ids   whether it needs the context's token_ids.
    """

    reads_embeddings = False
    reads_token_ids = False

    @abstractmethod
    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        """`x` `[batch, length, hidden]` to the same shape. With a state it continues from it and updates it."""

    @abstractmethod
    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token. `dtype` is that of keys and values; recurrent states are float32."""

    @abstractmethod
    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens: keys and values in the dtype of the weights, others in float32."""


class RouterStatistics(NamedTuple):
    """What a router saw, summed over its real tokens. The model pools it over layers into the auxiliary losses that the
    feed-forward's config asks for: its `router` is a RouterConfig, or there are none."""

    tokens: Tensor
    """`[]`, how many tokens were routed."""
    assignments: Tensor
    """`[experts]`, how many tokens chose each expert."""
    probabilities: Tensor
    """`[experts]`, the sum of the router's probabilities (differentiable)."""
    squared_log_z: Tensor
    """`[]`, the sum of logsumexp(logits)^2 (differentiable)."""


class FeedForward(Part):
    """Mixes along channels, each token by itself."""

    @abstractmethod
    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, RouterStatistics | None]:
        """`x` `[batch, length, hidden]` to the same shape, and the router's statistics where there is a router."""
