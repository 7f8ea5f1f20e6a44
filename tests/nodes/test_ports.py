"""Every port that real plans bind for other hosts, with real keys and sockets: who gets in, and who never does.

Loopback counts as a network here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq
from rig import progress_of
from zmq.utils.monitor import recv_monitor_message

from ddrl_bus import keys
from ddrl_bus.errors import RemoteError
from ddrl_bus.launch import remote
from ddrl_bus.launch.catalog import catalog, packaged
from ddrl_bus.messages import STOP, Evaluation, Join, Joined, Progress, fields_of, parse
from ddrl_bus.nodes import access
from ddrl_bus.nodes.base import node_class
from ddrl_bus.topology import Plan, exposure, load
from ddrl_bus.topology.schema import KINDS, PORTS, SYSTEM_PORTS
from ddrl_bus.transport import security
from ddrl_bus.transport.base import back_channel, scheme
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.zeromq import ZmqBackend

PATIENCE_S = 30.0
QUIET_S = 0.5
"""A handshake takes a few milliseconds; who is not in so long after the others is kept out."""
CUT_S = 2.0
HOSTS = ("a", "b", "c", "idle")
PLANS = {  # topology → overrides that part its nodes
    "apex": ("nodes.actor.host=b", "nodes.replay.host=[a, c]", "nodes.learner.host=a", "nodes.evaluator.host=c"),
    "seed": ("nodes.actor.host=b", "nodes.inference.host=a", "nodes.learner.host=c", "nodes.evaluator.host=b"),
    "gorila": (
        *("nodes.param_server.host=a", "nodes.evaluator.host=b"),
        *(f"nodes.{group}.host=[b, c]" for group in ("actor", "learner", "replay")),
    ),
    "ddppo": (
        *("nodes.learner.host=[a, b]", "nodes.actor.host=[a, b]", "nodes.evaluator.host=c"),
        "links.sync.insecure=true",  # there is no other way
    ),
}
DIALS = {"queue": zmq.PUSH, "latest": zmq.SUB, "request": zmq.DEALER}
WRONG = ("null", "plain", "wrong server key", "unlisted", "another host's", "another role's")
IN, OUT = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
Pair = tuple[bytes, bytes]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all hosts keep their keys, and their common allow-list."""
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    for module in (exposure, access):
        monkeypatch.setattr(module, "leaves", lambda address: scheme(address) == "tcp")
    for host in HOSTS:
        keys.new(host)
    return keys.folder()


def plan_of(name: str) -> Plan:
    """On addresses of our own, and ports below those of outgoing connections."""
    network, port = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}", 20_000 + 100 * list(PLANS).index(name)
    hosts = ", ".join(f"{host}: {network}.{n}" for n, host in enumerate(HOSTS, 1))
    return load(packaged()[name], overrides=(f"hosts={{{hosts}}}", f"port={port}", *PLANS[name]), catalog=catalog())


def pair() -> Pair:
    """Of somebody."""
    public, secret = b"-", b"-"
    while not public[:1].isalnum():
        public, secret = zmq.curve_keypair()
    return public, secret


def of(host: str) -> Pair:
    mine = keys.own(host)
    return mine.public.encode(), mine.secret.encode()


@dataclass(frozen=True)
class Port:
    """One address that a node guards."""

    node: str
    link: str
    address: str
    dials: int
    guests: tuple[security.Peer, ...]


@dataclass
class Knocker:
    """A bare socket, and whether its handshake has succeeded."""

    raw: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    is_in: bool = False

    def look(self) -> bool:
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            self.is_in = event == IN or (self.is_in and not event & OUT)
        return self.is_in


@dataclass
class Site:
    """All nodes of a plan, as far as they bind, and whoever knocks."""

    plan: Plan
    context: zmq.Context[zmq.Socket[bytes]]
    buses: dict[str, Bus] = field(default_factory=dict)
    guards: dict[str, security.Guard] = field(default_factory=dict)
    ports: list[Port] = field(default_factory=list)
    knockers: list[Knocker] = field(default_factory=list)

    def open(self) -> None:
        for name in self.plan.nodes:
            ledger = Ledger()
            self.guards[name] = access.guard(self.plan, name, ledger)
            bus = self.buses[name] = Bus(name, 1, ledger, guard=self.guards[name])
            allowed = access.access_of(self.plan, name)
            for link, port in self.plan.ports(name).items():
                binds = [address for address in port.binds if address in allowed.binds]
                if not binds:
                    continue
                guests = tuple(allowed.guests[link].values())
                kind = port.link.kind
                if kind == "queue":
                    bus.receiver(link, binds, 4)
                    self.ports += [Port(name, link, back_channel(at), zmq.SUB, guests) for at in binds]
                elif kind == "latest":
                    bus.publisher(link, binds)
                else:
                    bus.server(link, binds)
                self.ports += [Port(name, link, at, DIALS[kind], guests) for at in binds]
        assert sum(len(access.access_of(self.plan, name).binds) for name in self.plan.nodes) == len(self.ports)

    def knock(self, port: Port, who: str) -> Knocker:
        server = of(self.plan.nodes[port.node].host)[0]
        host = port.guests[0].host
        mine: Pair | None = None
        if who == "right":
            mine = of(host)
        elif who == "wrong server key":
            mine, server = of(host), pair()[0]
        elif who == "unlisted":
            mine = pair()
        elif who == "another host's":
            mine = of(next(h for h in reversed(HOSTS) if h not in {guest.host for guest in port.guests}))
        elif who == "another role's":
            mine = pair()
            added = {self.plan.groups[group].kind for group in self.plan.open_groups(port.link)}
            kind = next(kind for kind in KINDS if kind not in {guest.kind for guest in port.guests} | added)
            others = "" if port.link != "progress" else "nowhere"  # any role of a listed host may ask how it goes
            with (keys.folder() / keys.ALLOWED).open("a") as allowed:
                allowed.write(f"{others or host} {mine[0].decode()} {kind}\n")
        raw = self.context.socket(port.dials)
        monitor = raw.get_monitor_socket(IN | OUT)
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.RECONNECT_IVL, 100)
        if mine is not None:
            raw.setsockopt(zmq.CURVE_SERVERKEY, server)
            raw.setsockopt(zmq.CURVE_PUBLICKEY, mine[0])
            raw.setsockopt(zmq.CURVE_SECRETKEY, mine[1])
        elif who == "plain":
            raw.setsockopt(zmq.PLAIN_USERNAME, host.encode())
            raw.setsockopt(zmq.PLAIN_PASSWORD, b"x")
        raw.connect(port.address)
        self.knockers.append(Knocker(raw, monitor))
        return self.knockers[-1]


@pytest.fixture
async def opened() -> AsyncIterator[Callable[[str], Site]]:
    context, sites = zmq.Context(), list[Site]()
    context.set(zmq.MAX_SOCKETS, 4096)

    def opened(name: str) -> Site:
        site = Site(plan_of(name), context)
        sites.append(site)
        site.open()
        return site

    yield opened
    for site in sites:
        for knocker in site.knockers:
            knocker.raw.disable_monitor()
            knocker.raw.close()
        for bus in site.buses.values():
            bus.close()
    context.destroy(linger=0)


async def all_in(knockers: Sequence[Knocker]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while sum(knocker.look() for knocker in knockers) < len(knockers):  # noqa: ASYNC110  - nobody tells us
            await asyncio.sleep(0.02)


def test_these_plans_bind_every_port_that_can_be_guarded() -> None:
    bound = {link for name in PLANS for (_, link), bind in plan_of(name).binds.items() if bind.far}
    assert bound == {*PORTS, *SYSTEM_PORTS} - {"tally"}  # which never leaves its process


@pytest.mark.parametrize("name", PLANS)
async def test_only_the_right_key_gets_in_and_is_cut_off_when_revoked(name: str, opened: Callable[[str], Site]) -> None:
    site = opened(name)
    right = {port: site.knock(port, "right") for port in site.ports}
    wrong = {(port, who): site.knock(port, who) for port in site.ports for who in WRONG}
    await all_in(list(right.values()))
    for guard in site.guards.values():
        guard.refresh()  # the keys of other roles
    await asyncio.sleep(QUIET_S)
    # a host that is listed without nodes may add actors, where the topology takes any: it may speak for those alone
    may_add = {(port.node, port.link, "another host's") for port in site.ports if site.plan.open_groups(port.link)}
    assert {(port.node, port.link, who) for (port, who), knocker in wrong.items() if knocker.look()} <= may_add

    for host in HOSTS:
        keys.revoke(host)
    await asyncio.sleep(CUT_S)
    assert [(port.node, port.link) for port, knocker in right.items() if knocker.look()] == []


@pytest.mark.parametrize("state", ["absent", "crashed", "slow"])
async def test_without_the_handler_s_answer_not_even_the_right_key(state: str, opened: Callable[[str], Site]) -> None:
    sites = [opened(name) for name in PLANS]
    for guard, bus in [(site.guards[node], bus) for site in sites for node, bus in site.buses.items()]:
        backend = bus._zeromq
        if not isinstance(backend, ZmqBackend):  # it binds nothing
            continue
        if state == "absent":
            backend._zap.close()
        elif state == "crashed":
            guard.zap = lambda request: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        else:  # it hears and has not answered yet
            backend._zap._on_message = lambda parts: None
    knockers = {port: site.knock(port, "right") for site in sites for port in site.ports}
    await asyncio.sleep(2 * QUIET_S)
    assert [(port.node, port.link) for port, knocker in knockers.items() if knocker.look()] == []


async def test_a_host_may_ask_for_its_own_share_and_command_nothing(tmp_path: Path) -> None:
    """Of a real controller, in nobody's name and in that of its own nodes."""
    plan, stop = plan_of("apex"), asyncio.Event()
    node = node_class(plan, "controller-0")(plan, "controller-0", tmp_path, 1, MemoryHub(), inline=True)
    living = asyncio.create_task(node.live(stop))
    b = Bus("actor-0", 1, ledger := Ledger(), guard=access.guard(plan, "actor-0", ledger))
    as_actor = b.client("progress", plan.ports("actor-0")["progress"].peers["controller-0"])

    async def refused(asked: Awaitable[object]) -> str:
        with pytest.raises(RemoteError) as caught:
            await asked
        return str(caught.value)

    address = exposure.head_address(plan)
    assert address is not None
    with remote.controller(address, "b") as head:
        mine = parse(Joined, await head.ask(Join.KIND, fields_of(Join({}, host="b")), timeout_s=PATIENCE_S))
        assert mine.present == []
        assert (await head.status(PATIENCE_S))["name"] == "apex"
        for join in (Join({}, host="c"), Join({}, process="replay-1")):
            asked = head.ask(Join.KIND, fields_of(join), timeout_s=PATIENCE_S)
            assert "no key that is allowed for" in await refused(asked)
        assert "type `ddrl stop` on a" in await refused(head.stop(PATIENCE_S))
    assert "type `ddrl stop` on a" in await refused(as_actor.request(STOP, timeout_s=PATIENCE_S))
    evaluation = Evaluation(1e9, 20, version=1, learner_epoch=1, env_steps=40, number=1)
    for role in ("learner", "evaluator"):
        told = progress_of(plan, role, done="steps", evaluation=evaluation)
        said = await refused(as_actor.request(Progress.KIND, fields_of(told), timeout_s=PATIENCE_S))
        assert said.endswith(f"actor-0 is no {role}: it is of kind actor")
    told = progress_of(plan, "actor", done="steps", evaluation=evaluation)
    await as_actor.request(Progress.KIND, fields_of(told), timeout_s=PATIENCE_S)
    assert (node.control.phase, node.last) == ("run", None)
    b.close()
    stop.set()
    living.cancel()
    await asyncio.gather(living, return_exceptions=True)
