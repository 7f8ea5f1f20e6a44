"""Tcp ports for tests that run side by side."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from itertools import cycle, islice

_ROW = 16
_FIRST = range(20_000, 32_000, _ROW)  # outgoing connections use others
_firsts = islice(cycle(_FIRST), os.getpid() * 37 % len(_FIRST), None)  # processes begin far from each other


def free_ports(n: int = 2) -> int:
    """The first of `n` free ports in a row, at most 16; the next call gives others."""
    for first in islice(_firsts, len(_FIRST)):
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + n):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError
