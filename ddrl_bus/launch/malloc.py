"""Keep freed memory in the process.

Large frames and activations come and go many times a second. glibc gives each one back to the kernel and faults it in
again page by page, which takes longer than copying it. Linux with glibc only; elsewhere this does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_MAX: Final = -4
_M_ARENA_MAX: Final = -8
_NEVER: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Have malloc return no memory to the kernel, for the life of this process."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_M_MMAP_MAX, 0)  # a mapping of its own would go back as soon as it is freed
        libc.mallopt(_M_ARENA_MAX, 1)  # a thread's own arena cannot hold what is larger than 64 MiB
