"""Who may come over a network, and as whom: CURVE with an allow-list, which each handshake (ZAP) and each message asks.

    handshake     the client's key → host → is any of its nodes at the other end of this link? Else it is not let in.
    message       User-Id, the key of the connection that it came by → the nodes that it may speak for

What a header or a routing id says of its sender is never believed. The `Guard` decides without I/O, so there is nothing
to wait for; sockets and timers are the backend's. Where it does not answer, libzmq lets nobody in (ZAP_ENFORCE_DOMAIN).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from zmq.utils import z85

from ddrl_bus.errors import SecurityError
from ddrl_bus.keys import AllowList, Entry, KeyPair, may
from ddrl_bus.transport.base import PEOPLE, scheme
from ddrl_bus.transport.ledger import Ledger

ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
RELOAD_S: Final = 0.5
"""How often the allow-list is looked at."""
REFUSALS: Final = 32
WITHIN_S: Final = 10.0
QUARANTINE_S: Final = 300.0
"""A key with more refused messages than the first within the second is shut out for the third."""
SUBSCRIPTIONS: Final = 256
"""The same for topics that stay, for each node that the key speaks for: a few per connection."""
ADDED: Final = 64
"""Nodes of a group that one host adds to a run, for this purpose."""
MAX_TOLD: Final = 64
"""Strangers that the log tells of."""

NOBODY: Final[frozenset[str]] = frozenset()


class Peer(NamedTuple):
    """Where a node is to be, and of what kind."""

    host: str
    kind: str


@dataclass(frozen=True, slots=True)
class Access:
    """The tcp addresses of one node, and who stands at the other ends.

    Args:
        plain: addresses without protection: of this machine, or because the user said so.
        binds: addresses that it binds and guards.
        servers: address that it dials → whose key must answer.
        guests: link → node → where that node, which may come over the link, is to be.
        people: link → hosts whose people may ask over it, in no node's name.
        hosts: whose holders of keys may add nodes to the run, named `GROUP-NUMBER.HOST`.
        added: link → group → kind of those that may come over the link.
    """

    plain: frozenset[str] = NOBODY
    binds: frozenset[str] = NOBODY
    servers: Mapping[str, Peer] = field(default_factory=dict)
    guests: Mapping[str, Mapping[str, Peer]] = field(default_factory=dict)
    people: Mapping[str, frozenset[str]] = field(default_factory=dict)
    hosts: frozenset[str] = NOBODY
    added: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Speakers(frozenset[str]):
    """Nodes that somebody may speak for: these of the plan, and what is added to (group, host)."""

    __slots__ = ("added",)
    added: frozenset[tuple[str, str]]

    def __new__(cls, names: Iterable[str] = (), added: Iterable[tuple[str, str]] = ()) -> Speakers:
        self = super().__new__(cls, names)
        self.added = frozenset(added)
        return self

    def __contains__(self, node: object) -> bool:
        name, _, host = str(node).partition(".")
        return super().__contains__(node) or (name.rpartition("-")[0], host) in self.added

    def __bool__(self) -> bool:
        return bool(len(self) or self.added)


class Guard:
    """Decides for one node, by ZAP (ZeroMQ RFC 27) and by User-Id.

    Args:
        pair: the key of this machine; None for a node without guarded addresses.
    """

    def __init__(
        self,
        node: str,
        access: Access,
        pair: KeyPair | None,
        allowed: AllowList,
        ledger: Ledger,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = pair
        self._access = access
        self._allowed = allowed
        self._ledger = ledger
        self._now = now
        self._log = logging.getLogger(f"ddrl_bus.{node}")
        self._told: set[tuple[str, str]] = set()
        self._refusals: dict[str, deque[float]] = {}
        self._topics: dict[tuple[str, str], deque[float]] = {}
        self._until: dict[str, float] = {}
        self._newly_shut_out = False
        self._speakers: dict[tuple[str, str], Speakers] = {}
        self._by_key: Mapping[str, list[Entry]] = {}
        if pair is not None and allowed.refresh():
            self._take_list()

    # ---- addresses

    def guards(self, address: str) -> bool:
        """Whether CURVE is for this address.

        Raises:
            SecurityError: nobody said that it may go without, nor who is at the other end.
        """
        if scheme(address) != "tcp" or address in self._access.plain:
            return False
        if self.pair is None or (address not in self._access.binds and address not in self._access.servers):
            raise SecurityError(f"{address} would leave this machine in the open")
        return True

    def server_key(self, address: str) -> str | None:
        """The key that must answer at an address; None while none is allowed."""
        return self._allowed.key_of(*self._access.servers[address])

    # ---- keys

    def zap(self, request: Sequence[bytes]) -> list[bytes]:
        """The answer to `[version, request id, domain, address, routing id, mechanism, credential...]`.

        "300", try again: after a "400" a peer would never ask again, and its key may be allowed in a moment.
        """
        version, number, domain, address, _, mechanism, *credentials = request
        link, user = domain.decode(errors="replace"), ""
        if version == b"1.0" and mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            user = z85.encode(credentials[0]).decode()
            if self.speakers(link, user):
                return [b"1.0", number, b"200", b"OK", user.encode(), b""]
        self._ledger.counter("security", "denied").add()
        self._tell(link, user, address.decode(errors="replace"))
        return [b"1.0", number, b"300", b"not allowed", b"", b""]

    def speakers(self, link: str, user: str) -> Speakers:
        """The nodes, or PEOPLE, that the holder of a key may speak for on a link; nobody for a stranger, or one shut
        out."""
        if self._until and self._now() >= self._until.get(user, float("inf")):
            self._release(user)
        found = self._speakers.get((link, user))
        if found is None:
            entries = [] if user in self._until else self._by_key.get(user, [])
            guests = self._access.guests.get(link, {})
            named = (
                node
                for node, peer in guests.items()
                if any(entry.name == peer.host and may(entry, peer.kind) for entry in entries)
            )
            people = any(entry.name in self._access.people.get(link, NOBODY) for entry in entries)
            hosts = [entry for entry in entries if entry.name in self._access.hosts]
            groups = self._access.added.get(link, {}).items()
            added = ((group, entry.name) for group, kind in groups for entry in hosts if may(entry, kind))
            found = Speakers((*named, *([PEOPLE] if people else [])), added)
            if entries:  # strangers are without number
                self._speakers[link, user] = found
        return found

    def refused(self, user: str) -> None:
        """A message of this key was no message, or in somebody else's name."""
        self._note(user, self._refusals.setdefault(user, deque(maxlen=REFUSALS + 1)), "messages refused")

    def subscribed(self, link: str, user: str, more: bool) -> None:
        """A publisher was told of a topic more or less; libzmq keeps each for as long as its connection lasts."""
        speakers = self.speakers(link, user)
        most = SUBSCRIPTIONS * (len(speakers) + ADDED * len(speakers.added))
        times = self._topics.setdefault((link, user), deque(maxlen=most + 1))
        if more:
            self._note(user, times, "subscriptions")
        elif times:  # who fetches puts one question in the place of another, as fast as the line is
            times.pop()

    def _note(self, user: str, times: deque[float], what: str) -> None:
        """Shut a key out of which there is more within WITHIN_S than `times` has room for but one."""
        now = self._now()
        times.append(now)
        if len(times) == times.maxlen and now - times[0] <= WITHIN_S and user not in self._until:
            self._until[user] = now + QUARANTINE_S
            self._newly_shut_out = True
            self._speakers.clear()
            self._mark(user, 1)
            self._log.warning("quarantined host=%s key=%s: %d %s", self._names(user), user, len(times), what)

    def unread(self) -> None:
        """A message was dropped: whoever sent it may speak for nobody."""
        self._ledger.counter("security", "unread").add()

    def _release(self, user: str) -> None:
        del self._until[user]
        self._refusals.pop(user, None)
        self._topics = {key: times for key, times in self._topics.items() if key[1] != user}
        self._speakers.clear()
        self._mark(user, 0)

    def _mark(self, user: str, shut: int) -> None:
        for entry in self._by_key.get(user, []):
            self._ledger.counter("security", entry.name, "quarantined").set(shut)

    def _names(self, user: str) -> str:
        return ",".join(entry.name for entry in self._by_key.get(user, []))

    def _tell(self, link: str, user: str, address: str) -> None:
        who = self._names(user) or "a stranger"
        if len(self._told) < MAX_TOLD and (link, user) not in self._told:
            self._told.add((link, user))
            self._log.warning("denied link=%s address=%s key=%s: it is of %s", link, address, user or "none", who)

    # ---- the list

    def refresh(self) -> bool:
        """Look at the allow-list again; whether somebody may do less than at the last look."""
        before, fewer, self._newly_shut_out = self._by_key, self._newly_shut_out, False
        if not self._allowed.refresh():
            return fewer
        self._take_list()
        self._told.clear()
        self._log.info("allowed hosts=%s", ",".join(sorted({entry.name for entry in self._allowed.entries})))
        return fewer or any(not set(entries) <= set(self._by_key.get(key, [])) for key, entries in before.items())

    def _take_list(self) -> None:
        self._by_key = self._allowed.by_key()
        self._speakers.clear()
        if self._allowed.problem:
            self._log.error("%s: whom that concerns is not let in", self._allowed.problem)
