"""Memory for what a state keeps off the device: the CPU's, or a file's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


class StorageError(ValueError):
    """The place cannot keep a cache; the message says which and why."""


class Storage:
    """Tensors in CPU memory (`"cpu"`), or each in a file of its own in a folder, mapped into memory.

    A file has no name once it is mapped: the system removes it with the tensor, or when the process ends, however it
    ends. Its room on the disk is taken at once, so that a full disk is an error and no crash later.

    Raises:
        StorageError: the folder is none, cannot be written to, or has no room.
    """

    def __init__(self, place: str | Path) -> None:
        self.folder = None if place == "cpu" else Path(place)
        self.empty((1,), torch.uint8)

    @staticmethod
    def _take_room(file: IO[bytes], size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        piece = bytes(min(size, 2**24))  # macOS has none
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose content is undefined."""
        size = torch.Size(shape).numel()
        if self.folder is None or size == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            with tempfile.NamedTemporaryFile(prefix="zoo-cache-", dir=self.folder) as file:
                self._take_room(file, size * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
        except (OSError, RuntimeError) as error:  # RuntimeError: what torch cannot map, such as a name not in UTF-8
            needed = f"{size * dtype.itemsize:,} bytes of the cache"
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise StorageError(
                f"{self.folder}: cannot keep {needed} ({reason}); give `cpu`, or a folder that can be written to and "
                "has room"
            ) from None
