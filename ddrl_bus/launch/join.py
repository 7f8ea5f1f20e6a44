"""Joining a run from another host: the head sends the locked topology, so that nothing needs to be copied there.

What comes is text, bounded, checked against its digest, and read as any topology is, but with no file and no variable
of this machine. Nothing in it is executed, and no module imported that the line typed here did not name.
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from ddrl_bus.errors import DdrlError, EnvError, SecurityError, UnreachableError, UsageError
from ddrl_bus.launch import remote
from ddrl_bus.launch.catalog import catalog, probe_env
from ddrl_bus.launch.hosts import FIRST_S, head_of, hosts_of
from ddrl_bus.messages import Join, Joined, fields_of, parse
from ddrl_bus.topology import Plan, load_text
from ddrl_bus.topology.schema import HOST_NAME, split_address
from ddrl_bus.topology.tree import MAX_BYTES, came
from ddrl_bus.transport.wire import Message
from ddrl_bus.versions import skew, versions

PORT: Final = 7077
WAIT_S: Final = 300.0
"""How long a host waits for the head: they are started in any order."""
LEAVE_S: Final = 15.0
"""How long it waits for an earlier start of itself to be gone."""

AGAIN_S: Final = 2.0

Note = Callable[[str], None]


def address_of(text: str) -> str:
    """`tcp://HOST:PORT` of what a user gave for it, or `tcp://HEAD@HOST:PORT`.

    Raises:
        UsageError: it is no address that can be dialled.
    """
    head, at, where = text.removeprefix("tcp://").rpartition("@")
    split = split_address(where)
    if split is None or (at and not HOST_NAME.fullmatch(head)):
        raise UsageError(
            f"{text}: expected the head's address, such as tcp://10.0.0.1:{PORT}, or tcp://gpu0@10.0.0.1:{PORT} where "
            "links are encrypted"
        )
    return f"tcp://{head}{at}{split[0]}:{split[1] or PORT}"


@dataclass(frozen=True, slots=True)
class Share:
    """What one host, or one process of it, is to run."""

    plan: Plan
    host: str
    lives: Mapping[str, int]
    """Node → epoch of its newest life, where there was one."""


async def join(address: str, wanted: Join, note: Note, modules: Collection[str] = ()) -> Share:
    """Ask the head at `address`, which may take its time to start.

    Args:
        modules: the head may have its environment imported from.
    Raises:
        UnreachableError: nobody answered in time.
        VersionError: the head speaks another major version of the protocol.
        UsageError: there is no such host or process, or it is there already.
        EnvError: the environment cannot be made here.
        RemoteError: the run is ending, or our key is not for all that is asked for.
        SecurityError: a key is missing here, or the environment is in another module.
    """
    began, said = time.monotonic(), list[str]()
    while True:
        message = await _asked(address, wanted, note)
        joined = parse(Joined, message)
        plan = _plan(message, joined, address)
        host = _host(plan, wanted)
        if not joined.present:
            break
        if time.monotonic() - began > LEAVE_S:
            names = ", ".join(joined.present)
            raise UsageError(
                f"there already: {names} of {host}; end that start of it first, by Ctrl-C where it was typed"
            )
        if joined.present != said:
            said = joined.present
            note(f"waiting until {', '.join(said)} of an earlier start left")
        await asyncio.sleep(AGAIN_S)
    _check_import(plan, address, modules)
    _compare(plan, host, joined, note)
    return Share(plan, host, joined.lives)


async def topology_of(address: str, note: Note, modules: Collection[str] = ()) -> Plan:
    """What the head at `address` runs, which can be run here too.  Raises: as `join`."""
    message = await _asked(address, Join(versions()), note)
    joined = parse(Joined, message)
    plan = _plan(message, joined, address)
    _check_import(plan, address, modules)
    _compare(plan, "this machine", joined, note)
    return plan


async def granted(address: str, group: str, count: int, host: str) -> list[str]:
    """Names for so many nodes that are added there to the run whose controller is at `address`, nobody else's.

    Raises:
        RemoteError: the run takes none, or is ending.
        UnreachableError: nobody answers.
    """
    wanted = Join(versions(), host=host, group=group, count=count)
    with remote.controller(address, host) as head:
        answer = await head.ask(Join.KIND, fields_of(wanted), timeout_s=LEAVE_S)
    return parse(Joined, answer).added


async def _asked(address: str, wanted: Join, note: Note) -> Message:
    began, again = time.monotonic(), FIRST_S
    head, bare = remote.split(address)
    if head and head == wanted.host:
        raise UsageError(f"{address}: {head} is the host that joins; expected the head's name before the @ of {bare}")
    with remote.controller(address, wanted.host) as controller:
        while True:
            try:
                return await controller.ask(Join.KIND, fields_of(wanted))
            except UnreachableError:
                waited = time.monotonic() - began
            if waited < again and waited < WAIT_S:
                continue
            again *= 2
            silent = f"nobody answers at {address} for {waited:.0f} s{await remote.hint(address, wanted.host)}"
            if waited >= WAIT_S:
                raise UnreachableError(f"{silent}; is the head started?")
            note(f"{silent}; on the head type:  ddrl run TOPO")


def _plan(message: Message, joined: Joined, address: str) -> Plan:
    array = message.arrays.get("topology")
    if array is None or array.dtype != "uint8" or array.ndim != 1 or array.size > MAX_BYTES:
        raise DdrlError(f"{address} answered with no topology")
    text = bytes(array)
    if hashlib.sha256(text).hexdigest() != joined.digest:
        raise DdrlError(f"{address} sent a topology that does not match its digest")
    try:
        return load_text(text.decode(), f"topology of {address}", catalog=catalog(starts=False))  # keys: once we know
    except UnicodeDecodeError:
        raise DdrlError(f"{address} sent a topology that is not UTF-8") from None


def _host(plan: Plan, wanted: Join) -> str:
    """Where what is wanted belongs; never to the head, which has the file."""
    if wanted.process:
        (host,) = {node.host for node in plan.process(wanted.process)}
    else:
        host = wanted.host
    others = [other for other in hosts_of(plan) if other != head_of(plan)]
    if host not in others:
        what = "is the head, which needs the file: -t TOPO" if host == head_of(plan) else "is no host of it with nodes"
        raise UsageError(f"{plan.name}: {came(host)} {what}; can join: {', '.join(others) or 'nobody'}")
    return host


def _check_import(plan: Plan, address: str, modules: Collection[str]) -> None:
    """To import a module is to run it."""
    module, _, _ = plan.env.id.rpartition(":")
    if module and module not in modules:
        raise SecurityError(
            f"{address} would have this host import {came(module)}, for the environment {came(plan.env.id)}; "
            f"if that is yours, add  --import {shlex.quote(module)}"
        )


def _compare(plan: Plan, host: str, joined: Joined, note: Note) -> None:
    """Say where the two installations differ."""
    head = head_of(plan)
    for name, (here, there) in skew(versions(), joined.versions).items():
        note(f"warning: {host} has {name} {here or 'not at all'}, {head} has {there or 'none'}")
    try:
        probe_env(plan.env)
    except EnvError as error:
        here, there = versions()["gymnasium"], joined.versions.get("gymnasium")
        raise EnvError(f"{host} (gymnasium {here}): {error}; {head} has gymnasium {there}") from None
