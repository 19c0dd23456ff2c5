"""Which keys a query sees: one description that every backend, the analytic count and the cache read.

Positions are ranks: a token's place among the real tokens of its document. A causal query at t sees itself and

    window and dilation   t, t - d, t - 2d, ...: `window` of them (LongNet, arXiv:2307.02486, section 3; a dilation
                          without a window is the strided attention of Sparse Transformers, arXiv:1904.10509)
    sinks                 the first `num_sinks` keys, everywhere. In causal attention that is also what global tokens
                          at the start are (Longformer, arXiv:2004.05150; BigBird, arXiv:2007.14062)
    stride                the keys at stride - 1, 2 stride - 1, ... ("fixed" attention, arXiv:1904.10509, section 4.3)
    random blocks         of the earlier blocks, some that are drawn for the block of t (BigBird, section 2)

The draw depends on the seed and the block's number alone, so that a longer text, a chunk or a cache changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

AT_ONCE = 2**20  # queries counted at once


@dataclass(frozen=True)
class Pattern:
    """See above. Without window, dilation, stride and random blocks a query sees every key up to its own."""

    window: int | None = None
    num_sinks: int = 0
    dilation: int = 1
    stride: int | None = None
    random_blocks: int = 0
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "dilation", "stride", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("num_sinks", "random_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if (self.stride is not None or self.random_blocks) and (self.window is None or self.dilation > 1):
            raise ValueError("stride and random_blocks need a window, without dilation")

    @property
    def is_plain(self) -> bool:
        """Whether window and num_sinks say it all."""
        return self.dilation == 1 and self.stride is None and not self.random_blocks

    @property
    def reach(self) -> int | None:
        """How many tokens, its own included, a query looks back at most, beyond which it sees the sinks alone; None is
        no limit."""
        if self.window is None or self.stride is not None or self.random_blocks:
            return None
        return (self.window - 1) * self.dilation + 1

    def numbers(self) -> list[int]:
        """For a torch operator, which takes no objects; `Pattern.of` reads them."""
        return [-1 if value is None else value for value in vars(self).values()]

    @classmethod
    def of(cls, numbers: list[int]) -> Pattern:
        """The inverse of `numbers`."""
        return cls(*(None if number == -1 else number for number in numbers))  # type: ignore[arg-type]

    def visible(self, own: Tensor, keys: Tensor) -> Tensor:
        """bool, where the query at `own` sees the key at `keys` (int64, broadcast against each other)."""
        distance = own - keys
        near = distance % self.dilation == 0
        if self.window is not None:
            near &= distance < self.window * self.dilation
        seen = near | (keys < self.num_sinks)
        if self.stride is not None:
            seen |= keys % self.stride == self.stride - 1
        if self.random_blocks:
            chosen, block = self.chosen(own // self.block_size), keys // self.block_size
            for drawn in chosen:
                seen |= block == drawn
        return seen & (distance >= 0)

    def keys(self, own: Tensor) -> Tensor:
        """int64, ascending: the positions that any of the queries at `own` sees. `own` ascends by the dilation."""
        first, last = int(own[0]), int(own[-1])
        start = first % self.dilation
        if self.window is not None:
            start = max(start, first - (self.window - 1) * self.dilation)

        def positions(*bounds: int) -> Tensor:
            return torch.arange(*bounds, device=own.device)

        parts = [positions(start, last + 1, self.dilation)]
        if self.is_plain and (start <= self.dilation - 1 or not self.num_sinks):
            return parts[0]
        parts.append(positions(0, min(self.num_sinks, last + 1)))
        if self.stride is not None:
            parts.append(positions(min(self.stride - 1, last + 1), last + 1, self.stride))
        if self.random_blocks:
            blocks = self.chosen(torch.unique(own // self.block_size)).unique()
            blocks = blocks[blocks >= 0]
            parts.append((blocks[:, None] * self.block_size + positions(0, self.block_size)).flatten())
        return torch.cat(parts).unique()

    def chosen(self, blocks: Tensor) -> Tensor:
        """`[random_blocks, *blocks.shape]` int64: the earlier blocks drawn for each of `blocks`, all different; -1 for
        none, where there are fewer (Floyd's algorithm: Bentley, Communications of the ACM 30, 1987)."""
        chosen: list[Tensor] = []
        for i in range(self.random_blocks):
            last = blocks - self.random_blocks + i
            drawn = _hash(_hash(_hash(torch.full_like(blocks, self.seed)) ^ blocks) ^ i) % (last + 1).clamp_min(1)
            for other in tuple(chosen):
                drawn = torch.where(drawn == other, last, drawn)  # never twice: no other has drawn `last`
            chosen.append(torch.where(last < 0, -1, drawn))
        return torch.stack(chosen)

    def visible_pairs(self, length: int) -> int:
        """How many (query, key) pairs are visible in a document of `length` tokens."""
        if self.is_plain:
            span = length if self.window is None else min(self.window + self.num_sinks, length)
            # Query t (from 1) sees min(t, span) keys, for a window and its sinks together.
            return span * (span + 1) // 2 + (length - span) * span
        return _count(self, length)


@lru_cache(maxsize=256)
def _count(pattern: Pattern, length: int) -> int:
    total = 0
    for start in range(0, length, AT_ONCE):
        own = torch.arange(start, min(start + AT_ONCE, length), device="cpu")
        oldest = _oldest(pattern, own)
        near = (own - oldest) // pattern.dilation + 1
        # A dilated window may hold some of the sinks, those before `num_sinks` in its class.
        inside = ((own.clamp_max(pattern.num_sinks - 1) - oldest) // pattern.dilation + 1).clamp_min(0)
        sinks = (own + 1).clamp_max(pattern.num_sinks)
        total += int((near + sinks - inside).sum())
        if pattern.stride is not None:
            total += int(_strided(pattern, pattern.num_sinks, oldest).sum())
        if pattern.random_blocks:
            for block in pattern.chosen(own // pattern.block_size):
                # What of the block is between the sinks and the window, and not on the stride.
                first = (block * pattern.block_size).clamp_min(pattern.num_sinks)
                end = torch.minimum((block + 1) * pattern.block_size, oldest)
                fresh = (end - first).clamp_min(0) - _strided(pattern, first, end)
                total += int(fresh[block >= 0].sum())
    return total


def _oldest(pattern: Pattern, own: Tensor) -> Tensor:
    """The first key of each query's window."""
    oldest = own % pattern.dilation
    if pattern.window is None:
        return oldest
    return torch.maximum(oldest, own - (pattern.window - 1) * pattern.dilation)


def _strided(pattern: Pattern, first: Tensor | int, end: Tensor) -> Tensor:
    """How many keys from `first` to before `end` are on the stride."""
    if pattern.stride is None:
        return torch.zeros_like(end)
    return (end // pattern.stride - first // pattern.stride).clamp_min(0)


def _hash(x: Tensor) -> Tensor:
    """Well mixed 32 bits of int64 `x` (Mueller's and Wellons' lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
