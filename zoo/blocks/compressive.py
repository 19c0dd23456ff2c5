"""Compressive attention: the last tokens in full, and of all before them a pyramid of slots, each older level twice as
coarse, so that a query sees of T tokens about 2 w + m log2(T / m) keys. With w the window, m the slots of a level:

    o_t = softmax([rope(q_t) rope(k_j) : j = s_1 ... t, and q_t k^l_i : visible slots i, l] / sqrt(D)) [v_j, v^l_i]
    k^l_i = g * k^(l-1)_(2i) + (1 - g) * k^(l-1)_(2i+1)       g = sigmoid(W [k^(l-1)_(2i), k^(l-1)_(2i+1)]),  k^0 = k
    y = W_o (o)

and values alike, with a W of their own. Slot i of level l stands for the tokens 2^l i ... 2^l (i+1) - 1; being between
those it is made of, it is no larger at any depth, and the same W serves every level. A query t sees in full its own
block of w tokens up to itself and the whole block before, and of level l the tokens s_(l+1) ... s_l - 1:

    s_1 = w max(0, floor(t / w) - 1),      s_(l+1) = max(0, s_l - 2^l m), rounded down to a multiple of 2^(l+1)

which are m or m + 1 whole slots (less at the text's start). Every token before s_1 is thus in exactly one visible slot,
and no slot holds a token after s_1. Slots are not rotated, nor the queries they are compared with.

Near are: Compressive Transformer (Rae et al. 2019, arXiv:1911.05507), which compresses old memories once, by a fixed
rate, into a queue that forgets; and log-linear attention (Guo et al. 2025, arXiv:2506.04761), whose Fenwick tree halves
the past in the same way, but keeps of each span a linear-attention state, weighted by the token. Here a span is m keys
of a softmax, what is learned is how two become one, and nothing is forgotten altogether.

B batch, T length, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from zoo.blocks.linear import in_projection
from zoo.blocks.slots import Position, SlotConfig, SlotMixer, Slots, offsets_of, places_of
from zoo.ops.varlen import real_first
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig(SlotConfig):
    """Attention to a window in full and to everything before in ever coarser slots.

    num_heads     query heads.
    num_kv_heads  key and value heads (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions of the window; null for none.
    window        a query sees its own block of so many tokens, and the one before, in full.
    slots         of every level; a slot of the first stands for two tokens, one of the next for four, and so on.
    """

    window: Size = 256
    slots: Size = 32

    def resolve(self, model: ZooConfig) -> Self:
        if self.window % 2:
            raise FieldError("window", f"must be even, as a slot is made of two tokens, got {self.window}")
        return super().resolve(model)


class Merge(nn.Module):
    """Two keys (or values) become one between them, in each dimension as much of either as a gate says."""

    def __init__(self, head_dim: int, model: ZooConfig) -> None:
        super().__init__()
        self.gate_proj = in_projection(model, 2 * head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 2, K, D]` to `[n, 1, K, D]`."""
        older, newer = x.unbind(1)
        gate = self.gate_proj(torch.cat([older, newer], -1)).sigmoid()
        return torch.lerp(newer, older, gate.to(x.dtype))[:, None]


class Compressive(SlotMixer):
    parts, made = 2, 1

    def __init__(self, config: CompressiveConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__(config, model, layer_idx)
        self.block, self.slots = config.window, config.slots
        self.merge_k = Merge(self.head_dim, model)
        self.merge_v = Merge(self.head_dim, model)

    def recent(self, position: Position) -> Position:
        return (position // self.block - 1) * self.block * (position >= self.block)

    def visible(self, position: int) -> list[tuple[int, int]]:
        end, level, levels = self.recent(position), 0, []
        while end > 0:
            level += 1
            start = max(0, self._start(end, level))
            levels.append((start >> level, end >> level))
            end = start
        return levels

    def _start(self, end: Position, level: int) -> Position:
        """The first token of a level that ends before token `end`, or if the text is shorter a number below 0."""
        return (end - (self.slots << level)) >> (level + 1) << (level + 1)

    def make(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.merge_k(keys), self.merge_v(values)

    def see(
        self, slots: Slots, seen: list[int], ends: list[int], row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The queries of a block see the same slots: these side by side, for every block that sees any.
        firsts = [max(2, before // self.block) for before in seen]
        counts = [max(0, (end - 1) // self.block + 1 - first) for first, end in zip(firsts, ends, strict=True)]
        device = position.device
        if sum(counts) == 0:
            nothing = torch.zeros_like(position)
            return slots.keys, slots.values, nothing, nothing
        first_block = torch.tensor(firsts, device=device)
        of_row, block = places_of(counts, device)
        end = (block + first_block[of_row] - 1) * self.block
        index, there = [], []
        for i, begin in enumerate(slots.begin):
            level = i + 1
            start = self._start(end, level).clamp(min=0)
            slot = (start >> level)[:, None] + torch.arange(self.slots + 1, device=device)
            there.append(slot < (end >> level)[:, None])
            index.append(slot + begin[of_row, None])
            end = start
        visible = torch.cat(there, 1)
        chosen = torch.cat(index, 1).gather(1, real_first(visible)).clamp(0, len(slots.keys) - 1)
        keys, values = (x.index_select(0, chosen.flatten()) for x in (slots.keys, slots.values))

        mine = position // self.block - first_block[row] + torch.tensor(offsets_of(counts), device=device)[row]
        sees = position >= 2 * self.block
        first = torch.where(sees, mine * visible.shape[1], 0)
        count = visible.sum(1)[mine.clamp(0, len(visible) - 1)]
        return keys, values, first, first + torch.where(sees, count, 0)

    def making_flops(self, slots: int) -> int:
        return slots * self.num_kv_heads * 2 * self.merge_k.gate_proj.weight.numel()
