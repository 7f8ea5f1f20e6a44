"""A topology after every default, variable and link is filled in: what each node is, and whom it talks to.

Every host computes the same plan from the same file, addresses included, so nothing is negotiated at start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from ddrl_bus.errors import UsageError
from ddrl_bus.topology.schema import (
    HOST_NAME,
    MAX_NODES,
    RELAYED,
    SYSTEM_PORTS,
    ActorOptions,
    CheckpointSettings,
    EnvSettings,
    LinkKind,
    NodeOptions,
    Precision,
    Section,
    StopSettings,
    one_of,
    split_address,
)
from ddrl_bus.topology.tree import Plain, emit

OnLoss = Literal["count", "resend"]
Codec = Literal["auto", "none", "lz4", "delta"]
TCP_PORTS: Mapping[LinkKind, int] = {"queue": 2, "latest": 1, "request": 1}  # a queue's second carries the credits

_ADDED: Final = re.compile(rf"([a-z][a-z0-9_-]*)-(0|[1-9][0-9]{{0,3}})\.({HOST_NAME.pattern})")
MAX_NAME: Final = 64  # characters, on the wire


@dataclass(frozen=True)
class NodePlan:
    """One node. Nodes of one `process` share it."""

    name: str
    group: str
    kind: str
    index: int
    host: str
    bundle: str | None
    options: NodeOptions

    @property
    def process(self) -> str:
        return f"{self.bundle}-{self.index}" if self.bundle else self.name


@dataclass(frozen=True)
class LinkPlan:
    """One link between groups. `window` counts messages; `max_lag` counts versions and `rate` bytes a second of one
    sender or publisher, None is no bound."""

    name: str
    kind: LinkKind
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    window: int
    on_loss: OnLoss
    max_lag: int | None
    insecure: bool
    codec: Codec = "auto"
    rate: int | None = None
    relay: bool = False
    precision: Precision = "float32"

    @property
    def binding_side(self) -> Literal["out", "in"]:
        """Who binds: the publisher of a `latest`, the receiver of a `queue`, the server of a `request`."""
        return "out" if self.kind == "latest" else "in"

    @property
    def mutual(self) -> bool:
        """Nodes of one group are at both ends, and each hears all others."""
        return bool(set(self.sources) & set(self.targets))


@dataclass(frozen=True)
class Port:
    """A node's end of a link: it binds (`binds`) or connects (`peers`: node name -> address); among equals, both. A
    relay binds one address for each publisher that it connects to, in their order."""

    link: LinkPlan
    side: Literal["out", "in"]
    binds: tuple[str, ...] = ()
    peers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bind:
    """What one node binds for one link: an address for peers on its host, one for the others, or both; a relay one for
    each publisher whose values it forwards."""

    near: str | None
    far: str | None
    address: str = ""  # of `far`
    port: int = 0
    relayed: Mapping[str, str] = field(default_factory=dict)  # publisher -> address

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address for address in (self.near, self.far, *self.relayed.values()) if address)


@dataclass(frozen=True)
class Plan:
    """The whole run. `hosts` maps a name to `address` or `address:first port`; `grace` is in seconds."""

    name: str
    run_id: str
    seed: int
    env: EnvSettings
    algo_name: str
    algo: Any
    groups: Mapping[str, NodeOptions]
    links: Mapping[str, LinkPlan]
    stop: StopSettings
    checkpoint: CheckpointSettings
    grace: float
    hosts: Mapping[str, str]
    port: int
    in_process: bool = False
    ipc_dir: Path = field(default=Path(), compare=False)  # this machine's; another host may keep it elsewhere

    @cached_property
    def nodes(self) -> dict[str, NodePlan]:
        """Node name -> node, group by group."""
        return {node.name: node for group, options in self.groups.items() for node in _deal(group, options)}

    @cached_property
    def processes(self) -> dict[str, tuple[NodePlan, ...]]:
        """Process name -> its nodes: those of one index of a bundle, or one node, whose name it then has."""
        processes: dict[str, tuple[NodePlan, ...]] = {}
        for node in self.nodes.values():
            processes[node.process] = (*processes.get(node.process, ()), node)
        return processes

    def process(self, name: str) -> tuple[NodePlan, ...]:
        """The nodes of one process.

        Raises:
            UsageError: there is no such process; of a node in a bundle it names the process to start instead.
        """
        if name in self.processes:
            return self.processes[name]
        if added := self.added(name):
            return (added,)
        if node := self.nodes.get(name):
            others = ", ".join(other.name for other in self.processes[node.process] if other is not node)
            beside = f" beside {others}" if others else ""
            raise UsageError(f"{self.name}: {name} runs in process {node.process}{beside}; start {node.process}")
        raise UsageError(f"{self.name}: no node {name!r}; have {', '.join(self.processes)}")

    # ---- nodes that join while the run goes on

    def node(self, name: str) -> NodePlan:
        """A node of the plan, or one that was added to the run.  Raises: KeyError."""
        return self.nodes.get(name) or self._must(name)

    def _must(self, name: str) -> NodePlan:
        if (added := self.added(name)) is None:
            raise KeyError(name)
        return added

    def added(self, name: str) -> NodePlan | None:
        """What a node is that was added to the run: its name says it, as `actor-2.cpu1` does, so that nobody needs to
        be told of it before it connects. None for other names."""
        match = _ADDED.fullmatch(name)
        if match is None or len(name) > MAX_NAME or self.why_fixed(match[1]):
            return None
        options, index = self.groups[match[1]], int(match[2])
        if not options.count <= index < MAX_NODES:
            return None
        return NodePlan(name, match[1], options.kind, index, match[3], None, options)

    def name_added(self, group: str, number: int, host: str) -> str:
        """Of the `number`th node that is added to the run, whatever the groups of the others; from 0."""
        return f"{group}-{self.groups[group].count + number}.{host}"

    def why_fixed(self, group: str) -> str:
        """Why nothing can be added to a group; "" where it can."""
        options = self.groups.get(group)
        if options is None or not options.count:
            return f"no group {group!r} with nodes; {one_of(group, (name for name in self.groups if self._open(name)))}"
        if options.kind != "actor":
            return f"{group} is of kind {options.kind}; only actors bind no address that others must know from the plan"
        if options.bundle:
            return f"{group} shares processes with all of bundle {options.bundle}; raise its count, and resume the run"
        if any(link.max_lag == 0 for link in self.links.values() if group in link.sources):
            return f"{group} is in lock-step (max_lag: 0): a batch is one round of exactly the actors of the plan"
        return ""

    def _open(self, group: str) -> bool:
        return bool(self.groups[group].count) and not self.why_fixed(group)

    def open_groups(self, link_name: str) -> list[str]:
        """Groups whose nodes connect to what is bound for a link, and to which some can be added."""
        link = self.links[link_name]
        return [group for group in (link.targets if link.binding_side == "out" else link.sources) if self._open(group)]

    @cached_property
    def _guest_hosts(self) -> frozenset[str]:
        """Hosts without nodes: they are listed for what may be added."""
        return frozenset(self.hosts) - {node.host for node in self.nodes.values()}

    @cached_property
    def controller(self) -> NodePlan:
        """A run has one; its host is the head."""
        return next(node for node in self.nodes.values() if node.kind == "controller")

    @cached_property
    def join_address(self) -> str | None:
        """Where other hosts reach the controller; None where there are none."""
        return self.binds[self.controller.name, "progress"].far

    def on_host(self, host: str) -> tuple[NodePlan, ...]:
        return tuple(node for node in self.nodes.values() if node.host == host)

    def members(self, groups: tuple[str, ...]) -> Iterator[NodePlan]:
        """The nodes of these groups."""
        return (node for node in self.nodes.values() if node.group in groups)

    def ports(self, node_name: str) -> dict[str, Port]:
        """Link name -> this node's end of it.

        Raises:
            KeyError: no such node.
            UsageError: it was added on a host from which it reaches nobody.
        """
        node = self.node(node_name)
        ports = {}
        for link in self.links.values():
            side: Literal["out", "in"] = "out" if node.group in link.sources else "in"
            relays = self.relays.get((node.host, link.name)) is node
            if node.group not in link.sources + link.targets and not relays:
                continue
            binds = self.binds[node.name, link.name].addresses if (node.name, link.name) in self.binds else ()
            connects = side != link.binding_side or link.mutual or relays
            ports[link.name] = Port(link, side, binds, dict(self._peers(node, link)) if connects else {})
        return ports

    def _peers(self, node: NodePlan, link: LinkPlan) -> Iterator[tuple[str, str]]:
        binders = link.sources if link.binding_side == "out" else link.targets
        relay = self.relays.get((node.host, link.name))
        for peer in (peer for peer in self.members(binders) if peer is not node and _meet(link, node, peer)):
            bind, here = self.binds[peer.name, link.name], peer.host == node.host
            if node is relay and here:
                continue
            address = bind.near or bind.far if self.in_process or here else bind.far
            if relay and node is not relay and not here:
                address = self.binds[relay.name, link.name].relayed[peer.name]
            if not address:
                raise UsageError(
                    f"{self.name}: {peer.name} binds {link.name} for its own machine only; for actors of {node.host} "
                    f"list that host under `hosts`, and {peer.host} with an address that it can dial"
                )
            yield peer.name, address

    def guests(self, node_name: str, link_name: str) -> Iterator[NodePlan]:
        """The nodes of other hosts that connect to what this one binds for a link."""
        node, link = self.nodes[node_name], self.links[link_name]
        others = link.targets if link.binding_side == "out" else link.sources
        far = (peer for peer in self.members(others) if peer.host != node.host and _meet(link, node, peer))
        return iter({(guest := self.relays.get((peer.host, link_name), peer)).name: guest for peer in far}.values())

    @cached_property
    def relays(self) -> dict[tuple[str, str], NodePlan]:
        """(host, link) -> the node that subscribes there to other hosts' publishers, in place of all others."""
        placed = {node.host: node for node in self.nodes.values() if node.kind == "relay"}
        return {
            (host, link.name): placed[host]
            for link in self.links.values()
            for host in self.relayed_to(link)
            if host in placed
        }

    def relayed_to(self, link: LinkPlan) -> list[str]:
        """The hosts on which several processes would subscribe to another host's publishers."""
        if not link.relay or bundle_of(link, self.groups):
            return []
        publishers = list(self.members(link.sources))
        far = {
            (node.host, node.process)
            for node in self.members(link.targets)
            if any(node.host != publisher.host and _meet(link, node, publisher) for publisher in publishers)
        }
        processes = Counter(host for host, _ in sorted(far))
        return [host for host in self.hosts if processes[host] > 1]

    def connections(self, node_name: str) -> int:
        """How many the nodes of the plan make to what this one binds."""
        node, count = self.nodes.get(node_name), 0
        for link in self.links.values():
            if node is not None and (node_name, link.name) in self.binds:
                others = link.targets if link.binding_side == "out" else link.sources
                peers = sum(peer is not node and _meet(link, node, peer) for peer in self.members(others))
                count += TCP_PORTS[link.kind] * peers
        return count

    @cached_property
    def binds(self) -> dict[tuple[str, str], Bind]:
        """(node, link) -> what it binds. Each host's tcp ports count up: progress, control, then as written."""
        free = {host: split_address(text) for host, text in self.hosts.items()}
        next_port = {host: split[1] or self.port for host, split in free.items() if split}
        binds = {}
        # the system's take a host's first ports: adding a link does not move them
        for name in dict.fromkeys([*(name for name in SYSTEM_PORTS if name in self.links), *self.links]):
            link = self.links[name]
            out = link.binding_side == "out"
            binders, others = (link.sources, link.targets) if out else (link.targets, link.sources)
            inside = self.in_process or bundle_of(link, self.groups) is not None
            places = {(node.host, node.bundle, node.index if node.bundle else 0): node for node in self.members(others)}
            for node in self.members(binders):
                if inside:
                    binds[node.name, link.name] = Bind(f"memory://{node.name}.{link.name}", None)
                    continue
                hosts = {peer.host for peer in places.values() if _meet(link, node, peer)}
                hosts |= self._guest_hosts if self.open_groups(name) else set()
                # `ddrl status` asks over ipc, wherever the nodes are
                near = node.host in hosts or link.name == "progress"
                bind = self._bind(node, link, near, bool(hosts - {node.host}), next_port[node.host])
                binds[node.name, link.name] = bind
                next_port[node.host] += TCP_PORTS[link.kind] if bind.far else 0
        root = "memory:/" if self.in_process else f"ipc://{self.ipc_dir}"
        for (host, name), relay in self.relays.items():
            publishers = [node.name for node in self.members(self.links[name].sources) if node.host != host]
            relayed = {publisher: f"{root}/{relay.name}.{name}.{publisher}" for publisher in publishers}
            binds[relay.name, name] = Bind(None, None, relayed=relayed)
        return binds

    def _bind(self, node: NodePlan, link: LinkPlan, near: bool, far: bool, port: int) -> Bind:
        ipc = f"ipc://{self.ipc_dir}/{node.name}.{link.name}" if near else None
        split = split_address(self.hosts[node.host])
        if not far or not split:
            return Bind(ipc, None)
        return Bind(ipc, f"tcp://{split[0]}:{port}", split[0], port)

    def lock(self) -> str:
        """The topology with nothing left to default, as YAML that `load` reads back to an equal plan.

        A value that came from the environment is in it: keep secrets out of topologies.
        """
        data = {
            "name": self.name,
            "run_id": self.run_id,
            "seed": self.seed,
            "port": self.port,
            "grace": self.grace,
            "env": _section(self.env),
            "algo": {"name": self.algo_name, **dataclasses.asdict(self.algo)},
            "hosts": dict(self.hosts),
            "nodes": {group: _section(options) for group, options in self.groups.items()},
            "links": {name: _link(link) for name, link in self.links.items()},
            "stop": _section(self.stop),
            "checkpoint": _section(self.checkpoint),
        }
        return emit({key: _plain(value) for key, value in data.items()})

    def digest(self) -> str:
        """The default run id: the same wherever the same topology is read."""
        return hashlib.sha256(dataclasses.replace(self, run_id="").lock().encode()).hexdigest()[:12]


def bundle_of(link: LinkPlan, groups: Mapping[str, NodeOptions]) -> str | None:
    """The bundle that the whole link is inside of, if there is one: it then joins nodes of one process."""
    bundles = {groups[name].bundle for name in link.sources + link.targets}
    return bundles.pop() if len(bundles) == 1 and not link.mutual else None


def most_columns(groups: Mapping[str, NodeOptions], links: Mapping[str, LinkPlan]) -> int:
    """Columns of the largest unroll: all environments of an actor, or one of the parts in which they ask."""
    asking = links["act"].sources if "act" in links else ()
    actors = {name: options for name, options in groups.items() if isinstance(options, ActorOptions) and options.count}
    return max(options.envs // (options.groups if name in asking else 1) for name, options in actors.items())


def _meet(link: LinkPlan, node: NodePlan, peer: NodePlan) -> bool:
    """Whether a link between their groups joins these two: within a bundle only those of one index."""
    return link.mutual or node.bundle is None or node.bundle != peer.bundle or node.index == peer.index


def _deal(group: str, options: NodeOptions) -> Iterator[NodePlan]:
    hosts = options.host or ("local",)
    for index in range(options.count):
        host = hosts[index % len(hosts)]
        yield NodePlan(f"{group}-{index}", group, options.kind, index, host, options.bundle, options)


def _section(section: Section) -> dict[str, Any]:
    return section.model_dump(by_alias=True)


def _link(link: LinkPlan) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": link.kind, "from": link.sources, "to": link.targets}
    if link.kind == "queue":
        data |= {"window": link.window, "on_loss": link.on_loss}
        data |= {} if link.max_lag is None else {"max_lag": link.max_lag}
    data |= {} if link.codec == "auto" else {"codec": link.codec}
    data |= {} if link.rate is None else {"rate": link.rate}
    data |= {"relay": link.relay, "precision": link.precision} if link.name in RELAYED else {}
    return data | {"insecure": link.insecure}


def _plain(value: Any) -> Plain:
    """As YAML has it: tuples are lists, and `${` is written so that it is not expanded again."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
