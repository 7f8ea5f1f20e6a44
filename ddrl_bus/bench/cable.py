"""Two hosts on one machine: network namespaces joined by a cable that can be cut, narrowed and made to lose packets."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ADDRESSES: Final = {"gpu0": "10.77.0.1", "cpu1": "10.77.0.2"}
MISSING: Final = "" if not os.geteuid() and all(map(shutil.which, ("ip", "tc", "nft"))) else "needs root, iproute2, nft"
_CLONE_NEWNET: Final = 0x40000000
_FILTER: Final = "table inet ddrl { chain in { type filter hook input priority 0; iifname %s %s drop; }; }"


def ip(*words: str) -> None:
    _do(["ip", *words])


def _do(words: Sequence[str], text: str = "") -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, input=text)


def enter(namespace: str) -> None:
    """Have this thread make its sockets there from now on."""
    with Path("/run/netns", namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")


@dataclass
class Cable:
    """Two namespaces and the veth pair between them."""

    namespaces: dict[str, str]
    ends: dict[str, str]

    def on(self, host: str) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return ("ip", "netns", "exec", self.namespaces[host])

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Both hosts see that the cable is out."""
        ip("-n", self.namespaces["gpu0"], "link", "set", self.ends["gpu0"], "down")
        try:
            yield
        finally:
            ip("-n", self.namespaces["gpu0"], "link", "set", self.ends["gpu0"], "up")

    def silent(self) -> AbstractContextManager[None]:
        """Nothing arrives any more, and nobody is told."""
        return self._filtered("")

    def deaf(self, host: str) -> AbstractContextManager[None]:
        """Nothing arrives at one of them; the other hears what it says."""
        return self._filtered("", host)

    def lossy(self, percent: int) -> AbstractContextManager[None]:
        """So many of a hundred packets are lost, each way."""
        return self._filtered(f"numgen random mod 100 < {percent}")

    @contextmanager
    def _filtered(self, which: str, *hosts: str) -> Iterator[None]:
        with ExitStack() as undo:
            for host, end in ((host, self.ends[host]) for host in hosts or self.ends):
                _do([*self.on(host), "nft", "-f", "-"], _FILTER % (end, which))
                undo.callback(_do, [*self.on(host), "nft", "delete", "table", "inet", "ddrl"])
            yield

    @contextmanager
    def narrow(self, rate: float) -> Iterator[None]:
        """So many bytes a second, each way."""
        with ExitStack() as undo:
            for host, end in self.ends.items():
                at = ("dev", end, "root")
                shape = ("tbf", "rate", f"{rate * 8:.0f}bit", "burst", "16kb", "latency", "400ms")
                _do([*self.on(host), "tc", "qdisc", "add", *at, *shape])
                undo.callback(_do, [*self.on(host), "tc", "qdisc", "del", *at])
            yield


@contextmanager
def plugged_in() -> Iterator[Cable]:
    namespaces = {host: f"ddrl-{os.getpid()}-{host}" for host in ADDRESSES}
    ends = {host: f"dd{os.getpid()}{host[0]}" for host in ADDRESSES}
    with ExitStack() as undo:
        for name in namespaces.values():
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)  # its end of the cable goes with it
        near, far = ends.values()
        ip("link", "add", near, "type", "veth", "peer", "name", far)
        for host, name in namespaces.items():
            ip("link", "set", ends[host], "netns", name)
            ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", ends[host])
            ip("-n", name, "link", "set", ends[host], "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Cable(namespaces, ends)
