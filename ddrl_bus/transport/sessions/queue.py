"""The `queue` link: bounded, in order per sender, and nothing lost silently.

A *lane* is one life of a sender towards one life of a receiver. Messages of a lane are numbered from 1. The receiver
answers with cumulative credits, so that a lost credit is healed by the next one:

    received    every number up to it is settled: accepted, refused, or given up as lost
    freed       how many messages no longer occupy the window: taken by the consumer, refused, or lost
    window      how many unfreed messages the sender may have out

A sender sends only with credit, to the receiver with most of it. Messages lost with a broken connection show as a gap
in the numbers, or, at the tail, when the sender's probe announces a number that never came. Under `on_loss: count` the
receiver gives a gap up after a grace time and counts it; under `resend` the sender keeps frames until `received`
covers them and sends them again. Either way a number is accepted at most once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, NamedTuple, TypeVar

F = TypeVar("F")

OnLoss = Literal["count", "resend"]

CREDIT_EVERY_S: Final = 0.5
"""Credits are repeated this often, whether or not anything changed."""
SILENT_S: Final = 3.0
"""A receiver unheard for this long gets no new messages."""
GRACE_S: Final = 1.0
"""How long a gap may be filled by a late connection before it counts as lost."""
PROBE_S: Final = 0.5
"""A sender without progress for this long asks what arrived; under `resend` it sends it all again."""
MAX_RESEND_S: Final = 10.0
"""Where messages take long to be settled, it waits for twice as long as the last one took, and then for twice as long
each time, at most for this: on a narrow line what is sent again only holds up what is already on its way."""


class Credit(NamedTuple):
    """What a receiver tells one sender; `epoch` and `sender_epoch` name the lane."""

    receiver: str
    epoch: int
    sender: str
    sender_epoch: int
    received: int
    freed: int
    window: int


@dataclass(slots=True)
class Lane(Generic[F]):
    """A sender's view of one lane."""

    receiver: str
    epoch: int
    window: int = 0
    sent: int = 0
    received: int = 0
    freed: int = 0
    heard: float = 0.0
    progressed: float = 0.0
    patience: float = PROBE_S
    kept: deque[tuple[int, F, float]] = field(default_factory=deque)
    """Number, frame, and when it went out first."""

    @property
    def credit(self) -> int:
        return self.window - (self.sent - self.freed)

    @property
    def settled(self) -> bool:
        return self.received >= self.sent


@dataclass(frozen=True, slots=True)
class Probe:
    """Tell the receiver of `lane` that numbers up to `sent` are out."""

    lane: Lane[object]
    sent: int


@dataclass(frozen=True, slots=True)
class Resend(Generic[F]):
    """Send `frame` on `lane` again, as number `seq`."""

    lane: Lane[F]
    seq: int
    frame: F


@dataclass(frozen=True, slots=True)
class Reopened(Generic[F]):
    """The receiver came back as a new life: `lane` replaces `old`, whose unsettled messages died or must be redone.

    `redo` holds what `on_loss: resend` kept, to be sent as new messages; numbers and lane in them are stale.
    """

    lane: Lane[F]
    old: Lane[F]
    redo: tuple[F, ...]


class QueueSender(Generic[F]):
    """One sender's side. `F` is whatever the shell needs to send a message again."""

    def __init__(self, node: str, epoch: int, on_loss: OnLoss = "count") -> None:
        self.node = node
        self.epoch = epoch
        self.on_loss = on_loss
        self.lanes: dict[str, Lane[F]] = {}

    def ready(self, now: float) -> Lane[F] | None:
        """The living receiver with most credit, or None: wait."""
        best, most = None, 0
        for lane in self.lanes.values():
            credit = lane.window - (lane.sent - lane.freed)
            if credit > most and now - lane.heard < SILENT_S:
                best, most = lane, credit
        return best

    def sent(self, lane: Lane[F], frame: F | None, now: float) -> None:
        """Number `lane.sent + 1` went out; `frame` is kept until it is settled, under `on_loss: resend`."""
        if lane.sent == lane.received:
            lane.progressed = now
        lane.sent += 1
        if frame is not None and self.on_loss == "resend":
            lane.kept.append((lane.sent, frame, now))

    def credit(self, credit: Credit, now: float) -> Reopened[F] | None:
        """Take a credit in. Ignores other senders' credits, other lives of ours, and older lives of the receiver."""
        if credit.sender != self.node or credit.sender_epoch != self.epoch:
            return None
        lane = self.lanes.get(credit.receiver)
        reopened = None
        if lane is None or credit.epoch > lane.epoch:
            old, lane = lane, Lane(credit.receiver, credit.epoch, progressed=now)
            self.lanes[credit.receiver] = lane
            if old is not None:
                reopened = Reopened(lane, old, tuple(frame for _, frame, _ in old.kept))
        elif credit.epoch < lane.epoch:
            return None
        if credit.received > lane.sent:  # not a number that we ever sent
            return reopened
        lane.heard, lane.window = now, credit.window
        lane.freed = max(lane.freed, min(credit.freed, lane.sent))
        if credit.received > lane.received:
            lane.received, lane.progressed = credit.received, now
            while lane.kept and lane.kept[0][0] <= lane.received:
                _, _, since = lane.kept.popleft()
                lane.patience = min(max(PROBE_S, 2 * (now - since)), MAX_RESEND_S)
        return reopened

    def poll(self, now: float) -> Iterator[Probe | Resend[F]]:
        """What to do about lanes without progress, as long as their receivers are heard."""
        for lane in self.lanes.values():
            if lane.settled or now - lane.progressed < lane.patience or now - lane.heard >= SILENT_S:
                continue
            lane.progressed = now
            if self.on_loss == "resend":
                lane.patience = min(2 * lane.patience, MAX_RESEND_S)
                for seq, frame, _ in lane.kept:
                    yield Resend(lane, seq, frame)
            else:
                yield Probe(lane, lane.sent)  # type: ignore[arg-type]

    @property
    def settled(self) -> bool:
        """Every message sent is accounted for by a living receiver."""
        return all(lane.settled for lane in self.lanes.values())


ACCEPT: Final = "accept"
Verdict = Literal["accept", "duplicate", "unknown_sender", "fenced", "other_life", "beyond_window"]


@dataclass(slots=True)
class Inbound:
    """A receiver's view of one lane."""

    sender: str
    epoch: int
    received: int = 0
    freed: int = 0
    told: int = 0
    """`freed` as the sender was last told."""
    lost: int = 0
    announced: int = 0
    """The highest number known to be out."""
    ahead: set[int] = field(default_factory=set)
    gap_since: float | None = None


class QueueReceiver:
    """One receiver's side, for any number of senders."""

    def __init__(self, node: str, epoch: int, window: int, on_loss: OnLoss = "count") -> None:
        self.node = node
        self.epoch = epoch
        self.window = window
        self.on_loss = on_loss
        self.senders: dict[str, Inbound] = {}
        self._repeated = 0.0
        self._stride = max(1, window // 2)
        self._changed: dict[str, Inbound] = {}
        self._due: dict[str, Inbound] = {}

    def hello(self, sender: str, epoch: int) -> Inbound | None:
        """A sender shows itself: a new life replaces the old one. None if a newer life is already known."""
        known = self.senders.get(sender)
        if known is not None and known.epoch > epoch:
            return None
        if known is None or known.epoch < epoch:
            known = self.senders[sender] = Inbound(sender, epoch)
            self._changed.pop(sender, None)
        self._due[sender] = known
        return known

    def arrived(self, sender: str, epoch: int, seq: int, lane: int, now: float) -> Verdict:
        """Judge a numbered message. On `accept` the caller must later call `freed` once."""
        inbound = self.senders.get(sender)
        verdict = self._judge(inbound, epoch, seq, lane)
        if verdict != ACCEPT:
            if verdict == "duplicate" and inbound is not None:  # it may never have heard our last credit
                self._changed[sender] = inbound
            return verdict
        assert inbound is not None
        self._changed[sender] = inbound
        if seq == inbound.received + 1 and not inbound.ahead:
            inbound.received, inbound.gap_since = seq, None
        else:
            inbound.ahead.add(seq)
            self._advance(inbound, now)
        return ACCEPT

    def next_ones(self, sender: str, epoch: int, seq: int, lane: int, count: int) -> bool:
        """Whether so many messages from `seq` on are just those that come next: they are accepted then, as `arrived`
        would each of them; else nothing has happened."""
        inbound = self.senders.get(sender)
        if inbound is None or inbound.ahead or seq != inbound.received + 1:
            return False
        last = seq + count - 1
        if self._judge(inbound, epoch, last, lane) != ACCEPT:
            return False
        self._changed[sender] = inbound
        inbound.received, inbound.gap_since = last, None
        return True

    def _judge(self, inbound: Inbound | None, epoch: int, seq: int, lane: int) -> Verdict:
        if inbound is None or epoch > inbound.epoch:
            return "unknown_sender"
        if epoch < inbound.epoch:
            return "fenced"
        if lane != self.epoch:
            return "other_life"
        if seq > inbound.freed + self.window or seq < 1:
            return "beyond_window"
        if seq <= inbound.received or seq in inbound.ahead:
            return "duplicate"
        return ACCEPT

    def freed(self, sender: str, epoch: int) -> bool:
        """A message of this lane left the window: its consumer took it, or it was refused. Whether credit is due."""
        inbound = self.senders.get(sender)
        if inbound is None or inbound.epoch != epoch:
            return False
        inbound.freed += 1
        # Each credit costs both sides a wake-up: while one half of a window is given back, the other is under way.
        due = inbound.freed - inbound.told >= self._stride
        (self._due if due else self._changed)[sender] = inbound
        return due

    def probed(self, sender: str, epoch: int, sent: int, lane: int, now: float) -> None:
        """The sender says that numbers up to `sent` are out."""
        inbound = self.senders.get(sender)
        if inbound is None or inbound.epoch != epoch or lane != self.epoch or sent > inbound.freed + self.window:
            return
        inbound.announced = max(inbound.announced, sent)
        self._due[sender] = inbound
        self._note_gap(inbound, now)

    def poll(self, now: float) -> Iterator[tuple[Inbound, int]]:
        """Gaps given up now, as (lane, how many lost); marks every credit for repetition when that is due."""
        for inbound in self.senders.values():
            self._note_gap(inbound, now)
            overdue = inbound.gap_since is not None and now - inbound.gap_since >= GRACE_S
            if overdue and self.on_loss == "count":
                yield inbound, self._give_up(inbound, now)
        if now - self._repeated >= CREDIT_EVERY_S:
            self._repeated = now
            self._due.update(self.senders)
        self._due.update(self._changed)

    @property
    def credits_due(self) -> bool:
        return bool(self._due)

    def credits(self) -> Iterator[Credit]:
        """Credits to send now: those that free a fair part of a window, and after `poll` every one that changed."""
        due, self._due = self._due, {}
        for inbound in due.values():
            self._changed.pop(inbound.sender, None)
            inbound.told = inbound.freed
            yield Credit(
                self.node,
                self.epoch,
                inbound.sender,
                inbound.epoch,
                inbound.received,
                inbound.freed,
                self.window,
            )

    def _advance(self, inbound: Inbound, now: float) -> None:
        before = inbound.received
        while inbound.received + 1 in inbound.ahead:
            inbound.received += 1
            inbound.ahead.remove(inbound.received)
        if inbound.received > before:
            inbound.gap_since = None
        self._note_gap(inbound, now)

    def _note_gap(self, inbound: Inbound, now: float) -> None:
        if not inbound.ahead and inbound.announced <= inbound.received:
            inbound.gap_since = None
        elif inbound.gap_since is None:
            inbound.gap_since = now

    def _give_up(self, inbound: Inbound, now: float) -> int:
        """Settle the numbers before the next one that did arrive, or up to the announced one, as lost."""
        until = min(inbound.ahead) - 1 if inbound.ahead else inbound.announced
        missing = until - inbound.received
        inbound.lost += missing
        inbound.freed += missing
        inbound.received = until
        inbound.gap_since = None
        self._changed[inbound.sender] = inbound
        self._advance(inbound, now)
        return missing
