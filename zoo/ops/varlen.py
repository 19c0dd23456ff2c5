"""Packed documents: several sequences laid end to end in one row, with `cu_seqlens` marking where each begins."""

from __future__ import annotations

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `cu_seqlens` is int32 `[n+1]` and its batch is one row.

    The values (from 0, ascending, ending at `length`) are checked on the CPU only: on a GPU reading them would wait
    for the device in every layer.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [n+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 (documents packed into one row), got a batch of {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the length {length}, got {cu_seqlens.tolist()}")


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """`[length]` int64: the document each token belongs to, counted from 0."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


class ChunkLayout:
    """Documents laid out so that each begins on a chunk boundary, as chunked ops want them.

    slot     `[length]` int64, where each token stands among the `num_chunks * chunk` slots; the slots left over
             are padding at documents' ends.
    first    `[n]` int64, the first chunk of each document (of the next one, for an empty document).
    count    `[n]` int64, how many chunks each document has; 0 for an empty one.
    """

    def __init__(self, cu_seqlens: Tensor, length: int, chunk: int) -> None:
        starts = cu_seqlens[:-1].long()
        self.chunk = chunk
        self.count = (cu_seqlens.diff().long() + chunk - 1) // chunk
        ends = self.count.cumsum(0)
        self.first = ends - self.count
        self.num_chunks = int(ends[-1])
        documents = document_ids(cu_seqlens, length)
        tokens = torch.arange(length, device=cu_seqlens.device)
        self.slot = self.first[documents] * chunk + tokens - starts[documents]

    def spread(self, x: Tensor) -> Tensor:
        """`[1, length, ...]` to `[1, num_chunks * chunk, ...]`, zeros in the padding."""
        padded = x.new_zeros(x.shape[0], self.num_chunks * self.chunk, *x.shape[2:])
        return padded.index_copy(1, self.slot, x)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x.index_select(1, self.slot)
