"""Between two hosts: `ddrl bench --serve` on one, `ddrl bench tcp://HOST:PORT` on the other.

The serving host is the receiver and the server of what `ddrl bench links` measures; the other one sends and asks, and
reports. What it may be told is a payload's name, a way and numbers; the bytes are made up on either side, and travel in
plain text. Moments of two hosts cannot be compared: latency is of round trips only, by the clock of who asks.

    PORT       orders              PORT + 1, + 2    our links              PORT + 3    bare sockets
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

from ddrl_bus.bench.crew import PATIENCE_S, Member, crew
from ddrl_bus.bench.ends import PAYLOADS, Answer, Order, Setup
from ddrl_bus.bench.links import ABOUT as LINKS
from ddrl_bus.bench.links import FLOOD, FLOOD_RATIOS, OURS, RAW, Cell, Ends, Group, Scope, flood_row, paced_row
from ddrl_bus.bench.report import Row
from ddrl_bus.errors import RemoteError, UnreachableError, UsageError
from ddrl_bus.launch import loop
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Client, Request

ANYWHERE: Final = "tcp://*:7070"
ORDERS: Final = "bench"
WAYS: Final[dict[str, tuple[Ends, int]]] = {"link": (OURS, 1), "raw": (RAW, 3)}
"""Way → its ends, and how far above the port of the orders it listens."""
PAYLOADS_FAR: Final = tuple(name for name, payload in PAYLOADS.items() if payload.link != "latest")
MOST_PEERS, MOST_MESSAGES = 64, 1_000_000
ABOUT: Final = replace(
    LINKS,
    bench="tcp://HOST:PORT",
    title="What moving experience and questions between two hosts costs over bare ZeroMQ sockets",
    method=LINKS.method + "\n\nHere the peers are on this host, and the receiver or server on another one, over tcp in "
    "plain text. Latency is of round trips only: two hosts' clocks cannot be compared.",
)


def port_of(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        UsageError: it is no such address.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not port.isdigit() or not 0 < int(port) <= 65_532:
        raise UsageError(f"{address}: expected tcp://HOST:PORT, with PORT of at most 65532, for three more follow it")
    return host, int(port)


# ── the host that serves


def serve(address: str = ANYWHERE) -> None:
    """Until it is interrupted.

    Raises:
        UsageError: it is no such address.
        AddressInUseError: somebody holds it.
    """
    host, port = port_of(address)
    loop.run(_serve(host, port))


async def _serve(host: str, port: int) -> None:
    bus = Bus("learner-0", 1, Ledger())
    try:
        server = bus.server(ORDERS, [f"tcp://{host}:{port}"])
        print(f"serving on tcp://{host}:{port} and the three ports after it, in plain text; Ctrl-C ends it",
              file=sys.stderr, flush=True)  # fmt: skip
        with ExitStack() as running:
            members: dict[str, Member] = {}
            while True:
                request = await server.recv()
                try:
                    answer = await asyncio.to_thread(_obey, request, running, members, host, port)
                except (KeyError, ValueError, TypeError, RuntimeError, TimeoutError) as error:
                    request.refuse(f"{type(error).__name__}: {error}")
                else:
                    request.answer("done", answer)
    finally:
        bus.close()


def _obey(request: Request, running: ExitStack, members: dict[str, Member], host: str, port: int) -> Mapping[str, Any]:
    """What to answer."""
    fields = request.message.fields
    match request.message.kind:
        case "begin":
            running.close()  # whoever came before
            members.clear()
            members.update(zip(WAYS, running.enter_context(crew(len(WAYS))), strict=True))
        case "open":
            ends, offset = WAYS[fields["way"]]
            peers = _number(fields["peers"], MOST_PEERS)
            bound = Setup(PAYLOADS[fields["payload"]], "tcp", peers, f"tcp://{host}:{port + offset}", "")
            members[fields["way"]].start(ends.one, bound, None)
            members[fields["way"]].answer()
        case "carry_out":
            warm_up = _number(fields["warm_up"], MOST_MESSAGES, 0)
            members[fields["way"]].tell(Order(_number(fields["messages"], MOST_MESSAGES), warm_up))
        case "seen":
            return {"seconds": members[fields["way"]].answer().seconds}
        case "cpu":
            return {"seconds": members[fields["way"]].cpu_s}
        case "close":
            members[fields["way"]].end()
        case kind:
            raise ValueError(f"no order {kind!r}")
    return {}


def _number(value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"got {value!r}, expected a number from {least} to {most}")
    return value


# ── the host that measures


class FarHub(Member):
    """The end of one way on the other host, to be told what to do like a process of this one."""

    def __init__(self, runner: asyncio.Runner, client: Client, way: str) -> None:
        self._runner, self._client, self._way = runner, client, way
        self._told = False

    @property
    def cpu_s(self) -> float:
        return float(self._ask("cpu")["seconds"])

    def start(self, _end: object, *args: Any) -> None:
        setup: Setup = args[0]
        self._ask("open", payload=setup.payload.name, peers=setup.peers)

    def tell(self, order: Order) -> None:
        self._ask("carry_out", messages=order.messages, warm_up=order.warm_up)
        self._told = True

    def answer(self) -> Any:
        if not self._told:
            return None
        self._told = False
        return Answer(float(self._ask("seen")["seconds"]))

    def end(self) -> None:
        self._ask("close")

    def _ask(self, kind: str, **fields: Any) -> Mapping[str, Any]:
        async def asked() -> Mapping[str, Any]:
            fields_of_way = {"way": self._way, **fields}
            return (await self._client.request(kind, fields_of_way, timeout_s=PATIENCE_S)).fields

        return self._runner.run(asked())


def measure(address: str, scope: Scope) -> Iterator[Row]:
    """A row for each payload and number of peers, then latencies of round trips.

    Raises:
        UsageError: it is no such address.
        UnreachableError: nobody serves there.
        RemoteError: the other side failed; carries its words.
    """
    host, port = port_of(address)
    payloads = [name for name in scope.payloads if name in PAYLOADS_FAR]
    cells = replace(scope, payloads=payloads, transports=("tcp",)).cells()
    most = max(cell.peers for cell in cells)
    with _hubs(address) as hubs, crew(2 * most) as members:
        spokes = dict(zip(WAYS, (members[:most], members[most:]), strict=True))
        for cell in cells:
            with _open(cell, hubs, spokes, host, port) as ways:
                yield flood_row(cell, ways, scope.repeats, FLOOD, FLOOD_RATIOS)
        for cell in cells:
            if cell.payload.link == "request":
                with _open(cell, hubs, spokes, host, port) as ways:
                    for rate in cell.payload.rates:
                        yield paced_row(cell, ways, rate, scope)


@contextmanager
def _hubs(address: str) -> Iterator[dict[str, FarHub]]:
    with loop.runner() as runner:

        async def opened() -> tuple[Bus, Client]:
            bus = Bus(f"bench-{secrets.token_hex(4)}", 1, Ledger())  # nobody who has asked before
            return bus, bus.client(ORDERS, address)

        async def begun(client: Client) -> None:
            await client.request("begin", timeout_s=5)

        async def closed(bus: Bus) -> None:
            bus.close()

        bus, client = runner.run(opened())
        try:
            try:
                runner.run(begun(client))
            except UnreachableError:
                raise UnreachableError(f"{address}: nobody answers; type there:  ddrl bench --serve") from None
            yield {way: FarHub(runner, client, way) for way in WAYS}
        finally:
            runner.run(closed(bus))


@contextmanager
def _open(
    cell: Cell, hubs: Mapping[str, FarHub], spokes: Mapping[str, Sequence[Member]], host: str, port: int
) -> Iterator[dict[str, Group]]:
    groups = {}
    for way, (ends, offset) in WAYS.items():
        setup = Setup(cell.payload, "tcp", cell.peers, f"tcp://{host}:{port + offset}", "")
        groups[way] = Group(ends, [hubs[way], *spokes[way]], setup)
        groups[way].start()
    yield groups
    for group in groups.values():
        with contextlib.suppress(RemoteError):
            group.end()
