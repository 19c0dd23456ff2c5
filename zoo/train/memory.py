"""What glibc does with memory that torch frees."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tells glibc to keep what torch frees instead of giving it back, for the rest of the process.

    A training step asks for the same large blocks again and again, and having the kernel zero them anew each time costs
    a CPU run 10 to 20%, and long sequences more: without this, glibc maps every block of over 32 MB afresh.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
