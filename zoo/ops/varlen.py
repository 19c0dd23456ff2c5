"""Packed documents: several sequences laid end to end in one row, with `cu_seqlens` marking where each begins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `cu_seqlens` is int32 `[n+1]` and its batch is one row.

    The values (from 0, ascending, ending at `length`) are checked on the CPU only: on a GPU reading them would wait
    for the device in every layer.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [n+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 (documents packed into one row), got a batch of {batch}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must ascend from 0 to the length {length}, got {cu_seqlens.tolist()}")


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """`[length]` int64: the document each token belongs to, counted from 0."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def _chunk_for(length: int, max_chunk: int) -> int:
    """The smallest power of two that holds `length` tokens, up to `max_chunk`."""
    return min(max_chunk, 1 << (max(length, 1) - 1).bit_length())


class RowChunks:
    """Rows cut into chunks of equal size, each row a document of its own whose last chunk is padded with zeros.

    chunk    tokens in a chunk
    tokens   `[chunks]` int64, how many of each chunk's tokens are not padding
    first    `[n]` int64, the chunk where each document begins
    last     `[n]` int64, the chunk where each document ends
    """

    def __init__(self, batch: int, length: int, max_chunk: int, device: torch.device) -> None:
        self.batch, self.length, self.chunk = batch, length, _chunk_for(length, max_chunk)
        self.per_row = -(-length // self.chunk)
        starts = torch.arange(0, length, self.chunk, device=device)
        self.tokens = (length - starts).clamp(max=self.chunk).repeat(batch)
        self.first = torch.arange(batch, device=device) * self.per_row
        self.last = self.first + self.per_row - 1

    def spread(self, x: Tensor) -> Tensor:
        """`[batch, length, heads, dim]` to `[heads, chunks, chunk, dim]`."""
        padding = self.per_row * self.chunk - self.length
        if padding:
            x = functional.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (self.per_row, self.chunk)).permute(3, 0, 1, 2, 4).flatten(1, 2).contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        rows = x.unflatten(1, (self.batch, self.per_row)).permute(1, 2, 3, 0, 4).flatten(1, 2)
        return rows[:, : self.length]

    def enter(self, initial_state: Tensor) -> Tensor:
        """The rows of `initial_state` whose documents have chunks, in the order of `first`."""
        return initial_state

    def leave(self, state: Tensor, initial_state: Tensor) -> Tensor:
        """The final states of all documents, from those that have chunks."""
        return state


class DocumentChunks:
    """As RowChunks, for documents packed into one row: each begins a chunk. An empty document has none."""

    def __init__(self, cu_seqlens: Tensor, length: int, max_chunk: int) -> None:
        lengths = cu_seqlens.diff().long()
        # Chunks about as long as the mean document: padding then never much more than doubles the work.
        self.chunk = _chunk_for(length // len(lengths), max_chunk)
        counts = (lengths + self.chunk - 1) // self.chunk
        ends = counts.cumsum(0)
        self.full = lengths.nonzero()[:, 0]
        self.first = (ends - counts)[self.full]
        self.last = ends[self.full] - 1
        self.tokens = torch.full((int(ends[-1]),), self.chunk, device=cu_seqlens.device)
        self.tokens[self.last] = (lengths[self.full] - 1) % self.chunk + 1
        documents = document_ids(cu_seqlens, length)
        positions = torch.arange(length, device=cu_seqlens.device) - cu_seqlens[documents]
        self.slot = (ends - counts)[documents] * self.chunk + positions

    def spread(self, x: Tensor) -> Tensor:
        """`[1, length, heads, dim]` to `[heads, chunks, chunk, dim]`."""
        slots = x.new_zeros(x.shape[2], len(self.tokens) * self.chunk, x.shape[3])
        return slots.index_copy(1, self.slot, x[0].transpose(0, 1)).unflatten(1, (-1, self.chunk))

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x.flatten(1, 2).transpose(0, 1).index_select(0, self.slot)[None]

    def enter(self, initial_state: Tensor) -> Tensor:
        """The rows of `initial_state` whose documents have chunks, in the order of `first`."""
        return initial_state[self.full]

    def leave(self, state: Tensor, initial_state: Tensor) -> Tensor:
        """The final states of all documents: an empty one has its initial state."""
        return initial_state.index_copy(0, self.full, state)
