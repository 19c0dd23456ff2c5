"""Where the queries and keys of block_sparse_attention stand, and which queries chose each block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.varlen import document_ids, real_first


class Lists(NamedTuple):
    """The choices of every block, those of one list after those of another, each in the order of the queries.

    Block `place` of the document that begins at `base` has one list for each kv head: number `base + place` times K,
    plus the head.

    choices  `[N*K*S]`, places in `blocks`; those that are none come last
    bounds   `[lists + 1]`, where each list begins
    """

    choices: Tensor
    bounds: Tensor


class Places:
    """Positions are counted from a document's start, or among a row's real keys.

    start     `[L]`, the column where each key's document begins; None without documents
    position  `[B, L]`, of a key among its row's real ones, -1 where it is masked; None without a mask
    order     `[B, L]`, the columns of the real keys, then of the others; None without a mask

    Legend: B batch, N queries of all rows, K kv heads, S blocks per query, L keys of a row.
    """

    def __init__(
        self, q: Tensor, k: Tensor, block_size: int, cu_seqlens: Tensor | None, key_mask: Tensor | None
    ) -> None:
        self.batch, self.length = q.shape[:2]
        self.key_length, self.kv_heads = k.shape[1:3]
        self.block_size, self.device, self.cu_seqlens = block_size, q.device, cu_seqlens
        self.start = self.position = self.order = None
        if cu_seqlens is not None:
            self.document = document_ids(cu_seqlens, self.key_length)
            self.start = cu_seqlens.long()[self.document]
        if key_mask is not None:
            self.position = (key_mask.long().cumsum(1) - 1).masked_fill(~key_mask, -1)
            self.order = real_first(key_mask)

    def per_key(self) -> Tensor:
        """`[B, L]`: `position`, with or without documents and a mask."""
        if self.position is not None:
            return self.position
        index = torch.arange(self.key_length, device=self.device)
        return (index if self.start is None else index - self.start).expand(self.batch, -1)

    def of_queries(self, x: Tensor) -> Tensor:
        """`[N]`: what x `[B, L]` says of the queries' own keys."""
        return x[:, self.key_length - self.length :].flatten()

    def blocks(self, block_indices: Tensor) -> Tensor:
        """`[N, K, S]` int32: each block once, and -1 for none and for one after the query."""
        own = self.of_queries(self.per_key())[:, None, None]
        blocks = block_indices.flatten(0, 1).sort(-1).values
        unwanted = (blocks < 0) | (blocks * self.block_size > own)
        unwanted[..., 1:] |= blocks[..., 1:] == blocks[..., :-1]
        return blocks.masked_fill_(unwanted, -1).int()

    def base(self) -> tuple[Tensor, int]:
        """`[B, L]`, the number of the first block of each key's document, and a bound on the blocks of all."""
        if self.cu_seqlens is None:
            per_row = -(-self.key_length // self.block_size)
            rows = torch.arange(self.batch, device=self.device)[:, None] * per_row
            return rows.expand(-1, self.key_length), self.batch * per_row
        counts = (self.cu_seqlens.diff().long() + (self.block_size - 1)) // self.block_size
        bound = self.key_length // self.block_size + counts.numel()
        return (counts.cumsum(0) - counts)[self.document][None], bound

    def lists(self, blocks: Tensor) -> Lists:
        """Of what `blocks` returned."""
        base, bound = self.base()
        heads = torch.arange(self.kv_heads, device=self.device, dtype=torch.int32)[:, None]
        number = (self.of_queries(base).int()[:, None, None] + blocks) * self.kv_heads + heads
        count = bound * self.kv_heads
        number, choices = number.masked_fill_(blocks < 0, count).flatten().sort(stable=True)
        every = torch.arange(count + 1, device=self.device, dtype=torch.int32)
        return Lists(choices, torch.searchsorted(number, every))
