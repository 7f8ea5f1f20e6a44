"""Asking a run's controller: how it goes, and to stop.

From another host, where links are encrypted, that takes the asking host's key and `tcp://HEAD@ADDRESS:PORT`: HEAD is
the host that must answer, by its name in the allow-list.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

from ddrl_bus import keys
from ddrl_bus.errors import SecurityError, UnreachableError
from ddrl_bus.launch import run_dir as run_dirs
from ddrl_bus.messages import STATUS, STOP
from ddrl_bus.transport.base import PEOPLE
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Client
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.security import Access, Guard, Peer
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
def controller(address: str, host: str = "", hub: MemoryHub | None = None) -> Iterator[Controller]:
    """The controller at `address`. Use it in a running event loop.

    Each has a name of its own: under one name the later of two, say the display and a Ctrl-C, would fence the other.

    Args:
        host: as which we ask where that takes a key; default: the one that this machine has a key of.
    Raises:
        SecurityError: a key is missing here, ours or the head's.
    """
    name, ledger = f"{PEOPLE}{os.getpid()}.{secrets.token_hex(4)}", Ledger()
    head, address = split(address)
    bus = Bus(name, 1, ledger, hub, _guard(name, address, head, host, ledger) if head else None)
    try:
        yield Controller(bus.client("progress", address))
    finally:
        bus.close()


def split(address: str) -> tuple[str, str]:
    """(head, address) of `tcp://HEAD@ADDRESS:PORT`; without a head no key is asked for."""
    scheme, _, where = address.partition("://")
    head, _, where = where.rpartition("@")
    return head, f"{scheme}://{where}"


def _guard(name: str, address: str, head: str, host: str, ledger: Ledger) -> Guard:
    access, pair = Access(servers={address: Peer(head, "controller")}), keys.own(host or keys.only())
    guard = Guard(name, access, pair, keys.AllowList(), ledger)
    if guard.server_key(address) is None:
        raise SecurityError(keys.unknown(head))
    return guard


async def status_of(run: Path | str) -> Status:
    """The status of a run that goes on: of its directory, or of its head's address.

    Raises:
        UnreachableError: it does not, or not for us.
        SecurityError: as of `controller`.
    """
    async with _asked(run) as asked:
        return await asked.status()


async def stop(run: Path | str) -> None:
    """Have the run drained.  Raises: as `status_of`, and RemoteError where it is stopped on its head only."""
    async with _asked(run) as asked:
        await asked.stop()


@asynccontextmanager
async def _asked(run: Path | str) -> AsyncIterator[Controller]:
    """Raises: UnreachableError, as well, that says what may be missing at the far end."""
    address, host = (run, "") if isinstance(run, str) else _address(run)
    with controller(address, host) as found:
        try:
            yield found
        except UnreachableError as error:
            raise UnreachableError(f"{error}{await hint(address, host)}") from None


async def hint(address: str, host: str) -> str:
    """Why the head may not answer us: in the kernel's words, or what it may lack where something listens there."""
    head, bare = split(address)
    if not bare.startswith("tcp:"):
        return ""
    if failure := await _failure(bare):
        return f" ({failure})"
    if not head:
        return (
            "; check the port, and where its links are encrypted, give tcp://HEAD@ADDRESS:PORT, HEAD being its name in "
            "`hosts:`"
        )
    host = host or keys.only()
    return f"; unless it was before, type on {head}:  {keys.introduction(host)}"


async def _failure(address: str) -> str:
    """Of a TCP connection to `tcp://HOST:PORT`; "" where it succeeds."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        async with asyncio.timeout(ANSWER_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return "nothing comes back: is the address right, and the port open?"
    except socket.gaierror as error:
        return f"{host}: {error.strerror}"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    writer.close()
    return ""


def _address(run_dir: Path) -> tuple[str, str]:
    """Where the controller answers, and as which host we ask."""
    meta = run_dirs.meta(run_dir)
    address = str(meta.get("status_address", ""))
    if address.startswith(("ipc:", "tcp:")):
        return address, str(meta.get("share") or "")
    raise UnreachableError(f"{run_dir}: a run in one process (--in-process) cannot be asked from outside")
