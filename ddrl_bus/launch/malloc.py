"""Keep freed memory in the process.

Large frames come and go a hundred times a second. glibc gives each one back to the kernel and faults it in again page
by page, which takes longer than copying it. Linux with glibc only; elsewhere this does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_TRIM_BYTES: Final = 512 << 20
_MMAP_BYTES: Final = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> None:
    """Raise the sizes from which malloc returns memory to the kernel, for the life of this process."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
