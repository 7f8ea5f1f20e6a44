"""Runs on several hosts: which of them this machine is, what to type on the others, and who has not come yet.

The host of the controller is the head. The others need no file: they ask it for the topology (`launch/join.py`).
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from ddrl_bus import keys
from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.launch.remote import Status
from ddrl_bus.topology import Plan
from ddrl_bus.topology.exposure import head_address, met, needs_key
from ddrl_bus.topology.schema import split_address

FIRST_S: Final = 5.0
"""A host that is missing for so long is named, and again each time that it has taken twice as long."""
SILENT_S: Final = 5.0


def hosts_of(plan: Plan) -> list[str]:
    """Hosts that have nodes."""
    return [host for host in plan.hosts if plan.on_host(host)]


def head_of(plan: Plan) -> str:
    return plan.controller.host


def this_host(plan: Plan) -> str:
    """The host that this machine is; the head, if it is several.

    Raises:
        UsageError: it is none of them.
    """
    here = [host for host in hosts_of(plan) if is_here(plan.hosts[host])]
    if not here:
        known = ", ".join(f"{host} ({plan.hosts[host]}{_unknown(plan, host)})" for host in hosts_of(plan))
        raise UsageError(
            f"{plan.name}: this machine has none of its hosts' addresses: {known}; "
            "a host is started there, or wherever you say so with `ddrl-node -t TOPO --host HOST`"
        )
    return head_of(plan) if head_of(plan) in here else here[0]


def guest_host(plan: Plan) -> str:
    """What to call this machine where it adds nodes to a run: as `hosts` does, or else by its own name."""
    here = (host for host, address in plan.hosts.items() if host != head_of(plan) and is_here(address))
    return next(here, platform.node().partition(".")[0])


def is_here(address: str) -> bool:
    """Whether an address of `hosts:` is one of this machine: only then can something be bound to it."""
    name = _bare(address)
    with contextlib.suppress(OSError):
        for family, kind, _, _, at in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(at)
                return True
    return False


def _unknown(plan: Plan, host: str) -> str:
    try:
        socket.getaddrinfo(address_of(plan, host), 0)
    except OSError:
        return ": no such name here"
    return ""


def address_of(plan: Plan, host: str) -> str:
    """A host's address without its port, as ssh wants it."""
    return _bare(plan.hosts[host])


def _bare(address: str) -> str:
    split = split_address(address)
    assert split is not None, address
    return split[0].strip("[]")


def command_of(plan: Plan, host: str, words: Sequence[str]) -> str:
    """What to type there; `words` are the topology and overrides that the user gave for the head."""
    if host == head_of(plan):
        return shlex.join(["ddrl-node", "-t", *words, "--host", host])
    return shlex.join(["ddrl-node", *join_words(plan, host)])


def join_words(plan: Plan, host: str) -> list[str]:
    """Arguments of `ddrl-node` on a host that is not the head."""
    return ["--join", str(head_address(plan)), *import_words(plan), "--host", host]


def import_words(plan: Plan) -> list[str]:
    """What else they say where the environment is in a module of somebody's own (`MODULE:ID`)."""
    module, _, _ = plan.env.id.rpartition(":")
    return ["--import", module] if module else []


def check_keys(plan: Plan, host: str) -> None:
    """Whether this machine has what its nodes need as `host`: rather here, in a word, than by each node.

    Raises:
        SecurityError: it lacks a key; says what to type.
    """
    if not needs_key(plan, host):
        return
    public, allowed = keys.own(host).public, keys.allowed()
    if all(entry.key != public for entry in allowed if entry.name == host):
        raise SecurityError(
            f"this machine's key of {host} is not the one in its own list, which others may have too; "
            f"type `ddrl keys allow {host} {shlex.quote(public)}` on every host"
        )
    for other in sorted(met(plan, host) - {entry.name for entry in allowed}):
        raise SecurityError(keys.unknown(other))


class Missing:
    """Names hosts that a run waits for. The head watches all others, and each of them watches the head.

    Args:
        lines: host → what to type there.
        now: seconds, of any clock.
    """

    def __init__(self, plan: Plan, host: str, lines: Mapping[str, str], now: float) -> None:
        self._plan = plan
        self._lines = lines
        self._head = head_of(plan)
        watched = [other for other in hosts_of(plan) if other != host and self._head in (host, other)]
        self._since = dict.fromkeys(watched, now)
        self._next = dict.fromkeys(watched, FIRST_S)

    def notes(self, status: Status | None, now: float) -> Iterator[str]:
        """What to say, given what the controller answered; None if it did not."""
        for host, since in self._since.items():
            here = self._is_here(host, status)
            if here:
                if self._next[host] > FIRST_S:
                    yield f"{host} is here"
                self._since[host], self._next[host] = now, FIRST_S
            elif here is False and now - since >= self._next[host]:
                line = f"; type there:  {self._lines[host]}" if host in self._lines else ""
                yield f"{host} ({self._plan.hosts[host]}) has been missing for {self._next[host]:.0f} s{line}"
                self._next[host] *= 2

    def _is_here(self, host: str, status: Status | None) -> bool | None:
        """None if nobody can tell."""
        if host == self._head:
            return status is not None
        if status is None:
            return None
        if status.get("phase") == "drain":
            return True
        nodes = [status["nodes"].get(node.name, {}) for node in self._plan.on_host(host)]
        return any(
            node.get("state") not in (None, "unheard", "stopped", "failed") and node.get("silent_s", 0) < SILENT_S
            for node in nodes
        )
