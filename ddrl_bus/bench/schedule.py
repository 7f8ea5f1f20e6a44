"""When messages are due: set in advance, by the kernel's timer, whatever becomes of the ones before.

A latency that is counted from the moment a message was *due* has no coordinated omission: a sender that is held up does
not hide by sending later what others wait for.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Iterator
from typing import Final

_ABSTIME: Final = 1  # timerfd.h
_NS: Final = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Schedule:
    """`count` moments at `rate` a second, the first one a moment from now. Linux.

    Args:
        phase: part of an interval that they are late by, so that several schedules do not fall on the same moments.
    """

    def __init__(self, rate: float, count: int, phase: float = 0.0) -> None:
        self._period = round(_NS / rate)
        self._first = time.monotonic_ns() + 20_000_000 + round(phase * self._period)
        self._given, self._count = 0, count
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
        spec = _Itimerspec(_Timespec(*divmod(self._period, _NS)), _Timespec(*divmod(self._first, _NS)))
        if self.fd < 0 or libc.timerfd_settime(self.fd, _ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "no timer from the kernel")

    def fileno(self) -> int:
        """Readable once a moment has come."""
        return self.fd

    def wait(self) -> None:
        """Until one has come."""
        select.select([self.fd], [], [])

    def due(self) -> Iterator[int]:
        """The moments that have come since the last call, in nanoseconds of the monotonic clock."""
        try:
            come = int.from_bytes(os.read(self.fd, 8), "little")
        except BlockingIOError:
            return
        for _ in range(min(come, self._count - self._given)):
            yield self._first + self._given * self._period
            self._given += 1

    @property
    def over(self) -> bool:
        return self._given == self._count

    def close(self) -> None:
        os.close(self.fd)
