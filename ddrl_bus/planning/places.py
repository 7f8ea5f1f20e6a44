"""Who is simulated, and on which machine: the topology's nodes, or as many as a setting asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddrl_bus.errors import UsageError
from ddrl_bus.topology.plan import Plan


@dataclass(frozen=True)
class Setting:
    """Where a topology is to run, as far as its file does not say.

    Args:
        hosts: machines like this one: the first takes everything but actors, the others take these; None: as the
            topology says.
        cores: of each; None: as many as here.
        latency, bandwidth: of the network between them, in seconds and bytes a second.
        counts: group → nodes, in place of the topology's; the groups of its bundle, and in lock-step the batch, follow.
        others: threads of other programs that are busy on each machine.
    """

    hosts: int | None = None
    cores: int | None = None
    latency: float = 100e-6
    bandwidth: float = 1.25e9
    counts: Mapping[str, int] = field(default_factory=dict)
    others: float = 0.0
    seed: int = 1


@dataclass(frozen=True)
class Place:
    """A simulated node."""

    name: str
    kind: str
    index: int
    host: str
    process: str
    options: Any
    bundle: str | None
    envs: int
    """That an actor steps at a time: its own, or where another node acts for it those of a group."""

    @property
    def group(self) -> str:
        return self.name.rpartition("-")[0]


def placed(plan: Plan, setting: Setting) -> Iterator[Place]:
    """The nodes, group by group.

    Raises:
        UsageError: a count of a group that the topology does not have.
    """
    counts = dict(setting.counts)
    if unknown := counts.keys() - plan.groups.keys():
        raise UsageError(f"{unknown.pop()}.count: {plan.name} has {', '.join(plan.groups)}")
    bundles = {options.bundle: counts[name] for name, options in plan.groups.items() if name in counts}
    playing = {options.bundle or name for name, options in plan.groups.items() if options.kind == "actor"}
    for name, options in plan.groups.items():
        count = bundles[options.bundle] if options.bundle in bundles and options.bundle else options.count
        shared = options.bundle or name
        for index in range(counts.get(name, count)):
            host = _host(plan, setting, options, index, plays=shared in playing)
            process = f"{shared}-{index}"
            envs = stepped(plan, options)
            yield Place(f"{name}-{index}", options.kind, index, host, process, options, options.bundle, envs)


def stepped(plan: Plan, options: Any) -> int:
    """Environments that an actor of these options steps at a time; 0 of other nodes."""
    if options.kind != "actor":
        return 0
    return int(options.envs // (options.groups if "act" in plan.links else 1))


def _host(plan: Plan, setting: Setting, options: Any, index: int, *, plays: bool) -> str:
    if setting.hosts is None:
        names = options.host or (next(iter(plan.hosts)),)
        return str(names[index % len(names)])
    return f"host-{1 + index % (setting.hosts - 1)}" if plays and setting.hosts > 1 else "host-0"
