"""What the engines share."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ddrl_bus.errors import UsageError
from ddrl_bus.launch import remote
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.launch.hosts import head_of, hosts_of, join_words
from ddrl_bus.topology import Plan, load_text
from ddrl_bus.topology.exposure import guarded, head_address

Files = dict[str, str]
"""Name → text."""
KEYS: Final = "/etc/ddrl-keys"
"""Where a container has the keys of its host."""


@dataclass(frozen=True, slots=True)
class Options:
    command: str = "ddrl-node"
    """How a shell calls it there; for containers, words that are executed."""
    image: str = "ddrl-bus"
    """For containers: one that has that command, and `ddrl`."""


def start(plan: Plan, host: str, topology: str, *more: str) -> list[str]:
    """Arguments of ddrl-node on that host; `topology` is the file that the head has."""
    where = ["-t", topology, "--host", host] if host == head_of(plan) else join_words(plan, host)
    return [*where, *more]


def by_key(plan: Plan) -> str:
    """What stands before the head's address in `--join`: `HEAD@` where only keys open it."""
    head, _ = remote.split(head_address(plan) or "")
    return f"{head}@" if head else ""


def with_keys(plan: Plan) -> list[str]:
    """The hosts that need keys there, in their order."""
    needy = guarded(plan)
    return [host for host in hosts_of(plan) if host in needy]


def placed(plan: Plan, addresses: Mapping[str, str]) -> Plan:
    """The plan with the engine's addresses for its hosts; a single host needs none.

    Raises:
        SecurityError: links that were inside one machine would leave theirs in the open.
    """
    if len(hosts_of(plan)) == 1:
        return plan
    lock = dataclasses.replace(plan, hosts={**plan.hosts, **addresses}).lock()
    return load_text(lock, f"{plan.name} with the addresses that the engine gives its hosts", catalog=catalog())


def labels(plan: Plan) -> dict[str, str]:
    """Host → a DNS label for it, which begins with the run's name.

    Raises:
        UsageError: two hosts would get the same.
    """
    found = {host: label(f"{plan.name}-{host}") for host in hosts_of(plan)}
    if len(set(found.values())) < len(found):
        raise UsageError(f"{plan.name}: hosts {', '.join(found)} would not be told apart: {', '.join(found.values())}")
    return found


def label(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].rstrip("-")


def container_command(plan: Plan, host: str, options: Options, topology: str) -> str:
    """The list that YAML wants; lives are counted in /run-dir."""
    return json.dumps([*shlex.split(options.command), *start(plan, host, topology, "--run-dir", "/run-dir")])


def grace_s(plan: Plan) -> int:
    """What an engine shall wait between SIGTERM and SIGKILL: the supervisor within needs its time for both."""
    return math.ceil(2 * plan.grace) + 10
