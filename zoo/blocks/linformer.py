"""Linformer (Wang et al. 2020, arXiv:2006.04768, section 4) in a causal, blockwise form. The paper's projects all keys
and values of a text to a fixed number of them, which lets every token see those after it; here each block of b tokens
is projected to r slots by itself, once it is complete, with the same matrices:

    K~_c = E K_c,   V~_c = F V_c            E, F [r, b], shared by the heads of a layer
    o_t = softmax([rope(q_t) rope(k_j) : j <= t in t's block c, and q_t K~_i : i < c] / sqrt(D)) [v_j, V~_i]
    y = W_o (o)

A token therefore sees up to b tokens and r slots of every block before: quadratic in the length still, by a factor b/r
less. Projected keys are not rotated, nor are the queries they are compared with.

B batch, T length, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.blocks.slots import Position, SlotConfig, SlotMixer, Slots
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(SlotConfig):
    """Linformer, causal and blockwise: attention within a block, and to a few projections of each block before.

    num_heads     query heads.
    num_kv_heads  key and value heads (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions within blocks; null for none.
    block         tokens in a block, counted from each document's start.
    slots         keys and values that a complete block is projected to.
    """

    block: Size = 256
    slots: Size = 16

    def resolve(self, model: ZooConfig) -> Self:
        if self.slots > self.block:
            raise FieldError("slots", f"must be at most block ({self.block}), got {self.slots}: that would add keys")
        return super().resolve(model)


class Linformer(SlotMixer):
    def __init__(self, config: LinformerConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__(config, model, layer_idx)
        self.block = self.parts = config.block
        self.made = config.slots
        self.project_k = nn.Parameter(torch.empty(config.slots, config.block))
        self.project_v = nn.Parameter(torch.empty(config.slots, config.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.project_k, self.project_v):
            init.normal_(projection, std=self.block**-0.5)  # a slot is as large as a token

    def recent(self, position: Position) -> Position:
        return position // self.block * self.block

    def visible(self, position: int) -> list[tuple[int, int]]:
        blocks = position // self.block
        return [(0, blocks * self.made)] if blocks else []

    def make(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (self.project_k, keys), (self.project_v, values)
        k, v = (torch.einsum("sb,nbkd->nskd", projection, x) for projection, x in pairs)
        return k, v

    def see(
        self, slots: Slots, seen: list[int], ends: list[int], row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = slots.begin[0, row]
        return slots.keys, slots.values, first, first + position // self.block * self.made

    def making_flops(self, slots: int) -> int:
        return slots * 2 * self.block * self.num_kv_heads * self.head_dim
