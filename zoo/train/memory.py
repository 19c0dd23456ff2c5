"""What glibc does with memory that torch frees."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Tells glibc to keep what torch frees instead of giving it back, for the rest of the process.

    A training step asks for the same large blocks again and again, and having the kernel zero them anew each time costs
    a CPU run 10 to 20%, and long sequences more: without this, glibc maps every block of over 32 MB afresh.
    """
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def give_freed_memory_back() -> None:
    """Undoes keep_freed_memory: the limits that glibc's own rule comes to once a large block was freed (mallopt(3))."""
    _set({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})


def _set(limits: dict[int, int]) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, value in limits.items():
            libc.mallopt(name, value)
