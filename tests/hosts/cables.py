"""Runs on two hosts for tests: each host has its own run directory, and its own folder for sockets, as two machines
would."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import ENVIRON, Run, command

from ddrl_bus.bench.cable import ADDRESSES, MISSING, Cable, plugged_in

__all__ = ["ADDRESSES", "MISSING", "Cable", "plugged_in", "running"]


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
