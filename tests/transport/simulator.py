"""Seeded simulation of the three session cores: real protocol code, a virtual clock, a hostile network.

One `random.Random(seed)` decides everything, so a seed is a run. Each simulation is a shell like the real one, with the
same counters, and an oracle that knows what happened and checks it as it happens. For a while things break; then they
stop breaking, and everything must come right within bounded virtual time. A broken promise raises `Violation`, which
ends with the last events.

The network is what sockets give: in order while a connection holds. When it breaks, a tail of what was in the pipe is
lost; the rest may arrive late, behind what the next connection brings. PUSH and DEALER keep what is sent while they
are down; XPUB drops it.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import numpy as np

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.ledger import Balance, Ledger, audit
from ddrl_bus.transport.sessions import latest, queue
from ddrl_bus.transport.sessions.latest import Ask, Chunk, LatestPublisher, LatestSubscriber, Version
from ddrl_bus.transport.sessions.queue import ACCEPT, Lane, Probe, QueueReceiver, QueueSender
from ddrl_bus.transport.sessions.request import RequestClient, RequestServer
from ddrl_bus.transport.wire import Array

PROGRESS_S = 25.0
"""After the last fault, every living end makes progress within this virtual time..."""
SETTLE_S = 25.0
"""...and once production stops, everything is accounted for within this."""


class Violation(AssertionError):
    """A promise of a link was broken."""


@dataclass
class Faults:
    """What may go wrong in one run; `none` of it once the world turns calm."""

    break_every_s: float = 0.0
    loses: bool = False
    late_s: float = 0.0
    control_loss: float = 0.0
    """Probability that a credit, probe, beacon, chunk or reply goes missing alone."""
    duplicate: float = 0.0
    restart_every_s: float = 0.0
    zombies: bool = False
    refuse: float = 0.0
    corrupt: float = 0.0

    @property
    def none(self) -> bool:
        return self == Faults()

    @staticmethod
    def drawn(rng: Random) -> Faults:
        """Calm, only reordered (nothing lost, all within the grace time), in order but lossy, crashing, or wild."""
        match rng.choices(("calm", "reorder", "lossy", "crash", "wild"), (2, 3, 4, 4, 8))[0]:
            case "calm":
                return Faults()
            case "reorder":
                return Faults(break_every_s=rng.uniform(0.3, 2), late_s=0.6 * queue.GRACE_S)
            case "lossy":
                return Faults(rng.uniform(0.3, 3), loses=True, control_loss=rng.choice((0, 0.1, 0.4)))
            case "crash":
                return Faults(restart_every_s=rng.uniform(0.8, 4), loses=True, refuse=rng.choice((0, 0.1)))
        return Faults(
            break_every_s=rng.uniform(0.3, 3),
            loses=True,
            late_s=rng.choice((0.3, 1.5, 3.0)),
            control_loss=rng.choice((0, 0.05, 0.3)),
            duplicate=rng.choice((0, 0.1)),
            restart_every_s=rng.uniform(1, 6),
            zombies=rng.random() < 0.5,
            refuse=rng.choice((0, 0.1)),
            corrupt=rng.choice((0, 0.1)),
        )


class World:
    """Virtual time, one random generator, and the faults of this run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(f"{type(self).__name__} {seed}")  # str seeding does not depend on PYTHONHASHSEED
        self.now = self.rng.choice((0.0, 12345.6))
        self.delay_s = self.rng.choice((0.001, 0.02, 0.2))
        self.faults = self.drawn_faults = Faults.drawn(self.rng)
        self.calm_at = self.now + self.rng.uniform(3, 7)
        self.calm = False
        self.connections: list[Connection] = []
        self.trace: list[tuple[Any, ...]] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), what, args))

    def note(self, *words: Any) -> None:
        self.trace.append((self.now, *words))

    def require(self, promise: bool, *broken: Any) -> None:
        if not promise:
            lines = [f"{t:.4f} {' '.join(map(str, words))}" for t, *words in self.trace[-60:]]
            lines += [f"seed {self.seed}: {' '.join(map(str, broken))}", str(self.drawn_faults)]
            raise Violation("\n".join(lines))

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def run(self) -> None:
        """Faults, then calm, then `progressed()` in time, then `finish()`, then `settled()` in time, then `close()`."""
        if self.faults.break_every_s:
            self.after(self.rng.expovariate(1 / self.faults.break_every_s), self._break_one)
        if self.faults.restart_every_s:
            self.after(self.rng.expovariate(1 / self.faults.restart_every_s), self._restart_one)
        self._until(self.calm_at, lambda: False)
        self.note("calm")
        self.faults, self.calm = Faults(), True
        self.turn_calm()
        self._until(self.now + PROGRESS_S, self.progressed)
        self.require(self.progressed(), "no progress", PROGRESS_S, "s after the last fault:", self.state())
        self.finish()
        self._until(self.now + SETTLE_S, self.settled)
        self.require(self.settled(), "not settled", SETTLE_S, "s after the last message:", self.state())
        self.close()

    def _until(self, end: float, done: Callable[[], bool]) -> None:
        check_at = self.now
        while self._events and self._events[0][0] <= end:
            if self._events[0][0] >= check_at:
                self.check()
                if done():
                    return
                check_at = self._events[0][0] + 0.5
            self.now, _, what, args = heapq.heappop(self._events)
            what(*args)
        self.now = end

    def _break_one(self) -> None:
        if self.faults.none:
            return
        self.connections = [c for c in self.connections if c.owner.alive]
        if self.connections:
            self.rng.choice(self.connections).broken()
        self.after(self.rng.expovariate(1 / self.faults.break_every_s), self._break_one)

    def _restart_one(self) -> None:
        if self.faults.none:
            return
        self.restart_one()
        self.after(self.rng.expovariate(1 / self.faults.restart_every_s), self._restart_one)

    def check(self) -> None: ...
    def restart_one(self) -> None: ...
    def turn_calm(self) -> None: ...
    def progressed(self) -> bool: ...
    def finish(self) -> None: ...
    def settled(self) -> bool: ...
    def close(self) -> None: ...
    def state(self) -> object: ...


class Life:
    """One life of a node, from start to kill."""

    def __init__(self, world: World, node: str, epoch: int) -> None:
        self.world, self.node, self.epoch = world, node, epoch
        self.alive = True
        self.poll_s = world.rng.choice((0.1, 0.1, 0.25))
        world.note("start", self)
        world.after(self.poll_s, self._poll)

    def __str__(self) -> str:
        return f"{self.node}@{self.epoch}"

    def _poll(self) -> None:
        if self.alive:
            self.world.after(self.poll_s, self._poll)
            self.poll()

    def poll(self) -> None:
        """Look after timers."""

    def on_down(self) -> None:
        """One of its connections broke."""

    def kill(self) -> None:
        self.world.note("kill", self)
        self.alive = False


class Seat:
    """An address: at most one living life serves it."""

    def __init__(self) -> None:
        self.life: Any = None


@dataclass(slots=True)
class Flow:
    """What one connection carries one way, between two lives."""

    target: Any
    sent: int = 0
    delivered: int = 0
    last: float = 0.0
    cut: int | None = None
    late: float = 0.0


class Pipe:
    """One direction of a connection."""

    def __init__(
        self, connection: Connection, deliver: Callable[..., None], *, to_owner: bool = False, keeps: bool = False
    ) -> None:
        self.connection, self.world = connection, connection.world
        self.deliver, self.to_owner, self.keeps = deliver, to_owner, keeps
        self.byte_s = 0.0
        self._waiting: list[tuple[Any, ...]] = []
        self._flow: Flow | None = None
        connection.pipes.append(self)

    def up(self) -> None:
        self._flow = Flow(self.connection.owner if self.to_owner else self.connection.seat.life)
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self.send(*message)

    def send(self, *message: Any, control: bool = False, size: int = 0) -> None:
        world, flow = self.world, self._flow
        if flow is None:
            if self.keeps:
                self._waiting.append(message)
            return
        if control and world.chance(world.faults.control_loss):
            world.note("drop", message[0])
            return
        flow.last = max(flow.last, world.now + world.rng.random() * world.delay_s) + size * self.byte_s
        world.after(flow.last - world.now, self._arrive, flow, flow.sent, message)
        flow.sent += 1

    def _arrive(self, flow: Flow, number: int, message: tuple[Any, ...], *, late: bool = False) -> None:
        if flow.cut is not None:
            if number >= flow.cut:
                return
            if flow.late and not late:
                self.world.after(flow.late, lambda: self._arrive(flow, number, message, late=True))
                return
        flow.delivered = number + 1
        if not flow.target.alive:
            return
        self.deliver(flow.target, *message)
        if self.world.chance(self.world.faults.duplicate):
            self.world.after(self.world.rng.uniform(0, 2), self._again, flow, message)

    def _again(self, flow: Flow, message: tuple[Any, ...]) -> None:
        if flow.target.alive:
            self.deliver(flow.target, *message)

    def broken(self) -> None:
        flow, self._flow = self._flow, None
        if flow is not None:
            rng, faults = self.world.rng, self.world.faults
            flow.cut = rng.randint(flow.delivered, flow.sent) if faults.loses else flow.sent
            if faults.late_s:
                flow.late = rng.uniform(0, faults.late_s)
            elif faults.loses:
                flow.cut = flow.delivered  # nothing survives the break: nothing is out of order


class Connection:
    """From one life to an address; comes back by itself after a break, while its owner lives."""

    def __init__(self, world: World, owner: Life, seat: Seat, on_up: Callable[[], None] = lambda: None) -> None:
        self.world, self.owner, self.seat, self.on_up = world, owner, seat, on_up
        self.pipes: list[Pipe] = []
        self.generation = 0
        self.is_up = False
        world.connections.append(self)
        world.after(world.rng.uniform(0, 0.2), self._connect, 0)

    def broken(self) -> None:
        if not self.is_up:
            return
        self.is_up = False
        self.generation += 1
        for pipe in self.pipes:
            pipe.broken()
        self.owner.on_down()
        self.world.after(self.world.rng.choice((0.0, 0.1, 1.0)) + self.world.delay_s, self._connect, self.generation)

    def _connect(self, generation: int) -> None:
        if self.is_up or generation != self.generation or not self.owner.alive:
            return
        if self.seat.life is None or not self.seat.life.alive:
            self.world.after(self.world.rng.uniform(0.1, 0.4), self._connect, generation)
            return
        self.is_up = True
        for pipe in self.pipes:
            pipe.up()
        self.on_up()


def break_all(connections: list[Connection], *, owner: Life | None = None, seat: Seat | None = None) -> None:
    """A process died: whatever it had open, or served, is broken."""
    for connection in connections:
        if connection.owner is owner or connection.seat is seat:
            connection.broken()


# -- queue ---------------------------------------------------------------------------------------------------------

LaneKey = tuple[str, int, str, int]
LINK = "q"


@dataclass
class LaneTruth:
    """What really happened on a lane."""

    produced: list[int] = field(default_factory=list)
    """Payload of number `index + 1`."""
    settled: set[int] = field(default_factory=set)
    """Numbers accepted or refused."""
    last: int = 0


class SenderLife(Life):
    world: QueueSimulation

    def __init__(self, world: QueueSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.core: QueueSender[int] = world.sender_core(node, epoch, world.on_loss)
        self.ledger = Ledger()
        self.redo: deque[int] = deque()
        self.fresh_accepted = 0
        self.data: dict[str, Pipe] = {}
        for seat_name, seat in world.seats.items():
            self.data[seat_name] = Pipe(Connection(world, self, seat), ReceiverLife.on_data, keeps=True)
            back = Connection(world, self, seat)
            hello = Pipe(back, ReceiverLife.on_hello)
            credits = Pipe(back, SenderLife.on_credit, to_owner=True)
            back.on_up = lambda hello=hello, credits=credits: hello.send(self.node, self.epoch, credits)
        world.after(0, self._produce)

    def _produce(self) -> None:
        world = self.world
        if not self.alive or world.finished:
            return
        if not self.redo:
            payload = next(world.payloads)
            if self._send(payload):
                world.note("payload", payload)
                if world.calm:
                    world.fresh[payload] = self
        world.after(world.rng.expovariate(1 / world.produce_s), self._produce)

    def _send(self, payload: int) -> bool:
        world = self.world
        lane = self.core.ready(world.now)
        if lane is None:
            return False
        seq = lane.sent + 1
        self.ledger.counter(LINK, world.lane_name(self.lane_key(lane)), "produced").add()
        self.core.sent(lane, payload, world.now)
        world.on_produced(self.lane_key(lane), seq, payload)
        self._out(lane, seq, payload)
        return True

    def _out(self, lane: Lane[int], seq: int, payload: int) -> None:
        self.data[lane.receiver].send("message", self.node, self.epoch, seq, lane.epoch, payload)

    def lane_key(self, lane: Lane[int]) -> LaneKey:
        return self.node, self.epoch, lane.receiver, lane.epoch

    def on_credit(self, credit: queue.Credit) -> None:
        reopened = self.core.credit(credit, self.world.now)
        if reopened is not None:
            self.world.note("reopened", self, reopened.lane.receiver, reopened.lane.epoch, reopened.redo)
            self.redo.extend(reopened.redo)
        while self.redo and self._send(self.redo[0]):
            self.redo.popleft()

    def poll(self) -> None:
        for action in self.core.poll(self.world.now):
            if isinstance(action, Probe):
                lane = action.lane
                self.data[lane.receiver].send("probe", self.node, self.epoch, action.sent, lane.epoch, 0, control=True)
            else:
                self._out(action.lane, action.seq, action.frame)


class ReceiverLife(Life):
    world: QueueSimulation

    def __init__(self, world: QueueSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.core: QueueReceiver = world.receiver_core(node, epoch, world.window, world.on_loss)
        self.ledger = Ledger()
        self.box: deque[tuple[str, int]] = deque()
        self.unread: Counter[tuple[str, int]] = Counter()
        self.newest: dict[str, int] = {}
        self.credits: dict[tuple[str, int], Pipe] = {}
        self.consume_s = world.rng.choice((0.01, 0.05, 0.8 / world.window))
        world.after(0, self._consume)

    def on_hello(self, sender: str, epoch: int, credits: Pipe) -> None:
        self.newest[sender] = max(epoch, self.newest.get(sender, 0))
        self.credits[sender, epoch] = credits
        known = self.core.hello(sender, epoch)
        self.world.require(
            (known is None) == (epoch < self.newest[sender]), self, "hello of", sender, epoch, "answered", known
        )
        self._send_credits()

    def on_data(self, kind: str, sender: str, epoch: int, seq: int, lane: int, payload: int) -> None:
        world = self.world
        if kind == "probe":
            self.core.probed(sender, epoch, seq, lane, world.now)
        else:
            verdict = self.core.arrived(sender, epoch, seq, lane, world.now)
            world.note(verdict, self, sender, epoch, seq, lane)
            world.verdicts[verdict] += 1
            if verdict == ACCEPT:
                self._accept(sender, epoch, seq, lane, payload)
            elif verdict == "duplicate":
                self._counter(sender, epoch, "duplicates").add()
        self._send_credits()

    def _accept(self, sender: str, epoch: int, seq: int, lane: int, payload: int) -> None:
        world = self.world
        world.on_settled(self, (sender, epoch, self.node, lane), seq, payload)
        if world.chance(world.faults.refuse):
            self._counter(sender, epoch, "refused").add()
            self.core.freed(sender, epoch)
            return
        self._counter(sender, epoch, "accepted").add()
        self.box.append((sender, epoch))
        self.unread[sender, epoch] += 1
        world.require(self.unread[sender, epoch] <= world.window, self, "holds more than the window of", sender)

    def _consume(self) -> None:
        if not self.alive:
            return
        if self.box:
            sender, epoch = self.box.popleft()
            self.unread[sender, epoch] -= 1
            self._counter(sender, epoch, "taken").add()
            self.core.freed(sender, epoch)
            self._send_credits()
        self.world.after(self.world.rng.expovariate(1 / self.consume_s), self._consume)

    def _send_credits(self) -> None:
        for credit in self.core.credits():
            self.credits[credit.sender, credit.sender_epoch].send(credit, control=True)

    def poll(self) -> None:
        for inbound, missing in self.core.poll(self.world.now):
            self.world.note("lost", self, inbound.sender, inbound.epoch, missing)
            self._counter(inbound.sender, inbound.epoch, "lost").add(missing)
        self._send_credits()

    def _counter(self, sender: str, epoch: int, what: str) -> Any:
        return self.ledger.counter(LINK, self.world.lane_name((sender, epoch, self.node, self.epoch)), what)


class QueueSimulation(World):
    """Some senders towards some receivers over one `queue` link.

    Args:
        sender_core, receiver_core: the cores under test, or broken ones.
    """

    sender_core: type[QueueSender[int]] = QueueSender
    receiver_core: type[QueueReceiver] = QueueReceiver

    def __init__(self, seed: int, **cores: Any) -> None:
        super().__init__(seed)
        vars(self).update(cores)
        rng = self.rng
        self.on_loss: queue.OnLoss = rng.choice(("count", "resend"))
        self.window = rng.choice((1, 2, 3, 4, 8, 16))
        self.produce_s = rng.choice((0.03, 0.1, 0.3))
        self.lanes: dict[LaneKey, LaneTruth] = {}
        self.arrived: set[tuple[int, str, int]] = set()
        self.payloads = count(1)
        self.fresh: dict[int, SenderLife] = {}
        self.verdicts: Counter[str] = Counter()
        self.finished = False
        self.seats = {f"learner-{i}": Seat() for i in range(rng.randint(1, 2))}
        self.retired: set[str] = set()
        self.down: set[str] = set()
        self.lives: list[Any] = []
        for name in self.seats:
            self._start_receiver(name)
        self.senders = {f"actor-{i}": self._start_sender(f"actor-{i}", 1) for i in range(rng.randint(1, 3))}

    @staticmethod
    def lane_name(key: LaneKey) -> str:
        return f"{key[0]}@{key[1]}>{key[2]}@{key[3]}"

    def _start_receiver(self, name: str) -> None:
        seat = self.seats[name]
        self.down.discard(name)
        life = seat.life = ReceiverLife(self, name, seat.life.epoch + 1 if seat.life is not None else 1)
        self.lives.append(life)

    def _start_sender(self, name: str, epoch: int) -> SenderLife:
        life = SenderLife(self, name, epoch)
        self.lives.append(life)
        return life

    def restart_one(self) -> None:
        name = self.rng.choice([*self.seats, *self.senders])
        downtime = self.rng.choice((0.05, 0.5, 2.0))
        if name in self.seats:
            seat = self.seats[name]
            if not seat.life.alive:
                return
            seat.life.kill()
            break_all(self.connections, seat=seat)
            if len(self.retired) + 1 < len(self.seats) and self.chance(0.2):
                self.retired.add(name)
            else:
                self.down.add(name)
                self.after(downtime, self._start_receiver, name)
        else:
            old = self.senders[name]
            if not self.faults.zombies or self.rng.random() < 0.5:
                old.kill()
                break_all(self.connections, owner=old)
            self.senders[name] = self._start_sender(name, old.epoch + 1)

    def turn_calm(self) -> None:
        for life in self.lives:
            if isinstance(life, SenderLife) and life.alive and self.senders[life.node] is not life:
                life.kill()
                break_all(self.connections, owner=life)

    # what the oracle sees

    def on_produced(self, key: LaneKey, seq: int, payload: int) -> None:
        self.note("produced", *key, seq, payload)
        truth = self.lanes.setdefault(key, LaneTruth())
        truth.produced.append(payload)
        self.require(seq == len(truth.produced), "lane", key, "skipped to number", seq)
        receiver = next(x for x in self.lives if isinstance(x, ReceiverLife) and (x.node, x.epoch) == key[2:])
        books = receiver.ledger.snapshot()
        freed = sum(books.get(f"{LINK}/{self.lane_name(key)}/{what}", 0) for what in ("taken", "refused", "lost"))
        self.require(seq - freed <= self.window, "lane", key, "has", seq - freed, "unfreed, window", self.window)

    def on_settled(self, receiver: ReceiverLife, key: LaneKey, seq: int, payload: int) -> None:
        sender, epoch, _, lane = key
        self.require(lane == receiver.epoch, receiver, "accepted a message for life", lane)
        self.require(epoch == receiver.newest.get(sender), receiver, "accepted from a zombie:", key, seq)
        truth = self.lanes[key]
        self.require(seq not in truth.settled, "number", seq, "of lane", key, "accepted twice")
        self.require(truth.produced[seq - 1] == payload, "number", seq, "of lane", key, "is another message")
        self.require((payload, *key[2:]) not in self.arrived, "payload", payload, "accepted twice by", receiver)
        in_order = self.on_loss == "count" and not self.drawn_faults.late_s
        self.require(not in_order or seq > truth.last, "lane", key, "out of order:", seq, "after", truth.last)
        truth.settled.add(seq)
        truth.last = seq
        self.arrived.add((payload, *key[2:]))
        if payload in self.fresh:
            self.fresh.pop(payload).fresh_accepted += 1

    def _open_lanes(self) -> list[tuple[LaneKey, LaneTruth]]:
        living = self._living()
        return [(k, t) for k, t in self.lanes.items() if all(end in living for end in self.lane_name(k).split(">"))]

    def _living(self) -> frozenset[str]:
        return frozenset(str(life) for life in self.lives if life.alive)

    def books(self) -> Balance:
        """The audit over all lives, checked against the truth."""
        balance = audit([life.ledger.snapshot() for life in self.lives], self._living()).get(LINK, Balance())
        produced = sum(len(t.produced) for t in self.lanes.values())
        settled = sum(len(t.settled) for t in self.lanes.values())
        self.require(balance.produced == produced, "audit:", balance, "but produced", produced)
        self.require(balance.accepted + balance.refused == settled, "audit:", balance, "but settled", settled)
        adds_up = produced == settled + balance.lost + balance.in_flight and balance.in_flight >= 0
        self.require(adds_up, "does not add up:", balance)
        return balance

    def lost_on(self, key: LaneKey) -> int:
        name = f"{LINK}/{self.lane_name(key)}/lost"
        return sum(life.ledger.snapshot().get(name, 0) for life in self.lives if (life.node, life.epoch) == key[2:])

    def check(self) -> None:
        self.books()

    def progressed(self) -> bool:
        return all(life.fresh_accepted >= 3 for life in self.senders.values())

    def finish(self) -> None:
        self.finished = True

    def settled(self) -> bool:
        balance = self.books()
        boxes = any(life.box for life in self.lives if isinstance(life, ReceiverLife) and life.alive)
        return balance.closed and not boxes and not self.down and all(map(self._at_rest, self.senders.values()))

    def _at_rest(self, sender: SenderLife) -> bool:
        """It knows that all it sent to living receivers is settled, has its window back, and nothing to send again."""
        lanes = [lane for lane in sender.core.lanes.values() if lane.receiver not in self.retired]
        return not sender.redo and all(
            lane.settled and lane.freed == lane.sent and lane.epoch == self.seats[lane.receiver].life.epoch
            for lane in lanes
        )

    def close(self) -> None:
        for key, truth in self.lanes.items():
            lost, settled = self.lost_on(key), len(truth.settled)
            self.require(settled + lost <= len(truth.produced), "lane", key, settled, lost, len(truth.produced))
        for key, truth in self._open_lanes():
            lost, settled = self.lost_on(key), len(truth.settled)
            self.require(settled + lost == len(truth.produced), "lane", key, settled, "+", lost, len(truth.produced))
            lossless = self.on_loss == "resend" or not self.drawn_faults.loses
            self.require(not lossless or lost == 0, "lane", key, "gave", lost, "up that were only late or are resent")
        if self.on_loss == "resend":
            self._require_all_arrived()
        if self.drawn_faults.none:
            others = {v: n for v, n in self.verdicts.items() if v != ACCEPT}
            allowed = {"duplicate"} if self.on_loss == "resend" else set()
            self.require(others.keys() <= allowed, "in a calm run:", others)

    def _require_all_arrived(self) -> None:
        """Whatever a living sender produced arrived, unless it was meant for a receiver that is gone for good."""
        excused = {payload for payload, *_ in self.arrived}
        for (_, _, receiver, _), truth in self.lanes.items():
            if receiver in self.retired:
                excused.update(truth.produced)
        for (sender, epoch, receiver, _), truth in self.lanes.items():
            if self.senders[sender].epoch == epoch:
                missing = set(truth.produced) - excused
                self.require(not missing, sender, "sent to", receiver, missing, "which never arrived")

    def state(self) -> object:
        return [
            f"{self.lane_name(k)}: produced {len(t.produced)} settled {len(t.settled)} lost {self.lost_on(k)}"
            for k, t in self._open_lanes()
        ], [f"{life} fresh {life.fresh_accepted} redo {len(life.redo)}" for life in self.senders.values()]


# -- latest --------------------------------------------------------------------------------------------------------


class PublisherLife(Life):
    world: LatestSimulation

    def __init__(self, world: LatestSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.core = world.publisher_core(differences=world.differences)
        self.pipes: dict[latest.Life, Pipe] = {}
        self.heard: dict[latest.Life, list[Ask]] = {}
        self.listeners: list[Pipe] = []
        self.number = 0
        self.beacon_at = world.now
        world.after(0, self._publish)

    def on_listener(self, pipe: Pipe) -> None:
        if pipe not in self.listeners:
            self.listeners.append(pipe)

    def on_question(self, ask: Ask, life: latest.Life, fetches: bool, pipe: Pipe) -> None:
        text = ask.text()
        self.world.require(Ask.parsed(text) == ask, "a question reads otherwise:", text)
        self.heard.setdefault(life, []).append(ask)
        if fetches:
            self.pipes[life] = pipe
            self.world.require(self.core.asked(life, ask, self.world.now), "too many ask")
            self._send_more(life)
        elif self.core.version is not None and self.core.version > ask.held:
            self._announce(pipe)

    def _publish(self) -> None:
        world = self.world
        if not self.alive or (world.finished and self.core.version is not None):
            return
        self.number += world.rng.choice((1, 1, 5))
        version = (self.epoch, self.number)
        value = wire.encode("weights", self.node, *version, {}, {"v": world.arrays()}, sent_at=0)
        world.note("publish", version, len(value))
        world.values[version] = bytes(value)
        world.published = version
        self.core.publish(version, value)
        for pipe in self.listeners:
            self._announce(pipe)
        for life in self.core.fetching:
            self._send_more(life)
        world.after(world.rng.uniform(0.5, 1.5) * world.publish_s, self._publish)

    def _announce(self, pipe: Pipe) -> None:
        pipe.send(self.core.version, self.core.value, control=True)

    def _send_more(self, life: latest.Life) -> None:
        for chunk in self.core.more(life, self.world.now):
            self._chunk(self.pipes[life], chunk)

    def _chunk(self, pipe: Pipe, chunk: Chunk) -> None:
        rng, faults = self.world.rng, self.world.faults
        head, body = chunk.head, chunk.body
        if len(body) and self.world.chance(faults.corrupt):
            if rng.random() < 0.5:
                body = memoryview(bytes([body[0] ^ 1]) + bytes(body[1:]))
            else:
                head[rng.choice((2, 3, 4, 5, 6))] ^= 1 << rng.randrange(8)
        pipe.send(head, body, control=True, size=len(body))

    def poll(self) -> None:
        if self.core.version is not None and self.world.now >= self.beacon_at:
            self.beacon_at = self.world.now + latest.BEACON_EVERY_S
            for pipe in self.listeners:
                pipe.send(self.core.version, None, control=True)
            for life in self.core.fetching:
                for chunk in self.core.beacon(life):
                    self._chunk(self.pipes[life], chunk)


class SubscriberLife(Life):
    world: LatestSimulation

    def __init__(self, world: LatestSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.far = world.rng.random() < 0.7
        self.maps = world.rng.choice((1.0, 1.0, 0.7))
        """How likely a value that is announced can be read; else it has to be fetched."""
        self.core: LatestSubscriber = world.subscriber_core(world.now, fetches=self.far)
        self.held: Version | None = None
        self.taken = self.taken_calm = 0
        self.question: Ask | None = None
        self.heard: set[tuple[int, ...]] = set()
        self.connection = Connection(world, self, world.seat)
        self.listen = Pipe(self.connection, PublisherLife.on_listener)
        self.ask = Pipe(self.connection, PublisherLife.on_question)
        self.chunks = Pipe(self.connection, SubscriberLife.on_message, to_owner=True)
        self.chunks.byte_s = world.byte_s if self.far else 0.0
        self.connection.on_up = self._on_up
        self._ask()

    @property
    def life(self) -> latest.Life:
        return self.node, self.epoch

    def _on_up(self) -> None:
        """libzmq repeats what is subscribed to."""
        if not self.far:
            self.listen.send(self.chunks)
        if self.question is not None:
            self.ask.send(self.question, self.life, self.core.fetches, self.chunks)

    def on_down(self) -> None:
        """The publisher's libzmq notices in the end, and after all that came."""
        self.world.after(self.world.rng.choice((6.0, 9.0)), self._taken_back, self.world.seat.life)

    def _taken_back(self, publisher: PublisherLife) -> None:
        for ask in publisher.heard.pop(self.life, ()):
            if not self.connection.is_up or self.question != ask:
                publisher.core.gone(self.life, ask)

    def _ask(self) -> None:
        ask = self.core.question(self.world.now)
        if ask is not None:
            self.question = ask
            self.ask.send(ask, self.life, self.core.fetches, self.chunks, control=True)

    def on_message(self, head: Any, body: memoryview | None) -> None:
        if isinstance(head, tuple):
            self._on_announced(head, body)
        else:
            self._on_chunk(head, body)
        self._ask()

    def _on_announced(self, version: Version, value: memoryview | None) -> None:
        world = self.world
        if not self.core.wants(version, world.now) or value is None:
            return
        if world.rng.random() >= self.maps:
            self.core.fetch(True, world.now)
            return
        self.core.fetch(False, world.now)
        self.core.took(version, value if world.rng.random() < 0.5 else None, world.now)
        self._hold(version, value)

    def _on_chunk(self, head: list[int], body: memoryview) -> None:
        world, honest = self.world, not self.world.drawn_faults.corrupt
        if world.drawn_faults.none and len(body):
            chunk = (*head[:2], *head[3:])
            world.require(chunk not in self.heard or not self.far, "sent again, though nothing was lost:", chunk)
            self.heard.add(chunk)
        try:
            complete = self.core.chunk(head, body, world.now)
        except WireError as error:
            world.note("refused", self, error.reason)
            world.require(error.reason in ("chunk", "torn", "codec", "truncated"), "refused for", error.reason)
            world.require(not honest or (not self.far and error.reason == "torn"), "refused an honest chunk:", error)
            return
        if complete is not None:
            world.require(complete[1].readonly, self, "got a writable value")
            self._hold(*complete)

    def _hold(self, version: Version, value: memoryview) -> None:
        world = self.world
        world.note("held", self, version)
        world.require(self.held is None or version > self.held, self, "went from", self.held, "back to", version)
        world.require(bytes(value) == world.values.get(version), self, "got a torn value of version", version)
        self.held = version
        self.taken_calm += world.calm

    def poll(self) -> None:
        self._ask()


class LatestSimulation(World):
    """One publisher and some subscribers of one `latest` link, who fetch or are told. `latest.CHUNK`,
    `WINDOW` and `MAX_WINDOW` should be patched to something small."""

    publisher_core: type[LatestPublisher] = LatestPublisher
    subscriber_core: type[LatestSubscriber] = LatestSubscriber

    def __init__(self, seed: int, **cores: Any) -> None:
        super().__init__(seed)
        vars(self).update(cores)
        rng = self.rng
        self.values: dict[Version, bytes] = {}
        self.published: Version | None = None
        self.publish_s = rng.choice((0.05, 0.3, 1.5, 6.0))
        # A slow link takes up to 3 s for a value, in which a publisher may have published many.
        self.byte_s = rng.choice((0.0, 0.0, 0.25 / latest.CHUNK))
        self.differences = rng.random() < 0.5
        self._arrays = np.zeros(rng.randrange(11) * 64, np.uint8)
        self.finished = False
        self.falls_silent = rng.random() < 0.5
        """The publisher stops when the faults do: what was lost before must still arrive."""
        self.seat = Seat()
        self._start_publisher()
        self.subscribers = [SubscriberLife(self, f"actor-{i}", 1) for i in range(rng.randint(1, 3))]
        self.after(rng.uniform(0, 8), self._late_joiner)

    def arrays(self) -> Array:
        """What is published next: the same, a little changed, or something else."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.2:
            self._arrays = np.frombuffer(rng.randbytes(rng.randrange(11) * 64 + 1), np.uint8).copy()
        elif kind < 0.8 and len(self._arrays):
            self._arrays = self._arrays.copy()
            self._arrays[rng.randrange(len(self._arrays))] ^= 1
        return self._arrays

    def _start_publisher(self) -> None:
        self.seat.life = PublisherLife(self, "learner", self.seat.life.epoch + 1 if self.seat.life else 1)

    def _late_joiner(self) -> None:
        self.subscribers.append(SubscriberLife(self, "late", 1))

    def restart_one(self) -> None:
        which = self.rng.randrange(len(self.subscribers) + 1)
        if which == 0:
            if self.seat.life.alive:
                self.seat.life.kill()
                break_all(self.connections, seat=self.seat)
                self.after(self.rng.choice((0.05, 1.0)), self._start_publisher)
        else:
            old = self.subscribers[which - 1]
            old.kill()
            break_all(self.connections, owner=old)
            self.subscribers[which - 1] = SubscriberLife(self, old.node, old.epoch + 1)

    def turn_calm(self) -> None:
        self.finished = self.falls_silent

    def progressed(self) -> bool:
        """Also who is slower than the publisher gets one value after the other."""
        late = any(s.node == "late" for s in self.subscribers)
        return late and (self.falls_silent or all(s.taken_calm >= 2 for s in self.subscribers))

    def finish(self) -> None:
        self.finished = True

    def settled(self) -> bool:
        """All hold the newest, and nobody who is gone is remembered."""
        publisher = self.seat.life
        there = {s.life for s in self.subscribers}
        return (
            publisher.alive
            and all(s.held == publisher.core.version for s in self.subscribers)
            and there.issuperset(publisher.core.fetching)
        )

    def check(self) -> None:
        far = {s.life for s in self.subscribers if s.far}
        for life, who in self.seat.life.core._fetching.items() if self.drawn_faults.none else ():
            under_way = who.sent - who.ask.received
            window = latest.WINDOW if self.byte_s and life in far else latest.MAX_WINDOW
            self.require(under_way < window + window * latest.CHUNK // latest.WINDOW, "more than a window to", life)

    def state(self) -> object:
        return self.published, {str(s): (s.held, s.taken_calm, s.question) for s in self.subscribers}


# -- request -------------------------------------------------------------------------------------------------------

REQUEST_GRACE_S = 7.0
"""With no fault in its last so many seconds a request is answered: reconnection, a repetition or two, the service."""


@dataclass
class Asked:
    life: ClientLife
    opened: float
    deadline: float
    outcome: str = ""


class ClientLife(Life):
    world: RequestSimulation

    def __init__(self, world: RequestSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.core: RequestClient[int] = world.client_core()
        self.asked: dict[int, Asked] = {}
        self.replies = 0
        self.delivered = 0
        connection = Connection(world, self, world.seat)
        self.back = Pipe(connection, ClientLife.on_reply, to_owner=True)
        self.out = Pipe(connection, ServerLife.on_request, keeps=True)
        world.after(0, self._ask)

    def _ask(self) -> None:
        world = self.world
        if not self.alive or world.finished:
            return
        for _ in range(world.burst):
            timeout = world.rng.choice((0.2, 1.5, 4.0, 12.0))
            number = self.core.next_id()
            world.require(number not in self.asked, self, "uses number", number, "again")
            self.asked[number] = Asked(self, world.now, world.now + timeout)
            self.core.open(number, number, world.now, timeout)
            self._send(number)
        world.after(world.rng.expovariate(1 / world.ask_s), self._ask)

    def _send(self, number: int) -> None:
        self.out.send(self, number)

    def on_reply(self, number: int, answer: object) -> None:
        world = self.world
        self.replies += 1
        self.poll()  # as a shell does: time is looked at before what arrived
        late = self.core.late
        if not self.core.answered(number, self.world.now):
            world.require(self.core.late == late + 1, self, "dropped a reply uncounted")
            return
        self.delivered += 1
        world.note("answer", self, number)
        world.require(answer == (self.node, self.epoch, number), self, "got for", number, "the answer", answer)
        self._end(number, "answer")

    def poll(self) -> None:
        due = self.core.poll(self.world.now)
        for number in due.again:
            self._send(number)
        for number in due.expired:
            self._end(number, "timeout")

    def _end(self, number: int, outcome: str) -> None:
        world, asked = self.world, self.asked[number]
        world.require(not asked.outcome, self, "request", number, "ended as", asked.outcome, "and as", outcome)
        asked.outcome = outcome
        late = world.now - asked.deadline
        world.require(late <= self.poll_s + 1e-9, self, "request", number, outcome, late, "s after its deadline")
        world.require(outcome == "answer" or late >= -1e-9, self, "request", number, "gave up", -late, "s early")
        must = world.now - max(asked.opened, world.calm_at) > REQUEST_GRACE_S or world.drawn_faults.none
        if outcome == "timeout" and must and asked.deadline - asked.opened > REQUEST_GRACE_S:
            world.require(False, self, "request", number, "timed out in a world without faults")


class ServerLife(Life):
    world: RequestSimulation

    def __init__(self, world: RequestSimulation, node: str, epoch: int) -> None:
        super().__init__(world, node, epoch)
        self.core: RequestServer[tuple[str, int, int]] = world.server_core()
        self.ran: set[tuple[str, int, int]] = set()
        self.newest: dict[str, int] = {}

    def on_request(self, client: ClientLife, number: int) -> None:
        world, key = self.world, (client.node, client.epoch, number)
        newest = self.newest[client.node] = max(client.epoch, self.newest.get(client.node, 0))
        standing = self.core.arrived(*key)
        world.note("request", self, *key, standing)
        if isinstance(standing, tuple):
            self._reply(client, number, standing[0])
        elif standing == "new":
            world.require(key not in self.ran, self, "ran", key, "twice")
            world.require(client.epoch == newest, self, "ran a request of an earlier life:", key)
            self.ran.add(key)
            world.after(world.rng.expovariate(1 / world.service_s) % 3.0, self._answer, client, number)

    def _answer(self, client: ClientLife, number: int) -> None:
        if self.alive:
            frame = (client.node, client.epoch, number)
            self.core.answer(client.node, client.epoch, number, frame)
            self._reply(client, number, frame)

    def _reply(self, client: ClientLife, number: int, frame: tuple[str, int, int]) -> None:
        client.back.send(number, frame, control=True)


class RequestSimulation(World):
    """Some clients and one server of one `request` link."""

    client_core: type[RequestClient[int]] = RequestClient
    server_core: type[RequestServer[tuple[str, int, int]]] = RequestServer

    def __init__(self, seed: int, **cores: Any) -> None:
        super().__init__(seed)
        vars(self).update(cores)
        rng = self.rng
        self.ask_s = rng.choice((0.1, 0.3, 1.0))
        self.service_s = rng.choice((0.005, 0.1, 0.8))
        self.burst = rng.choice((1, 1, 1, 8))
        if self.burst > 1:
            self.ask_s = 1.0
        self.finished = False
        self.seat = Seat()
        self._start_server()
        self.lives: list[ClientLife] = []
        self.clients = {name: self._start_client(name, 1) for name in ("actor-0", "actor-1")[: rng.randint(1, 2)]}

    def _start_server(self) -> None:
        self.seat.life = ServerLife(self, "controller", self.seat.life.epoch + 1 if self.seat.life else 1)

    def _start_client(self, name: str, epoch: int) -> ClientLife:
        life = ClientLife(self, name, epoch)
        self.lives.append(life)
        return life

    def restart_one(self) -> None:
        name = self.rng.choice(["controller", *self.clients])
        if name == "controller":
            if self.seat.life.alive:
                self.seat.life.kill()
                break_all(self.connections, seat=self.seat)
                self.after(self.rng.choice((0.05, 1.0)), self._start_server)
        else:
            old = self.clients[name]
            old.kill()
            break_all(self.connections, owner=old)
            self.clients[name] = self._start_client(name, old.epoch + 1)

    def progressed(self) -> bool:
        return all(
            any(a.outcome == "answer" and a.opened > self.calm_at for a in life.asked.values())
            for life in self.clients.values()
        )

    def finish(self) -> None:
        self.finished = True

    def settled(self) -> bool:
        return all(a.outcome for life in self.clients.values() for a in life.asked.values())

    def close(self) -> None:
        for life in self.lives:
            self.require(life.replies == life.delivered + life.core.late, life, "lost count of replies")
        for life in self.clients.values():
            self.require(not life.core.open_requests, life, "still has open", life.core.open_requests)

    def state(self) -> object:
        return {str(c): [n for n, a in c.asked.items() if not a.outcome] for c in self.clients.values()}
