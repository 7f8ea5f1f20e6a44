"""The `latest` link: the newest value wins, never goes back, is never torn; late joiners are served at once.

A value is a whole wire frame under a version `(epoch, number)`. It travels as chunks, each naming the version, its
place, and the digest of the whole; a receiver that sees a chunk of a newer version drops what it had of the older one.
A beacon repeats the current version now and then: a subscriber that stays behind it asks for a snapshot.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Final

from ddrl_bus.errors import WireError

Version = tuple[int, int]
"""(epoch of the publisher's life, number): compared in this order."""

CHUNK: Final = 256 << 10
"""Bytes: a frame that takes longer than the heartbeat timeout to arrive is never delivered, so large values are cut."""
BEACON_EVERY_S: Final = 1.0
ASK_AFTER_S: Final = 0.5
"""How long a subscriber may know of a newer version without holding it before it asks for a snapshot."""
MAX_VALUE: Final = 256 << 20
"""Bytes: what a wire frame may hold."""


@dataclass(frozen=True, slots=True)
class Chunk:
    version: Version
    total: int
    offset: int
    digest: int
    body: memoryview

    @property
    def head(self) -> list[int]:
        """What travels in front of the body."""
        return [*self.version, self.total, self.offset, self.digest]


def digest(value: memoryview | bytearray | bytes) -> int:
    """CRC-32: it guards against torn and mixed values, not against an enemy."""
    return zlib.crc32(value)


class LatestPublisher:
    def __init__(self) -> None:
        self.version: Version | None = None
        self._chunks: tuple[Chunk, ...] = ()

    def publish(self, version: Version, value: memoryview) -> tuple[Chunk, ...]:
        """Chunks for every subscriber. The caller must not write to `value` any more.

        Raises:
            ValueError: `version` is not newer than the last one.
        """
        if self.version is not None and version <= self.version:
            raise ValueError(f"latest: version {version} is not newer than {self.version}")
        whole = digest(value)
        self.version = version
        self._chunks = tuple(
            Chunk(version, len(value), offset, whole, value[offset : offset + CHUNK])
            for offset in range(0, len(value), CHUNK)
        )
        return self._chunks

    def snapshot(self) -> tuple[Chunk, ...]:
        """Chunks of the current value, for one who joins; none before the first value."""
        return self._chunks


@dataclass(slots=True)
class _Partial:
    version: Version
    total: int
    digest: int
    data: bytearray
    have: set[int] = field(default_factory=set)
    missing: int = 0


class LatestSubscriber:
    def __init__(self, now: float) -> None:
        self.held: Version | None = None
        self._partial: _Partial | None = None
        self._behind_since: float | None = now  # nothing held yet: a lost first snapshot is asked for again
        self._known: Version | None = None

    def chunk(self, head: object, body: memoryview, now: float) -> tuple[Version, memoryview] | None:
        """Take a chunk in; returns the value that it completes, if it does.

        Raises:
            WireError: `chunk` for a malformed one, `torn` for a whole that does not match its digest.
        """
        version, total, offset, whole = _parsed(head, len(body))
        self._note(version, now)
        if self.held is not None and version <= self.held:
            return None
        partial = self._partial
        if partial is None or version > partial.version:
            if total == len(body):
                return self._complete(version, body, whole)
            partial = self._partial = _Partial(version, total, whole, bytearray(total), missing=total)
        elif version < partial.version:
            return None
        if (total, whole) != (partial.total, partial.digest):
            self._partial = None  # either may be the damaged one: begin anew
            raise WireError("chunk", f"version {version}: chunks disagree on the whole")
        if offset not in partial.have:
            partial.data[offset : offset + len(body)] = body
            partial.have.add(offset)
            partial.missing -= len(body)
            self._behind_since = now  # it is coming: a snapshot would only queue up behind it
        if partial.missing > 0:
            return None
        self._partial = None
        return self._complete(version, memoryview(partial.data), whole)

    def _complete(self, version: Version, value: memoryview, whole: int) -> tuple[Version, memoryview]:
        if digest(value) != whole:
            raise WireError("torn", f"version {version} does not match its digest")
        self.held = version
        self._partial = None
        if self._known is None or version >= self._known:
            self._behind_since = None
        return version, value.toreadonly()

    def beacon(self, version: Version, now: float) -> None:
        """The publisher's current version is `version`."""
        self._note(version, now)

    def _note(self, version: Version, now: float) -> None:
        if self._known is None or version > self._known:
            self._known = version
            if self._behind_since is None:
                self._behind_since = now

    def poll(self, now: float) -> bool:
        """Whether to ask for a snapshot now."""
        if self._behind_since is None or now - self._behind_since < ASK_AFTER_S:
            return False
        self._behind_since = now
        return True


def _parsed(head: object, size: int) -> tuple[Version, int, int, int]:
    if not isinstance(head, list) or len(head) != 5 or any(type(n) is not int or n < 0 for n in head):
        raise WireError("chunk", "a chunk starts with five unsigned integers")
    epoch, number, total, offset, whole = head
    last = offset + size == total
    if total > MAX_VALUE or offset + size > total or offset % CHUNK or (size != CHUNK and not last) or not size:
        raise WireError("chunk", f"bytes {offset} to {offset + size} of {total} is no chunk of a value")
    return (epoch, number), total, offset, whole
