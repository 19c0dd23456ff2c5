"""One set of weights at several depths (Universal Transformer, arXiv:1807.03819; ALBERT, arXiv:1909.11942), with
additions of low rank that are each depth's own (Zamba2, arXiv:2411.15242, section 2; LoRA, arXiv:2106.09685).

    depth i:  W_i x = W x + U_i (D_i x)      for the projections W that read what enters the mixer or the feed-forward
              y_i   = O_i f_i(x)             out_proj: of the last sublayer f, before its output joins the stream

W [out, in] is every depth's; D_i `down` [rank, in], U_i `up` [out, rank] and O_i [hidden, hidden] are depth i's.
Several projections may be one matrix cut in pieces, as an MLP's gate and up: they have one D_i between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.blocks.base import Part
from zoo.blocks.linear import AdaptedLinear
from zoo.schema import FieldError, Size, from_mapping, shown

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """`shared:` of a block: true, or a mapping with what each depth has of its own.

    mixer_adapter  rank of the additions to the mixer's projections; default none.
    ffn_adapter    rank of the additions to the feed-forward's.
    out_proj       multiply what the block's last sublayer gives (the feed-forward, where there is one) by a matrix.
    """

    mixer_adapter: Size | None = None
    ffn_adapter: Size | None = None
    out_proj: bool = False


def shared_from_value(value: Any, path: str) -> SharedConfig | None:
    """What `shared: true`, `shared: {...}`, or nothing says.

    Raises:
        FieldError: something else, or an unknown field.
    """
    if value is None or isinstance(value, bool):
        return SharedConfig() if value else None
    if not isinstance(value, dict):
        raise FieldError(path, f"must be true or a mapping such as {{mixer_adapter: 128}}, got {shown(value)}")
    return from_mapping(SharedConfig, value, path)


class Adapter(nn.Module):
    """`down` [rank, in] and the `up` [out, rank] of all projections of a group, one under the other. It starts as no
    change: up is 0."""

    def __init__(self, projections: list[nn.Linear], rank: int, model: ZooConfig) -> None:
        super().__init__()
        self.std = model.initializer_range
        self.rows = [projection.out_features for projection in projections]
        self.down = nn.Parameter(torch.empty(rank, projections[0].in_features))
        self.up = nn.Parameter(torch.empty(sum(self.rows), rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.down, std=self.std)
        init.zeros_(self.up)

    def flops(self) -> int:
        """Of one token."""
        return 2 * (len(self.rows) * self.down.numel() + self.up.numel())


def make_adaptable(part: Part) -> None:
    """Put an AdaptedLinear where each of the part's `adapted` projections is."""
    for name in (name for group in _groups(part) for name in group):
        plain = getattr(part, name)
        adapted = AdaptedLinear(plain.in_features, plain.out_features, std=plain.std, bias=plain.bias is not None)
        setattr(part, name, adapted)


def adapters(part: Part, rank: int, model: ZooConfig) -> nn.ModuleDict:
    """One depth's, by the first projection of each group."""
    return nn.ModuleDict(
        {group[0]: Adapter([getattr(part, name) for name in group], rank, model) for group in _groups(part)}
    )


def lent(part: Part, own: nn.ModuleDict) -> dict[str, Tensor]:
    """What `own` adapters lend to the part's projections, by the names there."""
    tensors: dict[str, Tensor] = {}
    for group in _groups(part):
        adapter = own[group[0]]
        assert isinstance(adapter, Adapter)
        for name, up in zip(group, adapter.up.split(adapter.rows), strict=True):
            tensors |= {f"{name}.down": adapter.down, f"{name}.up": up}
    return tensors


def _groups(part: Part) -> list[list[str]]:
    """`adapted`, of those projections that there are."""
    present = [[name for name in group if getattr(part, name) is not None] for group in part.adapted]
    return [group for group in present if group]
