"""Two hosts for tests, each a network namespace of its own, joined by one cable.

Each host has its own run directory, and its own folder for sockets, as two machines would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from runs import ENVIRON, Run, command

ADDRESSES = {"gpu0": "10.77.0.1", "cpu1": "10.77.0.2"}
MISSING = "needs root and iproute2" if os.geteuid() or not shutil.which("ip") else ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


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
        ip("-n", self.namespaces["gpu0"], "link", "set", self.ends["gpu0"], "down")
        try:
            yield
        finally:
            ip("-n", self.namespaces["gpu0"], "link", "set", self.ends["gpu0"], "up")


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


@contextmanager
def running(
    cable: Cable, host: str, folder: Path, *words: str, name: str = "ddrl_node", **variables: str
) -> Iterator[Run]:
    """`ddrl-node WORDS` (or `ddrl`) on that host, which keeps its run in `folder`."""
    sockets = Path(tempfile.mkdtemp(prefix=f"{host}-"))  # a path that leaves room for the names of sockets
    where = () if "--resume" in words else ("--run-dir", str(folder))
    argv = command(*words, "--json", *where, name=name, prefix=cable.on(host))
    run = Run(folder, argv, ENVIRON | {"TMPDIR": str(sockets)} | variables)
    try:
        yield run
    finally:
        run.close()
        shutil.rmtree(sockets)


def ddrl_keys(folder: Path, *words: str) -> str:
    """What `ddrl keys WORDS` prints on the host with that folder of keys."""
    environ = ENVIRON | {"DDRL_KEYS": str(folder)}
    done = subprocess.run(command("keys", *words), env=environ, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()
