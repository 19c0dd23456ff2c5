"""What a mixer carries from one chunk of a sequence to the next: tensors by name, one row per sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


class State:
    """Named tensors whose first dimension is the batch.

    The tensors themselves are the whole state: saving `state.tensors` and giving them to `load` restores it.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors: dict[str, Tensor] = tensors
        self._initial = {name: tensor.clone() for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def update(self, **tensors: Tensor) -> None:
        """Replace tensors by name."""
        self.tensors.update(tensors)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (int64 indices, in that order) of the batch."""
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def reorder(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from what was row `beam_idx[i]`."""
        self.select(beam_idx)

    def repeat(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Back to before the first token, with the present batch size."""
        rows = next(iter(self.tensors.values())).shape[0]
        self.tensors = {
            name: tensor[:1].expand(rows, *tensor.shape[1:]).clone() for name, tensor in self._initial.items()
        }

    def to(self, device: torch.device | str) -> Self:
        """Move to `device` (in place)."""
        device = torch.device(device)
        if any(tensor.device != device for tensor in self.tensors.values()):
            self._map(lambda tensor: tensor.to(device))
        return self

    def keep_in(self, place: str | Path) -> bool:
        """Keep what a step reads little of off the device for good, in CPU memory (`"cpu"`) or files in a folder.
        Returns whether there is such a thing: only retrieval by landmarks has it.

        Raises:
            StorageError: the folder cannot be used.
        """
        return False

    def offload(self) -> None:
        """Move to CPU memory; the next forward pass brings the state back to where it is needed."""
        self.to("cpu")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` held."""
        self.tensors = dict(tensors)

    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}


class KeyValueState(State):
    """Keys and values of every visible token: `keys`, `values` `[batch, length, num_kv_heads, head_dim]`, `mask`
    `[batch, length]` bool.

    A window bounds it: only what a later query can see is kept. Buffers grow by doubling, so that appending a token
    costs no copy of the past.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None = None, num_sinks: int = 0) -> None:
        super().__init__(keys=keys, values=values, mask=keys.new_ones(keys.shape[:2], dtype=torch.bool))
        self.window = window
        self.num_sinks = num_sinks
        self._padded = False  # whether `mask` is False anywhere
        self._buffers: dict[str, Tensor] = {}  # each tensor is a view of the start of its buffer, once it has one

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add a chunk; returns all keys, all values, and their mask (None when every key is real).

        The keys returned are those the chunk's queries may see; afterwards the state forgets what no later query can.
        """
        self._padded = self._padded or mask is not None
        if mask is None:
            mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        self.tensors = {
            "keys": self._extend("keys", keys.to(self["keys"].dtype)),
            "values": self._extend("values", values.to(self["values"].dtype)),
            "mask": self._extend("mask", mask),
        }
        seen = self["keys"], self["values"], self["mask"] if self._padded else None
        if self.window is not None:
            self._forget(self.window)
        return seen

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self._buffers = {}
        self._padded = not bool(self["mask"].all())

    def reset(self) -> None:
        super().reset()
        self._buffers = {}
        self._padded = False

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map(function)
        self._buffers = {}

    def _extend(self, name: str, new: Tensor) -> Tensor:
        """The named tensor with `new` after it along dimension 1, written into its buffer unless autograd may need the
        past as it is."""
        past = self.tensors[name]
        if torch.is_grad_enabled():
            self._buffers.pop(name, None)  # it would lack what is added here
            return torch.cat([past, new], dim=1)
        start, end = past.shape[1], past.shape[1] + new.shape[1]
        buffer = self._buffers.get(name)
        # A buffer made in inference mode is read-only outside it.
        sealed = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or sealed or buffer.shape[1] < end:
            buffer = self._allocate(past, (past.shape[0], max(end, 2 * start), *past.shape[2:]), name)
            buffer[:, :start] = past
            self._buffers[name] = buffer
        buffer[:, start:end] = new
        return buffer[:, :end]

    def _allocate(self, like: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        """A buffer of `name`, which is now `like`."""
        return like.new_empty(shape)

    def _forget(self, window: int) -> None:
        length = self["mask"].shape[1]
        if length < window + self.num_sinks:
            return
        if self._padded:
            # Rows stand at different positions: keep each column that any row still needs.
            rank = self["mask"].long().cumsum(1) - 1
            recent = rank > rank[:, -1:] - (window - 1)
            needed = ((recent | (rank < self.num_sinks)) & self["mask"]).any(0).nonzero().squeeze(1)
            self._map(lambda tensor: tensor.index_select(1, needed))
        else:
            first = length - (window - 1)
            self._map(lambda tensor: torch.cat([tensor[:, : self.num_sinks], tensor[:, first:]], dim=1))
