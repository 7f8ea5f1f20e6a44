"""Values in memory that all processes of a host read: where they lie, who may, and that none is ever mixed."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.transport import shared, wire
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.shared import MEMORY, SharedSlots, SlotWriter, kept, read
from ddrl_bus.transport.wire import Arena, Array, Message

pytestmark = pytest.mark.skipif(not shared.SHARES or not MEMORY.exists(), reason="nothing is shared here")
SIZE = 250_000


def value(number: int, size: int = SIZE) -> memoryview:
    """A frame that `number` fills, of 8 bytes `size` times."""
    return wire.encode("weights", "learner-0", 1, number, {"i": number}, {"v": np.full(size, number)})


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    yield f"ipc://{tmp_path}/learner-0.weights"
    shared.remove(tmp_path, ["learner-0"])


@pytest.fixture
def writer(address: str) -> Iterator[SlotWriter]:
    writer = SlotWriter(address, epoch=1)
    yield writer
    writer.close()


def write(writer: SlotWriter, number: int, size: int = SIZE) -> str:
    name = writer.write(value(number, size))
    assert name is not None
    return name


def where(name: str, address: str) -> Path:
    near = Path(address.removeprefix("ipc://")).parent / name
    return near if near.exists() else MEMORY / name


def test_a_value_is_read_in_place_and_only_read(writer: SlotWriter, address: str) -> None:
    slots = SharedSlots(address, write(writer, 1))
    message, _ = slots.newest()
    assert (message.seq, message.fields, message.slots) == (1, {"i": 1}, slots)
    array = message.arrays["v"]
    assert np.all(array == 1)
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True
    write(writer, 2)
    assert np.all(array == 1)  # the other slot
    write(writer, 3)
    assert np.all(array == 3)  # no copy: the very bytes were overwritten
    assert slots.newest()[0].seq == 3


def test_the_newest_is_loaded_though_a_message_is_older(writer: SlotWriter, address: str) -> None:
    message, _ = SharedSlots(address, write(writer, 1)).newest()
    for number in range(2, 9):
        write(writer, number)
    loaded: list[int] = []
    assert read(message, lambda m: loaded.append(m.seq)).seq == 8
    assert loaded == [8]
    own = kept(message)
    assert (own.seq, own.slots) == (8, None)
    write(writer, 9)
    write(writer, 10)
    assert np.all(own.arrays["v"] == 8)


def test_what_is_overwritten_while_it_is_loaded_is_loaded_again(writer: SlotWriter, address: str) -> None:
    message, _ = SharedSlots(address, write(writer, 1)).newest()
    seen: list[tuple[int, int]] = []

    def load(message: Message) -> None:
        first = int(message.arrays["v"][0])
        if not seen:
            write(writer, 2)
            write(writer, 3)
        seen.append((first, int(message.arrays["v"][-1])))

    assert read(message, load).seq == 3
    assert seen == [(1, 3), (3, 3)]


def test_a_private_value_is_loaded_once() -> None:
    message, loaded = wire.decode(value(7)), list[Message]()
    assert read(message, loaded.append) is message
    assert loaded == [message]
    assert kept(message) is message


def test_a_larger_value_gets_a_new_file(writer: SlotWriter, address: str) -> None:
    first = write(writer, 1)
    old = SharedSlots(address, first)
    second = write(writer, 2, 2 * SIZE)
    assert first != second
    assert not where(first, address).exists()
    assert SharedSlots(address, second).newest()[0].seq == 2
    assert old.newest()[0].seq == 1  # who has it open goes on
    assert write(writer, 3, SIZE) == second


def test_files_are_ours_alone_and_go(writer: SlotWriter, address: str) -> None:
    name = write(writer, 1)
    assert where(name, address).stat().st_mode & 0o777 == 0o600
    left = SlotWriter(address, epoch=2)  # a next life: the first one was killed
    assert not where(name, address).exists()
    name = write(left, 1)
    left.close()
    assert not where(name, address).exists()


def test_a_memory_that_is_too_small_shares_nothing(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """As in a container: the room is asked for before anything is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = SlotWriter(address, epoch=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert writer.write(value(1)) is None
        assert writer.write(value(2)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert "sent instead of shared" in caplog.text
    assert not list(MEMORY.glob(f"{shared._stem(address)}*"))


@pytest.mark.parametrize("name", ["", "../x", "ddrl-/../../etc/passwd", "ddrl-", "passwd", "ddrl-" + "x" * 300])
def test_another_name_is_refused(address: str, name: str) -> None:
    with pytest.raises(WireError, match="no name"):
        SharedSlots(address, name)


def test_another_file_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SharedSlots(address, "ddrl-1")
    (tmp_path / "ddrl-1").write_bytes(b"x")
    with pytest.raises(WireError, match="1 bytes"):
        SharedSlots(address, "ddrl-1")
    (tmp_path / "ddrl-2").symlink_to(tmp_path / "ddrl-1")
    with pytest.raises(OSError, match="symbolic"):
        SharedSlots(address, "ddrl-2")
    for content in (bytes(8 << 12), b"\x01" * (8 << 12), b"\x02" * (8 << 12)):
        (tmp_path / "ddrl-3").write_bytes(content)
        with pytest.raises(WireError):
            SharedSlots(address, "ddrl-3").newest()


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def _write_on(address: str, ready: Event, done: Event) -> None:
    writer, number = SlotWriter(address, epoch=2), 0
    while not done.is_set():
        number += 1
        write(writer, number)
        ready.set()


def _read_on(address: str, result: multiprocessing.SimpleQueue[tuple[int, int]]) -> None:
    slots = SharedSlots(address, _found(address))
    newest, again = 0, 0
    for n in range(30):
        message, _ = slots.newest()
        parts: list[Array] = []

        def load(message: Message, parts: list[Array] = parts) -> None:
            parts[:] = [*parts, np.array(message.arrays["v"])]
            if len(parts) == 1:
                time.sleep(0.01)  # as if there were much to load: it is overwritten meanwhile
                parts[0][SIZE // 2 :] = message.arrays["v"][SIZE // 2 :]

        loaded = read(message, load) if n % 2 else kept(message)
        array = parts[-1] if n % 2 else loaded.arrays["v"]
        assert np.all(array == loaded.seq)
        assert loaded.seq >= newest
        newest, again = loaded.seq, again + (len(parts) > 1)
    result.put((newest, again))


def _found(address: str) -> str:
    names = [path.name for folder in shared._folders(address) for path in folder.glob(f"{shared._stem(address)}*")]
    return names[0]


def test_nothing_is_ever_torn_while_a_writer_overwrites_all_the_time(address: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, done, results = spawn.Event(), spawn.Event(), spawn.SimpleQueue()
    writing = spawn.Process(target=_write_on, args=(address, ready, done))
    reading = [spawn.Process(target=_read_on, args=(address, results)) for _ in range(2)]
    writing.start()
    try:
        assert ready.wait(30)
        for process in reading:
            process.start()
        for process in reading:
            process.join(60)
            assert process.exitcode == 0
    finally:
        done.set()
        writing.join(30)
    for _ in reading:
        newest, again = results.get()
        assert newest > 0
        assert again > 0, "nothing was overwritten while it was read: this test shows nothing"


@pytest.mark.parametrize(("share_from", "is_shared"), [(SIZE, True), (8 * SIZE + 4096, False)])
async def test_what_is_smaller_is_sent(address: str, share_from: int, is_shared: bool) -> None:
    learner, actor = Bus("learner-0", 1, Ledger()), Bus("actor-0", 1, Ledger())
    publisher = learner.publisher("weights", [address], share_from=share_from)
    subscriber = actor.subscriber("weights", address)
    publisher.publish(1, Arena.of("weights", {"v": np.arange(SIZE)}), {})
    message = await asyncio.wait_for(subscriber.next(), 10)
    assert (message.slots is not None) == is_shared
    read(message, lambda value: np.testing.assert_array_equal(value.arrays["v"], np.arange(SIZE)))
    for bus in (actor, learner):
        bus.close()
