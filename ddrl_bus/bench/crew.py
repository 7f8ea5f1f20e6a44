"""Processes that do what they are told, phase by phase: the ends of a measurement.

Each runs one *end* at a time: a function that opens its sockets, says so by `None`, and then answers orders from its
pipe, the last of which is `None` again. They stay for the next end, so that nothing measured pays for starting them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from ddrl_bus.launch.malloc import keep_freed_memory

PATIENCE_S: Final = 90.0
"""Against hangs only."""
_ALL_THREADS: Final = 2  # CPUCLOCK_SCHED: how Linux names the clock of another process, clock_getcpuclockid(3)
End = Callable[..., None]
"""Takes its pipe, then what it was started with."""


@dataclass(frozen=True, slots=True)
class _Failed:
    text: str


class Member:
    """One process of a crew, seen from outside."""

    def __init__(self, pid: int, pipe: Connection) -> None:
        self.pid, self._pipe = pid, pipe
        self._cpu_clock = ~pid << 3 | _ALL_THREADS

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all its threads so far."""
        return time.clock_gettime(self._cpu_clock)

    def start(self, end: End, *args: Any) -> None:
        """Begin to be this end. Once it is open, it answers."""
        self._pipe.send((end, args))

    def tell(self, order: Any) -> None:
        self._pipe.send(order)

    @property
    def has_answered(self) -> bool:
        """Whether `answer` need not wait."""
        return self._pipe.poll()

    def answer(self) -> Any:
        """To the first order that it has not answered.

        Raises:
            TimeoutError: none came.
            RuntimeError: it failed; carries its traceback.
        """
        if not self._pipe.poll(PATIENCE_S):
            raise TimeoutError(f"no answer within {PATIENCE_S:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process of this benchmark was killed") from None
        if isinstance(answer, _Failed):
            raise RuntimeError(answer.text)
        return answer

    def end(self) -> None:
        """It closes what it opened, and waits for the next end."""
        self.tell(None)
        self.answer()


@contextlib.contextmanager
def crew(count: int) -> Iterator[Sequence[Member]]:
    """So many processes, killed at the end."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(count)]
    processes = [spawn.Process(target=_live, args=(theirs,)) for _, theirs in pipes]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the other side of it ends with the process
        yield [Member(process.pid or 0, ours) for process, (ours, _) in zip(processes, pipes, strict=True)]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def leave_with_parent() -> None:
    """From now on this process ends when the one that started it does, however that goes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave(wait: Callable[[], None]) -> None:
        wait()
        os._exit(1)

    threading.Thread(target=leave, args=(parent.join,), daemon=True).start()


def _live(pipe: Connection) -> None:
    leave_with_parent()
    keep_freed_memory()  # as every node does; whatever it is compared with gets the same
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            end, args = pipe.recv()
            try:
                end(pipe, *args)
                pipe.send(None)
            except Exception:
                pipe.send(_Failed(traceback.format_exc()))
