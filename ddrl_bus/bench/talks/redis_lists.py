"""Two lists of a Redis server over a unix socket: RPUSH, one call a message, and BLPOP."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.talks.talk import Talk, blank, turns
from ddrl_bus.launch.node import die_with

SERVER: Final = "redis-server"


class _Lists:
    def __init__(self, socket: str, out: str, into: str) -> None:
        import redis

        self._client: Any = redis.Redis(unix_socket_path=socket)
        self._out, self._into = out, into
        self.close = self._client.close

    def send(self, size: int) -> None:
        self._client.rpush(self._out, blank(size))

    def recv(self, _size: int) -> None:
        self._client.blpop([self._into])


@contextmanager
def lists(folder: str) -> Iterator[Talk]:
    with _server(folder) as socket, turns(_Lists, (socket, "there", "back"), (socket, "back", "there")) as talk:
        yield talk


@contextmanager
def _server(folder: str) -> Iterator[str]:
    """One that writes nothing to disk; its socket."""
    import redis

    socket = f"{folder}/redis"
    options = ["--port", "0", "--unixsocket", socket, "--dir", folder, "--save", "", "--appendonly", "no"]
    with subprocess.Popen(
        [SERVER, *options], stdout=subprocess.DEVNULL, preexec_fn=partial(die_with, os.getpid())
    ) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not _answers(redis.Redis(unix_socket_path=socket), redis.ConnectionError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{SERVER} {' '.join(options)}: does not answer; type it to see why")
                time.sleep(0.05)
            yield socket
        finally:
            process.kill()


def _answers(client: Any, refusal: type[Exception]) -> bool:
    try:
        client.ping()
    except refusal:
        return False
    finally:
        client.close()
    return True
