"""Values that every process of a host reads where they lie: a file in memory, with two slots that take turns.

    | slot 0: generation, size, 0… to 64 bytes | capacity bytes | slot 1: the same |

One process writes. A slot's generation is odd while it is being written, and grows with every value, so that a reader
who finds it as it was knows that nothing was overwritten meanwhile; the other slot is whole all that time. The file is
long-lived and its pages are there from the start, for faulting them in costs more than copying. A value that does not
fit gets a new file.

A reader may see what was stored before a generation only where processors keep stores, and loads, in order: `SHARES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import ALIGN, Message

SHARES: Final = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "posix_fallocate")
MEMORY: Final = Path("/dev/shm")
SLOTS: Final = 2
_SPARE: Final = 64 << 10
"""Bytes that a value may grow by before it needs a new file."""
_NAME: Final = re.compile(r"ddrl-[A-Za-z0-9_.-]{1,240}")


def read(message: Message, load: Callable[[Message], object]) -> Message:
    """Have `load` copy what it needs out of a value, which never is mixed with another one; for any thread.

    Where the value may be overwritten, `load` gets the newest that lies there, and should that be overwritten before it
    has done, it is called again with a private copy.

    Returns:
        The value that `load` got last.
    """
    slots = message.slots
    if slots is None:
        load(message)
        return message
    newest, generation = slots.newest()
    load(newest)
    if slots.has(generation):
        return newest
    own = wire.decode(slots.copied())
    load(own)
    return own


def kept(message: Message) -> Message:
    """The value, or the newest where it lies, to keep for as long as one likes."""
    return message if message.slots is None else wire.decode(message.slots.copied())


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class SlotWriter:
    """Writes values of one life of a publisher that binds `address`; what earlier lives left is removed."""

    def __init__(self, address: str, epoch: int) -> None:
        self._stem = f"{_stem(address)}{epoch:016x}"
        self._folder = next(_folders(address), None) if SHARES else None
        self._path: Path | None = None
        self._capacity = 0
        for folder in _folders(address):
            _remove(folder, _stem(address))

    def write(self, value: memoryview) -> str | None:
        """The name of the file that the value lies in; None if it cannot be shared: there is no room in memory."""
        if self._folder is None:
            return None
        if len(value) > self._capacity and not self._grow(len(value)):
            return None
        assert self._path is not None
        self._generation += 2
        slot = self._slots[self._generation // 2 % SLOTS]
        header = slot[:ALIGN].view(np.uint64)
        header[0] = self._generation - 1
        header[1] = len(value)
        np.copyto(slot[ALIGN:][: len(value)], np.frombuffer(value, np.uint8))
        header[0] = self._generation
        return self._path.name

    def _grow(self, size: int) -> bool:
        self.close()
        assert self._folder is not None
        capacity = -(-(size + _SPARE) // mmap.PAGESIZE) * mmap.PAGESIZE - ALIGN
        self._path = self._folder / f"{self._stem}.{size}"
        try:
            self._slots = _mapped(self._path, SLOTS * (capacity + ALIGN))
        except OSError as error:
            logging.getLogger(__name__).warning("%s: %s; values are sent instead of shared", self._path, error)
            self.close()
            self._folder = None
            return False
        self._capacity, self._generation = capacity, 0
        return True

    def close(self) -> None:
        """Remove the file; who has it open goes on reading."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._path, self._capacity = None, 0


def _mapped(path: Path, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A new file of `size` bytes that are really there, as its slots."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # else a write could fail later, and that kills
        page = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return np.frombuffer(page, np.uint8).reshape(SLOTS, -1)
    finally:
        os.close(fd)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class SharedSlots:
    """A reader's view of a file that the publisher at `address` named.

    Raises:
        OSError: there is no such file here; or it is another user's.
        WireError: `shared`, it has another form.
    """

    def __init__(self, address: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise WireError("shared", f"{name[:200]!r} is no name of a file")
        fd = _opened(address, name)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_size % (SLOTS * mmap.PAGESIZE) or not status.st_size:
                raise WireError("shared", f"{name}: {status.st_size} bytes of user {status.st_uid}")
            page = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        size = len(page) // SLOTS
        slots = [memoryview(page)[at : at + size] for at in range(0, len(page), size)]
        self._headers, self._values = [slot[:ALIGN].cast("Q") for slot in slots], [slot[ALIGN:] for slot in slots]
        self._decoded: tuple[Message, int] | None = None

    def newest(self) -> tuple[Message, int]:
        """The newest value, whose arrays lie in the file, and its generation.

        Raises:
            WireError: what lies there is no value.
        """
        while True:
            frame, generation = self._frame()
            if self._decoded is not None and self._decoded[1] == generation:
                return self._decoded
            try:
                message = wire.decode(frame)
            except WireError:
                if self.has(generation):
                    raise
            if self.has(generation):
                message.slots = self
                self._decoded = message, generation
                return self._decoded

    def copied(self) -> memoryview:
        """The newest value as a frame of one's own."""
        while True:
            frame, generation = self._frame()
            own = wire.aligned(len(frame))
            own[:] = frame
            if self.has(generation):
                return own.toreadonly()

    def has(self, generation: int) -> bool:
        """Whether what has this generation lies there untouched."""
        return self._headers[generation // 2 % SLOTS][0] == generation

    def _frame(self) -> tuple[memoryview, int]:
        """The newest slot that is not being written."""
        generation = max([g for header in self._headers if (g := header[0]) % 2 == 0], default=0)
        if not generation:
            raise WireError("shared", "no slot holds a value")
        slot = generation // 2 % SLOTS
        return self._values[slot][: self._headers[slot][1]], generation


# ── where ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def remove(folder: Path, nodes: Iterable[str]) -> None:
    """Remove what these nodes, none of which lives, left in memory; their sockets are in `folder`."""
    for node in nodes:
        _remove(MEMORY, f"{_owner(folder)}{node}.")


def _remove(folder: Path, stem: str) -> None:
    for path in folder.glob(f"{stem}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _socket(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def _owner(folder: Path) -> str:
    return f"ddrl-{os.getuid()}-{hashlib.sha256(bytes(folder.absolute())).hexdigest()[:16]}-"


def _stem(address: str) -> str:
    """What the names of a publisher's files begin with."""
    path = _socket(address)
    return f"{_owner(path.parent)}{path.name}-"


def _folders(address: str) -> Iterator[Path]:
    """Where its files may lie, best first: in memory, next to the socket or else where memory is."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        tmpfs = {mount[1] for mount in mounts if mount[2] == "tmpfs"}
        folder = _socket(address).parent.resolve()
        mounted = next(str(parent) for parent in (folder, *folder.parents) if parent.is_mount())
        if mounted in tmpfs:
            yield folder
        if str(MEMORY) in tmpfs and str(MEMORY) != mounted:
            yield MEMORY


def _opened(address: str, name: str) -> int:
    for folder in (_socket(address).parent, MEMORY):
        with contextlib.suppress(FileNotFoundError):
            return os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    raise FileNotFoundError(f"{name}: neither next to its socket nor in {MEMORY}")
