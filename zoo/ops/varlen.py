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


def real_first(mask: Tensor) -> Tensor:
    """`[batch, length]` int64: the columns of each row's real tokens in order, then the others. A stable argsort of
    `~mask`, in linear time."""
    counted = mask.cumsum(1)
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(counted)
    places = torch.where(mask, counted - 1, counted[:, -1:] + index - counted)
    return torch.empty_like(places).scatter_(1, places, index)


def _chunk_for(length: int, max_chunk: int) -> int:
    """The smallest power of two that holds `length` tokens, up to `max_chunk`."""
    return min(max_chunk, 1 << (max(length, 1) - 1).bit_length())


class RowChunks:
    """Rows cut into chunks of equal size, each row a document of its own whose last chunk is padded with zeros.

    chunk    tokens in a chunk
    lanes    documents that run side by side: chunks `lanes * p` to `lanes * p + lanes - 1` stand at position p
    tokens   `[chunks]` int64, how many of each chunk's tokens are not padding
    starts   position -> the rows of the state whose documents begin there
    ends     position -> the rows of the state whose documents end there
    """

    def __init__(self, batch: int, length: int, max_chunk: int, device: torch.device) -> None:
        self.lanes, self.length, self.chunk = batch, length, _chunk_for(length, max_chunk)
        self.positions = -(-length // self.chunk)
        begins = torch.arange(0, length, self.chunk, device=device)
        self.tokens = (length - begins).clamp(max=self.chunk).repeat_interleave(batch)
        self.starts = {0: slice(0, batch)}
        self.ends = {self.positions - 1: slice(0, batch)}

    def spread(self, x: Tensor) -> Tensor:
        """`[batch, length, heads, dim]` to `[chunks, heads, chunk, dim]`, contiguous."""
        padding = self.positions * self.chunk - self.length
        if padding:
            x = functional.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (self.positions, self.chunk)).permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        rows = x.unflatten(0, (self.positions, self.lanes)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return rows[:, : self.length].contiguous()


class DocumentChunks:
    """As RowChunks, for documents packed into one row: each begins a chunk, and they follow each other in one lane. An
    empty document has no chunk."""

    lanes = 1

    def __init__(self, cu_seqlens: Tensor, length: int, max_chunk: int) -> None:
        lengths = cu_seqlens.diff().long()
        # Chunks about as long as the mean document: padding then never much more than doubles the work.
        self.chunk = _chunk_for(length // len(lengths), max_chunk)
        counts = (lengths + self.chunk - 1) // self.chunk
        ends = counts.cumsum(0)
        full = lengths.nonzero()[:, 0]
        first, last = (ends - counts)[full], ends[full] - 1
        self.positions = int(ends[-1])
        self.starts = {p: slice(i, i + 1) for p, i in zip(first.tolist(), full.tolist(), strict=True)}
        self.ends = {p: slice(i, i + 1) for p, i in zip(last.tolist(), full.tolist(), strict=True)}
        self.tokens = torch.full((self.positions,), self.chunk, device=cu_seqlens.device)
        self.tokens[last] = (lengths[full] - 1) % self.chunk + 1
        documents = document_ids(cu_seqlens, length)
        positions = torch.arange(length, device=cu_seqlens.device) - cu_seqlens[documents]
        self.slot = (ends - counts)[documents] * self.chunk + positions

    def spread(self, x: Tensor) -> Tensor:
        """`[1, length, heads, dim]` to `[chunks, heads, chunk, dim]`, contiguous."""
        slots = x.new_zeros(self.positions * self.chunk, *x.shape[2:]).index_copy_(0, self.slot, x[0])
        return slots.unflatten(0, (self.positions, self.chunk)).transpose(1, 2).contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)[None]


def max_chunks(length: int, documents: int, max_chunk: int) -> int:
    """At least as many chunks as DocumentChunks makes, whatever the documents' lengths."""
    return length // _chunk_for(length // documents, max_chunk) + documents
