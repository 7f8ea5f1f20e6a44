"""Asking a run's controller: how it goes, and to stop."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ddrl_bus.errors import UnreachableError
from ddrl_bus.launch import run_dir as run_dirs
from ddrl_bus.messages import STATUS, STOP
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Client
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.wire import Message

ANSWER_S: Final = 2.0

Status = dict[str, Any]
"""`{name, run_id, phase, reason, wall_s, env_steps, updates, version, steps_per_s, return, best_return, nodes}`."""


class Controller:
    """The asking end of the controller's `progress` link."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, kind: str, fields: Mapping[str, Any] | None = None, timeout_s: float = ANSWER_S) -> Message:
        """Raises: UnreachableError, RemoteError."""
        return await self._client.request(kind, fields, timeout_s=timeout_s)

    async def status(self, timeout_s: float = ANSWER_S) -> Status:
        """Raises: UnreachableError, RemoteError."""
        answer = await self.ask(STATUS, timeout_s=timeout_s)
        status: Status = json.loads(bytes(answer.arrays["json"]))
        return status

    async def stop(self, timeout_s: float = ANSWER_S) -> None:
        """Ask it to drain everybody; returns once it has heard.  Raises: UnreachableError, RemoteError."""
        await self.ask(STOP, timeout_s=timeout_s)


@contextmanager
def controller(address: str, hub: MemoryHub | None = None) -> Iterator[Controller]:
    """The controller at `address`. Use it in a running event loop.

    Each has a name of its own: under one name the later of two, say the display and a Ctrl-C, would fence the other.
    """
    bus = Bus(f"people-{os.getpid()}-{secrets.token_hex(4)}", 1, Ledger(), hub)
    try:
        yield Controller(bus.client("progress", address))
    finally:
        bus.close()


async def status_of(run_dir: Path) -> Status:
    """The status of a run that goes on.  Raises: UnreachableError, if it does not."""
    with controller(_address(run_dir)) as asked:
        return await asked.status()


async def stop(run_dir: Path) -> None:
    """Have the run drained.  Raises: UnreachableError, if it does not go on."""
    with controller(_address(run_dir)) as asked:
        await asked.stop()


def _address(run_dir: Path) -> str:
    address = str(run_dirs.meta(run_dir).get("status_address", ""))
    if address.startswith(("ipc:", "tcp:")):
        return address
    raise UnreachableError(f"{run_dir}: a run in one process (--in-process) cannot be asked from outside")
