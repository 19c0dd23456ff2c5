"""The cache of a whole model, as transformers' generate() wants it: one state per layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from zoo.blocks import State


class ZooCache(Cache):
    """Per-layer states (None where a layer has no mixer) and how many real tokens each row has seen."""

    is_compileable = False

    def __init__(self, states: list[State | None], batch_size: int, device: torch.device) -> None:
        self.layers = states  # the name transformers uses
        self.seen = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._length = 0

    def advance(self, real_tokens: Tensor | int, length: int) -> None:
        """Count a chunk: `real_tokens` `[batch]` (or one number for all rows) of its `length` columns."""
        self.seen = self.seen + real_tokens
        self._length += length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self._length

    def get_max_length(self) -> int:
        return -1  # unbounded

    @property
    def is_croppable(self) -> bool:
        return False  # a recurrent state cannot forget its last tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each("reorder", beam_idx)
        self.seen = self.seen.index_select(0, beam_idx.to(self.seen.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("repeat", repeats)
        self.seen = self.seen.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each("select", indices)
        self.seen = self.seen.index_select(0, indices.to(self.seen.device))

    def reset(self) -> None:
        self._each("reset")
        self.seen = torch.zeros_like(self.seen)
        self._length = 0

    def keep_in(self, place: str | Path) -> bool:
        """Keep off the device what landmark layers with `top_k` read a little of at each step: all keys and values but
        the landmarks', in CPU memory (`"cpu"`) or in nameless files in a folder. Returns whether there is such a layer.

        Raises:
            StorageError: the folder cannot be used.
        """
        return any([state.keep_in(place) for state in self.layers if state is not None])

    def nbytes(self) -> int:
        """Bytes of all states, without what is kept off the device."""
        return sum(state.nbytes() for state in self.layers if state is not None)

    def __repr__(self) -> str:
        return f"ZooCache({len(self.layers)} layers, {self._length} tokens, {self.nbytes()} bytes)"

    def _each(self, method: str, *arguments: Tensor | int) -> None:
        for state in self.layers:
            if state is not None:
                getattr(state, method)(*arguments)
