"""The `latest` link: the newest value wins, never goes back, is never torn; late joiners are served at once.

A value is a whole wire frame under a version `(epoch, number)`. To subscribers of its host a publisher announces each
value as it comes, in one message. Others *fetch*: they ask, and the answer is a window of chunks of the newest value,
as soon as there is one that they do not hold; a question says how much has come, and the next chunks follow. So no more
than a window is ever on its way to one subscriber, however slow the link; it grows to what the link delivers in
`WITHIN_S`. A newer value takes the place of one that is half sent, but once only until one is whole: else who is slower
than the publisher would never get any.

A value may travel as what it differs in from the one that the subscriber holds; `delta.py` says how.

A beacon repeats the current version now and then. To one who fetches it is an empty chunk, from where the publisher has
got to: who has less than that has lost something, and asks for it anew.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import xxhash

from ddrl_bus.errors import WireError
from ddrl_bus.transport import delta, wire
from ddrl_bus.transport.sessions.rate import TokenBucket

Version = tuple[int, int]
"""(epoch of the publisher's life, number): compared in this order."""
Life = tuple[str, int]
"""Name and epoch of a subscriber."""

NOTHING: Final[Version] = (0, 0)
CHUNK: Final = 256 << 10
"""Bytes: a frame that takes longer than the heartbeat timeout to arrive is never delivered, so large values are cut."""
WINDOW: Final = 1 << 20
"""Bytes on their way to one subscriber: at first, and over a slow link."""
MAX_WINDOW: Final = 8 << 20
"""Over a fast one. Chunks grow with their window, for each costs as much as copying some 200 KB."""
WITHIN_S: Final = 0.05
"""A window grows to what comes in this time: no longer does a newer value wait for what is on its way."""
BEACON_EVERY_S: Final = 1.0
ASK_AFTER_S: Final = 0.5
"""How long a subscriber may know of a newer version, and get none of it, before it asks again."""
SILENT_S: Final = 3.0
"""How long it may hear nothing at all, likewise."""
MAX_VALUE: Final = 256 << 20
"""Bytes: what a wire frame may hold."""
KEPT: Final = 4
"""Values, of those that subscribers have got, to which differences are made."""
SAME: Final = 64
"""Versions with the same arrays that are remembered."""
MAX_FETCHING: Final = 4096
"""Subscribers; more are not served."""


class Ask(NamedTuple):
    """A subscriber's question, as it stands in a topic: `<number>.<since>.<received>.…`."""

    number: int
    """Of the questions of its life. One that is heard twice came by a new connection: the old one took what was on its
    way with it."""
    since: int
    """The question with which it had the publisher begin anew, for something was lost."""
    received: int
    """Bytes of chunks, in its life."""
    held: Version
    partial: Version
    """What it has the first `offset` bytes of."""
    offset: int

    def text(self) -> bytes:
        return b"%d.%d.%d.%d.%d.%d.%d.%d" % (*self[:3], *self.held, *self.partial, self.offset)

    @classmethod
    def parsed(cls, text: bytes) -> Ask | None:
        if not _ASK.fullmatch(text):
            return None
        number, since, received, *versions, offset = (int(n) for n in text.split(b"."))
        return cls(number, since, received, (versions[0], versions[1]), (versions[2], versions[3]), offset)


_ASK: Final = re.compile(rb"\d{1,20}(\.\d{1,20}){7}")


@dataclass(frozen=True, slots=True)
class Payload:
    """How a value travels to whoever holds `base`."""

    version: Version
    base: Version
    digest: int
    """Of the value."""
    data: memoryview
    value: int
    """Bytes of the value."""


@dataclass(frozen=True, slots=True)
class Chunk:
    payload: Payload
    offset: int
    body: memoryview

    @property
    def head(self) -> list[int]:
        """What travels in front of the body."""
        payload = self.payload
        return [*payload.version, len(payload.data), self.offset, payload.digest, *payload.base]

    @property
    def last(self) -> bool:
        return self.offset + len(self.body) == len(self.payload.data)


def digest(value: memoryview | bytearray | bytes) -> int:
    """xxHash, XXH3 of 64 bits: it guards against torn and mixed values, not against an enemy."""
    return xxhash.xxh3_64_intdigest(value)


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Fetching:
    """One who fetches, as its publisher knows it."""

    ask: Ask
    payload: Payload | None = None
    at: int = 0
    """Bytes of `payload` that are sent."""
    sent: int = 0
    """Bytes, plus what it had received before: less what it has received since, they are on their way."""
    replaced: bool = False
    """Whether `payload` took the place of one that was half sent."""
    window: int = 0
    timed: tuple[int, int, float] | None = None
    """`sent` at one moment, what of it had been received, and when that was."""

    def begin(self, ask: Ask) -> None:
        """Nothing is on its way."""
        self.ask, self.sent, self.window, self.timed = ask, ask.received, WINDOW, None

    def go_on(self, ask: Ask, now: float, most: int) -> None:
        """More has been received: the window is what comes in `WITHIN_S`, but at most twice what it was, or `most`."""
        self.ask = ask
        if self._has_all():
            self.sent = ask.received  # what has not come by now is lost, and must not fill the window for ever
        if self.timed is None:
            return
        sent, received, since = self.timed
        took = max(now - since, 1e-3)
        if ask.received < sent and took < WITHIN_S:
            return
        comes = int((ask.received - received) * WITHIN_S / took)
        least = self.window if took < WITHIN_S else WINDOW  # it came sooner, and no more was sent
        self.window, self.timed = max(least, min(comes, 2 * self.window, most)), None

    def _has_all(self) -> bool:
        """Whether it said so of what it was sent of `payload`."""
        if self.payload is None:
            return False
        whole = self.ask.held == self.payload.version and self.at == len(self.payload.data)
        return whole or (self.ask.partial, self.ask.offset) == (self.payload.version, self.at)


class LatestPublisher:
    """
    Args:
        differences: whether values travel as differences to others, where that makes them smaller.
        rate: bytes a second of chunks, to all together; None is no limit.
        now: seconds, of any clock that never goes back.
    """

    def __init__(self, differences: bool = False, rate: float | None = None, now: float = 0.0) -> None:
        self.version: Version | None = None
        self.value = memoryview(b"")
        self._differences = differences
        self._digest: int | None = None
        self._same: deque[Version] = deque(maxlen=SAME)
        """Earlier versions with the arrays of this one."""
        self._kept: dict[Version, memoryview] = {}
        self._payloads: dict[Version, Payload] = {}
        """Of the current value, by their base."""
        self._fetching: dict[Life, _Fetching] = {}
        self._bucket = TokenBucket(rate, now)
        self._most = MAX_WINDOW if rate is None else min(max(int(rate * WITHIN_S), WINDOW), MAX_WINDOW)
        self._waiting: dict[Life, None] = {}
        """For whom there is more than the rate allows, in the order of their turns."""

    @property
    def fetching(self) -> Iterable[Life]:
        return tuple(self._fetching)

    def publish(self, version: Version, value: memoryview) -> None:
        """Replace the value; `more` says what that brings whom. The caller must not write to `value` any more.

        Raises:
            ValueError: `version` is not newer than the last one.
        """
        if self.version is not None:
            if version <= self.version:
                raise ValueError(f"latest: version {version} is not newer than {self.version}")
            if not delta.same_arena(self.value, value):
                self._same.clear()
            else:
                self._same.append(self.version)
        self.version, self.value, self._digest = version, value, None
        self._payloads.clear()

    def asked(self, life: Life, ask: Ask, now: float) -> bool:
        """Take a question in; `more` answers it. False: there are too many who ask."""
        who = self._fetching.get(life)
        if who is None:
            if len(self._fetching) >= MAX_FETCHING:
                return False
            who = self._fetching[life] = _Fetching(ask)
        elif ask.number < who.ask.number:  # it was overtaken
            return True
        elif ask.number > who.ask.number and ask.since == who.ask.since:
            who.go_on(ask, now, self._most)
            return True
        who.begin(ask)
        if who.payload is None and ask.partial == self.version:
            who.payload = self._payload(ask.held)
        if who.payload is not None and who.payload.version != ask.partial:
            who.payload = None
        who.at = ask.offset
        return True

    def gone(self, life: Life, ask: Ask) -> None:
        """A question was taken back: if it was the last one of this life, nobody waits for an answer any more."""
        if (who := self._fetching.get(life)) is not None and who.ask.number == ask.number:
            del self._fetching[life]
            self._waiting.pop(life, None)

    def more(self, life: Life, now: float) -> list[Chunk]:
        """The next chunks for one who fetches, as many as there is room for on the way and the rate allows."""
        who, chunks = self._fetching[life], list[Chunk]()
        received = min(who.ask.received, who.sent)
        while who.sent - received < who.window and (payload := self._under_way(who)) is not None:
            if self._bucket.wait_s(now) > 0:
                self._waiting[life] = None
                break
            chunks.append(Chunk(payload, who.at, payload.data[who.at : who.at + who.window * CHUNK // WINDOW]))
            who.at += len(chunks[-1].body)
            who.sent += len(chunks[-1].body)
            self._bucket.spend(len(chunks[-1].body), now)
            if chunks[-1].last:
                who.replaced = False
        if who.timed is None and who.sent > received:
            who.timed = who.sent, received, now
        return chunks

    def throttled_s(self, now: float) -> float | None:
        """Seconds until the rate allows more to someone who waits for that; None: nobody does."""
        return self._bucket.wait_s(now) if self._waiting else None

    def turn(self) -> Life:
        """Who of those is next; `more` puts it behind the others if it has to wait again."""
        life = next(iter(self._waiting))
        del self._waiting[life]
        return life

    def beacon(self, life: Life) -> list[Chunk]:
        """What tells one who fetches how much it was sent, and which version is the newest."""
        who, found = self._fetching[life], []
        if who.payload is not None:
            found.append(Chunk(who.payload, who.at, who.payload.data[:0]))
        if self.version is not None and (who.payload is None or who.payload.version != self.version):
            found.append(Chunk(self._payload(NOTHING), 0, self.value[:0]))
        return found

    def _under_way(self, who: _Fetching) -> Payload | None:
        """What it gets the next chunk of; None if it has been sent the newest value."""
        before, held = who.payload, who.ask.held
        if before is not None:
            begun, whole = who.at > 0, who.at == len(before.data)
            if not whole and (before.version == self.version or (begun and who.replaced)):
                return before
            if whole:  # it will hold that when it gets the next
                held = max(held, before.version)
            who.replaced = begun and not whole
        if self.version is None or held >= self.version:
            return None
        who.payload, who.at = self._payload(held), 0
        if self._differences:
            self._keep(self.version, self.value)
        return who.payload

    def _keep(self, version: Version, value: memoryview) -> None:
        self._kept.pop(version, None)
        self._kept[version] = value
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]

    def _payload(self, held: Version) -> Payload:
        if (payload := self._payloads.get(held)) is None:
            payload = self._payloads[held] = self._made(held)
        return payload

    def _made(self, held: Version) -> Payload:
        assert self.version is not None
        data: memoryview | None = None
        if held in self._same:
            data = delta.head(self.value)
        elif (base := self._kept.get(held)) is not None:
            data = delta.encode(base, self.value)
        if data is None:
            held, data = NOTHING, self.value
        if self._digest is None:
            self._digest = digest(self.value)
        return Payload(self.version, held, self._digest, data, len(self.value))


# ── subscribing ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Partial:
    version: Version
    base: Version
    total: int
    digest: int
    data: memoryview
    """Room for all of it; the kernel gives no memory to what is not written."""
    size: int = 0
    """Bytes that have come."""


class LatestSubscriber:
    """Args: fetches: whether values come when they are asked for; else they are announced."""

    def __init__(self, now: float, fetches: bool = True) -> None:
        self.held: Version = NOTHING
        self._value: memoryview | None = None
        self._known: Version = NOTHING
        self._partial: _Partial | None = None
        self._number, self._since = 0, 1
        self._received = self._told = 0
        self._lost = False
        """Whether a chunk came that does not go on from what there is."""
        self._distrusts = False
        """Whether what is held does not do as a base."""
        self._ask_at = now
        self.fetches = fetches

    def wants(self, version: Version, now: float) -> bool:
        """Whether an announced value is newer than what is held."""
        self._note(version, now)
        return version > self.held

    def took(self, version: Version, value: memoryview | None, now: float) -> None:
        """It holds an announced value; None: where it may be overwritten."""
        if self._partial is not None and self._partial.base != NOTHING:
            self._partial, self._lost = None, True  # it built on what was held
        self._hold(version, value, now)

    def fetch(self, fetches: bool, now: float) -> None:
        """From now on ask for values, or have them announced."""
        if fetches is not self.fetches:
            self.fetches = fetches
            self._anew(now)

    def chunk(self, head: object, body: memoryview, now: float) -> tuple[Version, memoryview] | None:
        """Take a chunk in; returns the value that it completes, if it does.

        Raises:
            WireError: `chunk` or `codec` for a malformed one, `torn` for a whole that does not match its digest.
        """
        new, offset = _parsed(head, len(body))
        self._received += len(body)
        self._note(new.version, now)
        partial = self._partial
        if new.version <= self.held or (partial is not None and new.version < partial.version):
            return None
        if partial is None or new.version > partial.version:
            partial = new
        if offset > partial.size:
            self._lost = True
        if offset != partial.size or not body:
            return None
        if partial is new and not self._fits(new.base):
            self._lost = True
            return None
        if new.base != partial.base:  # it travels in another way now
            self._partial, self._lost = None, True
            return None
        if (new.total, new.digest) != (partial.total, partial.digest):  # either may be the damaged one
            self._spoilt(now)
            raise WireError("chunk", f"version {new.version}: chunks disagree on the whole")
        self._partial, self._lost, self._ask_at = partial, False, now + ASK_AFTER_S
        if len(body) == partial.total:  # all in one: no need to copy it
            return self._complete(partial, body, now)
        if partial is new:
            partial.data = wire.aligned(partial.total)
        partial.data[offset : offset + len(body)] = body
        partial.size += len(body)
        return self._complete(partial, partial.data, now) if partial.size == partial.total else None

    def _complete(self, partial: _Partial, data: memoryview, now: float) -> tuple[Version, memoryview]:
        try:
            value = self._decoded(partial, data)
            if digest(value) != partial.digest:
                raise WireError("torn", f"version {partial.version} does not match its digest")
        except WireError:
            self._spoilt(now)
            raise
        self._hold(partial.version, value.toreadonly(), now)
        return partial.version, value.toreadonly()

    def _decoded(self, partial: _Partial, data: memoryview) -> memoryview:
        return data if self._value is None or partial.base == NOTHING else delta.decode(self._value, data)

    def _fits(self, base: Version) -> bool:
        """Whether what builds on `base` can be put together here."""
        if base != NOTHING and self._value is None:
            self._distrusts = True
        return base == NOTHING or (base == self.held and not self._distrusts)

    def _hold(self, version: Version, value: memoryview | None, now: float) -> None:
        self.held, self._value, self._distrusts = version, value, False
        if self._partial is not None and self._partial.version <= version:
            self._partial = None
        self._ask_at = now + (ASK_AFTER_S if self._known > version else SILENT_S)

    def _note(self, version: Version, now: float) -> None:
        if version <= self.held:
            if self._known <= self.held:
                self._ask_at = now + SILENT_S  # all is well
        elif version > self._known:
            if self._known <= self.held:
                self._ask_at = min(self._ask_at, now + ASK_AFTER_S)
            self._known = version

    def _spoilt(self, now: float) -> None:
        self._partial, self._distrusts = None, True
        self._anew(now)

    def _anew(self, now: float) -> None:
        """Have the publisher go on from where the next question says."""
        self._since, self._lost, self._ask_at = self._number + 1, False, now

    def question(self, now: float) -> Ask | None:
        """What to ask now, if anything: in place of the last question."""
        untold = self._received - self._told
        if now < self._ask_at and not untold >= (WINDOW // 2 if self._partial else 1):
            return None
        if self._lost and now >= self._ask_at:
            self._anew(now)
        self._number += 1
        self._told, self._ask_at = self._received, max(self._ask_at, now + ASK_AFTER_S)
        partial = self._partial
        under_way = (partial.version, partial.size) if partial else (NOTHING, 0)
        held = NOTHING if self._distrusts else self.held
        return Ask(self._number, self._since, self._received, held, *under_way)


def _parsed(head: object, size: int) -> tuple[_Partial, int]:
    if not isinstance(head, list) or len(head) != 7 or any(type(n) is not int or n < 0 for n in head):
        raise WireError("chunk", "a chunk starts with seven unsigned integers")
    epoch, number, total, offset, whole, *base = head
    if not 0 < total <= MAX_VALUE or offset + size > total or size > MAX_WINDOW * CHUNK // WINDOW:
        raise WireError("chunk", f"bytes {offset} to {offset + size} of {total} is no chunk of a value")
    return _Partial((epoch, number), (base[0], base[1]), total, whole, memoryview(b"")), offset
