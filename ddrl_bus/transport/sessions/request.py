"""The `request` link: an answer, an error or a timeout; never a hang.

A client numbers its requests within its life. It repeats one that stays unanswered, for the connection may have broken
under it; the server runs each number once and answers repetitions from a cache. With each request the client names the
oldest one it still waits for, and the server forgets the answers before it. An answer after the deadline, or a second
one, is counted and dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

F = TypeVar("F")

REPEAT_S: Final = 1.0
"""A request unanswered for this long is sent again, and each time that it has taken twice as long; while later ones are
answered, each time that this has passed. Where answers take long the first repetition waits for twice as long as the
last one took: each makes the server answer anew, and on a narrow line the next one would wait behind all of those."""
MAX_REPEAT_S: Final = 10.0
"""Between two repetitions at most."""
CACHE: Final = 64
"""Answers kept per client for repetitions, however many it still waits for."""
MAX_CLIENTS: Final = 4096
"""Clients that a server keeps books of: who has been silent for longest is forgotten."""


@dataclass(slots=True)
class Pending(Generic[F]):
    frame: F
    deadline: float
    opened: float
    repeat_at: float
    wait_s: float
    """Between the next two repetitions."""


@dataclass(frozen=True, slots=True)
class Due(Generic[F]):
    """What `poll` found: requests to send again and requests that timed out."""

    again: tuple[F, ...]
    expired: tuple[int, ...]


class RequestClient(Generic[F]):
    def __init__(self) -> None:
        self.late = 0
        self._patience = 0.0
        self._pending: dict[int, Pending[F]] = {}
        self._last = 0

    def next_id(self) -> int:
        self._last += 1
        return self._last

    @property
    def oldest(self) -> int:
        """The first request that is still waited for; the newest if none is."""
        return next(iter(self._pending), self._last)

    def open(self, request: int, frame: F, now: float, timeout_s: float) -> None:
        wait_s = max(REPEAT_S, min(self._patience, timeout_s / 4))
        self._pending[request] = Pending(frame, now + timeout_s, now, now + wait_s, wait_s)

    def answered(self, request: int, now: float) -> bool:
        """Whether this answer is awaited; late, duplicate and unsolicited ones are counted and are not."""
        pending = self._pending.pop(request, None)
        if pending is None:
            self.late += 1
            return False
        self._patience = min(2 * (now - pending.opened), MAX_REPEAT_S)
        for earlier, overtaken in self._pending.items():
            if earlier > request:
                break
            overtaken.wait_s = REPEAT_S
            overtaken.repeat_at = min(overtaken.repeat_at, now + REPEAT_S)
        return True

    def abandon(self, request: int) -> None:
        """Nobody waits any more."""
        self._pending.pop(request, None)

    def poll(self, now: float) -> Due[F]:
        expired = tuple(request for request, pending in self._pending.items() if now >= pending.deadline)
        for request in expired:
            del self._pending[request]
        again = []
        for pending in self._pending.values():
            if now >= pending.repeat_at:
                pending.repeat_at = now + pending.wait_s
                pending.wait_s = min(2 * pending.wait_s, MAX_REPEAT_S)
                again.append(pending.frame)
        return Due(tuple(again), expired)

    @property
    def open_requests(self) -> tuple[int, ...]:
        return tuple(self._pending)


@dataclass(slots=True)
class _Peer(Generic[F]):
    epoch: int
    running: set[int] = field(default_factory=set)
    answers: OrderedDict[int, F] = field(default_factory=OrderedDict)
    forgotten: int = 0
    """Requests up to this number are over, or have left the cache."""

    def forget(self, request: int) -> None:
        """Forget it and what is older."""
        self.forgotten = request
        for number in [n for n in self.answers if n <= request]:
            del self.answers[number]
        if self.running:
            self.running = {n for n in self.running if n > request}


Standing = Literal["new", "running", "old", "fenced"]


class RequestServer(Generic[F]):
    """Runs each (client, life, request) once."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer[F]] = OrderedDict()

    def arrived(self, client: str, epoch: int, request: int, oldest: int = 0) -> Standing | tuple[F]:
        """`new`: run it. `running`: it is. `old`: forgotten. `fenced`: of an earlier life. Else the answer again."""
        peer = self._peers.get(client)
        if peer is None or epoch > peer.epoch:
            peer = self._peers[client] = _Peer(epoch)
            if len(self._peers) > MAX_CLIENTS:
                self._peers.popitem(last=False)
        self._peers.move_to_end(client)
        if epoch < peer.epoch:
            return "fenced"
        if (over := min(oldest, request) - 1) > peer.forgotten:
            peer.forget(over)
        if request in peer.running:
            return "running"
        if request in peer.answers:
            peer.answers.move_to_end(request)  # it is still wanted
            return (peer.answers[request],)
        if request <= peer.forgotten:
            return "old"
        peer.running.add(request)
        return "new"

    def answer(self, client: str, epoch: int, request: int, frame: F) -> None:
        """Keep the answer for repetitions."""
        peer = self._peers.get(client)
        if peer is None or peer.epoch != epoch or request not in peer.running:
            return
        peer.running.discard(request)
        peer.answers[request] = frame
        if len(peer.answers) > CACHE:
            oldest, _ = peer.answers.popitem(last=False)
            peer.forgotten = max(peer.forgotten, oldest)
