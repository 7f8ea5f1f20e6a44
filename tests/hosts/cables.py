"""Runs on two hosts for tests: each host has its own run directory, and its own folder for sockets, as two machines
would."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runs import ENVIRON, Run, command

from ddrl_bus.bench.cable import ADDRESSES, MISSING, Cable, ip, plugged_in

__all__ = ["ADDRESSES", "MISSING", "Cable", "plugged_in", "running", "switched"]


@contextmanager
def switched(addresses: Mapping[str, str]) -> Iterator[Cable]:
    """Any number of hosts on a switch, which is a bridge on the first of them."""
    namespaces = {host: f"ddrl-{os.getpid()}-{host}" for host in addresses}
    first, *others = namespaces
    with ExitStack() as undo:
        for name in namespaces.values():
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", namespaces[first], "link", "add", "switch", "type", "bridge")
        for number, host in enumerate(others):
            ends = f"dd{os.getpid()}s{number}", f"dd{os.getpid()}h{number}"
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for where, end in zip((first, host), ends, strict=True):
                ip("link", "set", end, "netns", namespaces[where])
                ip("-n", namespaces[where], "link", "set", end, "up")
            ip("-n", namespaces[first], "link", "set", ends[0], "master", "switch")
            ip("-n", namespaces[host], "addr", "add", f"{addresses[host]}/24", "dev", ends[1])
        ip("-n", namespaces[first], "addr", "add", f"{addresses[first]}/24", "dev", "switch")
        ip("-n", namespaces[first], "link", "set", "switch", "up")
        yield Cable(namespaces, {})


@contextmanager
def running(
    cable: Cable | None, host: str, folder: Path, *words: str, name: str = "ddrl_node", **variables: str
) -> Iterator[Run]:
    """`ddrl-node WORDS` (or `ddrl`) on that host, which keeps its run in `folder`."""
    sockets = Path(tempfile.mkdtemp(prefix=f"{host}-"))  # a path that leaves room for the names of sockets
    where = () if "--resume" in words else ("--run-dir", str(folder))
    argv = command(*words, "--json", *where, name=name, prefix=cable.on(host) if cable else ())
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
