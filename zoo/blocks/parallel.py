"""Several mixers side by side in one layer, each on the same input: Hymba (Dong et al. 2024, arXiv:2411.13676, section
2.1), Falcon-H1 (arXiv:2507.22448, section 2.1).

    y = sum_i b_i mixer_i(a_i x)          with combine: mean, divided by n

n branches mixer_i, each with its own projections and state; a_i input_scales, b_i output_scales, fixed numbers. Every
branch mixes the same tokens: x `[batch, length, hidden]` to y `[batch, length, hidden]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast

import torch
from torch import Tensor, nn

from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.registry import MixerPart
from zoo.blocks.state import State
from zoo.schema import FieldError

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig):
    """Several mixers side by side on the same input.

    branches       the mixers, each a mapping with a kind.
    combine        sum or mean of their outputs.
    input_scales   one fixed factor per branch, on its input; default 1.
    output_scales  one fixed factor per branch, on its output; default 1.
    """

    branches: list[MixerPart]
    combine: Literal["sum", "mean"] = "sum"
    input_scales: list[float] | None = None
    output_scales: list[float] | None = None

    @property
    def varies_with_depth(self) -> bool:
        return any(branch.config.varies_with_depth for branch in self.branches)

    def resolve(self, model: ZooConfig) -> Self:
        if not self.branches:
            raise FieldError("branches", "is empty; give at least one mixer")
        for i, branch in enumerate(self.branches):
            if branch.kind == "none":
                raise FieldError(f"branches[{i}].kind", "must be a mixer, got 'none'; remove the branch")
            if getattr(branch.config, "concat_embeddings", False):
                raise FieldError(f"branches[{i}].concat_embeddings", "a branch reads the stream alone; remove it")
        branches = [branch.resolve(model, f"branches[{i}]") for i, branch in enumerate(self.branches)]
        return replace(
            self,
            branches=branches,
            input_scales=self._scales("input_scales"),
            output_scales=self._scales("output_scales"),
        )

    def landmark_blocks(self) -> dict[str, int]:
        return {
            f"branches[{i}].{name}": size
            for i, branch in enumerate(self.branches)
            for name, size in branch.config.landmark_blocks().items()
        }

    def _scales(self, name: str) -> list[float]:
        given: list[float] | None = getattr(self, name)
        if given is not None and len(given) != len(self.branches):
            raise FieldError(name, f"must be {len(self.branches)} numbers, one per branch, got {len(given)}")
        return [1.0] * len(self.branches) if given is None else given


class ParallelState(State):
    """The states of the branches; its tensors are theirs, by names such as `0.keys`."""

    def __init__(self, branches: list[State]) -> None:
        self.branches = branches

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {
            f"{i}.{name}": tensor for i, state in enumerate(self.branches) for name, tensor in state.tensors.items()
        }

    def update(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            i, _, inner = name.partition(".")
            self.branches[int(i)].update(**{inner: tensor})

    def reset(self) -> None:
        for state in self.branches:
            state.reset()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for i, state in enumerate(self.branches):
            start = f"{i}."
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            state.load(own)

    def to(self, device: torch.device | str) -> Self:
        for state in self.branches:
            state.to(device)
        return self

    def keep_in(self, place: str | Path) -> bool:
        return any([state.keep_in(place) for state in self.branches])

    def nbytes(self) -> int:
        return sum(state.nbytes() for state in self.branches)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for state in self.branches:
            state._map(function)


class Parallel(Mixer):
    def __init__(self, config: ParallelConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.input_scales is not None and config.output_scales is not None, "resolve() fills them in"
        self.config = config
        branches = nn.ModuleList(branch.build(model, layer_idx) for branch in config.branches)
        self.branches = cast("Sequence[Mixer]", branches)
        self.reads_token_ids = any(branch.reads_token_ids for branch in self.branches)
        count = len(config.branches) if config.combine == "mean" else 1
        self.input_scales = config.input_scales
        self.output_scales = [scale / count for scale in config.output_scales]

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        states: Sequence[State | None] = [None] * len(self.branches)
        if state is not None:
            assert isinstance(state, ParallelState), "new_state() makes one"
            states = state.branches
        y = None
        for branch, own, a, b in zip(self.branches, states, self.input_scales, self.output_scales, strict=True):
            out = branch(x if a == 1 else a * x, context, own)
            out = out if b == 1 else b * out
            y = out if y is None else y + out
        assert y is not None, "there is at least one branch"
        return y

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return ParallelState([branch.new_state(batch_size, device, dtype) for branch in self.branches])

    def state_bytes(self, batch: int, length: int) -> int:
        return sum(branch.state_bytes(batch, length) for branch in self.branches)

    def flops(self, batch: int, length: int) -> int:
        return sum(branch.flops(batch, length) for branch in self.branches)
