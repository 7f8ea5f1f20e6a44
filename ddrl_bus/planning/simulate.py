"""Discrete events: threads that share cores, wires between hosts, and the three kinds of link. Knows no topology.

    generator ─ yields a wait ─→ Simulation ─ resumes it when that is over ─→ generator

What goes on is written as generators. Whatever they yield is a function that is given what to call when the wait is
over. Events of one instant happen in the order in which they were asked for, so a simulation repeats exactly.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from ddrl_bus.transport.sessions.rate import TokenBucket

Resume = Callable[[Any], None]
Wait = Callable[[Resume], None]
"""Calls what it is given once it is over, with its result."""
Activity = Generator[Wait, Any, Any]

ROUNDING: Final = 1e-12
"""Work left, in seconds, that counts as none."""
SLICE_S: Final = 6e-3
"""Of work. A thread that others wait for gives its core away at a timer tick, of which Linux has one every 4 ms."""


class Simulation:
    """The clock, and what happens next."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self.events = 0
        """That happened so far."""
        self._heap: list[tuple[float, int, Resume, Any]] = []
        self._asked = 0

    def at(self, when: float, call: Resume, value: Any = None) -> None:
        """Call `call(value)` at that time."""
        self._asked += 1
        heapq.heappush(self._heap, (when, self._asked, call, value))

    def sleep(self, seconds: float) -> Wait:
        return lambda resume: self.at(self.now + seconds, resume)

    def start(self, activity: Activity) -> None:
        """Have it go on from wait to wait, beginning now."""

        def resume(value: Any) -> None:
            try:
                wait = activity.send(value)
            except StopIteration:
                return
            wait(resume)

        self.at(self.now, resume)

    def run(self, until: float, events: float = math.inf) -> None:
        """Go on to that time, or until so many events more have happened, or nothing is left to happen."""
        last = self.events + events
        while self._heap and self._heap[0][0] <= until and self.events < last:
            self.now, _, call, value = heapq.heappop(self._heap)
            self.events += 1
            call(value)
        if self.events < last and until < math.inf:
            self.now = max(self.now, until)


class Cpu:
    """Cores, on which threads with work take turns: whoever comes waits for a core, has it for a time slice at most,
    and waits behind all others again for what is left of its work.

    Args:
        others: threads of others, which are always busy and share the cores; a mean, so that it may be a fraction.
        taken: cores that others have in any case, of which a tenth is left; a mean, too. Both slow everybody down.
    """

    def __init__(
        self, sim: Simulation, cores: int, others: float = 0.0, taken: float = 0.0, slice_s: float = SLICE_S
    ) -> None:
        self._sim, self.cores, self._others, self._slice = sim, cores, others, slice_s
        self._left = max(cores - taken, 0.1 * cores)
        self._waiting: deque[tuple[float, Resume]] = deque()
        self._running = 0
        self.done = 0.0
        """Seconds of work so far, of turns that are over."""

    def work(self, seconds: float, resume: Resume) -> None:
        self._waiting.append((seconds, resume))
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._running < self.cores:
            threads = self._running + len(self._waiting)
            seconds, resume = self._waiting.popleft()
            self._running += 1
            share = min(1.0, self._left / (threads + self._others))
            rate = share * max(1.0, threads / self.cores)
            now = min(seconds, self._slice)
            self._sim.at(self._sim.now + now / rate, self._over, (now, seconds - now, resume))

    def _over(self, turn: tuple[float, float, Resume]) -> None:
        did, left, resume = turn
        self._running -= 1
        self.done += did
        if left > ROUNDING:
            self._waiting.append((left, resume))
        else:
            resume(None)
        self._go_on()


class Thread:
    """Does one piece of work at a time, in the order they came: a thread, or a process under one interpreter lock.

    Args:
        level: what it is given takes so many times as long.
    """

    def __init__(self, sim: Simulation, cpu: Cpu, level: float = 1.0) -> None:
        self._sim, self._cpu, self._level = sim, cpu, level
        self._waiting: deque[tuple[float, Resume]] = deque()
        self._working = False
        self._began = self._busy = 0.0
        self.done = 0.0
        """Seconds of work."""

    def work(self, seconds: float) -> Wait:
        """So many seconds of a core that nobody else uses."""

        def begin(resume: Resume) -> None:
            self._waiting.append((seconds * self._level, resume))
            if not self._working:
                self._working, self._began = True, self._sim.now
                self._next()

        return begin

    def _next(self) -> None:
        seconds, resume = self._waiting.popleft()

        def finished(_: Any) -> None:
            self.done += seconds
            if self._waiting:
                self._next()
            else:
                self._working = False
                self._busy += self._sim.now - self._began
            resume(None)

        self._cpu.work(seconds, finished)

    def stall(self, seconds: float) -> Wait:
        """Keep it from working on, for so long by the clock; it needs no core meanwhile."""

        def begin(resume: Resume) -> None:
            self._busy += seconds
            self._sim.at(self._sim.now + seconds, resume)

        return begin

    @property
    def busy(self) -> float:
        """Seconds in which it had work, done at whatever pace, or was stalled."""
        return self._busy + (self._sim.now - self._began if self._working else 0.0)


class Wire:
    """What leaves a host, message after message at `bandwidth` bytes a second, and arrives `latency` seconds later."""

    def __init__(self, sim: Simulation, latency: float = 0.0, bandwidth: float = math.inf) -> None:
        self._sim, self.latency, self.bandwidth = sim, latency, bandwidth
        self._free = self._took = 0.0

    @property
    def busy(self) -> float:
        """Seconds in which it was sending."""
        return self._took - max(0.0, self._free - self._sim.now)

    def send(self, size: float, arrived: Resume, value: Any = None) -> None:
        took = size / self.bandwidth
        self._took += took
        self._free = max(self._free, self._sim.now) + took
        self._sim.at(self._free + self.latency, arrived, value)


class Mailbox:
    """Values in the order they came, for whoever takes them."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._values: deque[Any] = deque()
        self._takers: deque[Resume] = deque()

    def __len__(self) -> int:
        return len(self._values)

    def put(self, value: Any) -> None:
        if self._takers:
            self._sim.at(self._sim.now, self._takers.popleft(), value)
        else:
            self._values.append(value)

    def take(self) -> Wait:
        def begin(resume: Resume) -> None:
            if self._values:
                self._sim.at(self._sim.now, resume, self._values.popleft())
            else:
                self._takers.append(resume)

        return begin


Carry = Callable[[float, Resume, Any], None]
"""(bytes, what to call on arrival, with what): the way from one end of a link to the other."""


class QueueIn:
    """The receiving end of a `queue`."""

    def __init__(self, sim: Simulation) -> None:
        self._box = Mailbox(sim)

    def __len__(self) -> int:
        return len(self._box)

    def arrived(self, sent: tuple[Any, Callable[[], None]]) -> None:
        self._box.put(sent)

    def take(self) -> Activity:
        """The next message; that gives its sender credit again."""
        value, credit = yield self._box.take()
        credit()
        return value


class QueueOut:
    """The sending end of a `queue`, towards `receivers`: each may hold `window` messages of it that nobody has taken.

    Args:
        receivers: each with the way there, and the seconds that credit takes on the way back.
        rate: bytes a second that it may send; None is no limit.
    """

    def __init__(
        self,
        sim: Simulation,
        receivers: Sequence[tuple[QueueIn, Carry, float]],
        window: int,
        rate: float | None = None,
    ) -> None:
        self._sim, self._receivers = sim, receivers
        self._credit = [window] * len(receivers)
        self._waiting: deque[Resume] = deque()
        self._bucket = TokenBucket(rate, sim.now)

    @property
    def credit(self) -> int:
        return max(self._credit)

    def send(self, value: Any, size: float) -> Activity:
        """To the receiver with most credit, once there is one and what went before is paid for."""
        while not self.credit:
            yield self._waiting.append
        if wait := self._bucket.wait_s(self._sim.now):
            yield self._sim.sleep(wait)
        self._bucket.spend(int(size), self._sim.now)
        lane = self._credit.index(self.credit)
        self._credit[lane] -= 1
        receiver, carry, back = self._receivers[lane]

        def freed(_: Any = None) -> None:
            self._credit[lane] += 1
            if self._waiting:
                self._waiting.popleft()(None)

        def credit() -> None:
            self._sim.at(self._sim.now + back, freed)

        carry(size, receiver.arrived, (value, credit))


class Latest:
    """What one host has heard of a `latest`: values only ever grow."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.value = -1
        """-1: nothing yet."""
        self._waiting: list[tuple[int, Resume]] = []

    def heard(self, value: int) -> None:
        if value <= self.value:
            return
        self.value = value
        due = [resume for than, resume in self._waiting if value > than]
        self._waiting = [(than, resume) for than, resume in self._waiting if value <= than]
        for resume in due:
            self._sim.at(self._sim.now, resume, value)

    def newer(self, than: int) -> Wait:
        """Until there is a value above that one."""

        def begin(resume: Resume) -> None:
            if self.value > than:
                self._sim.at(self._sim.now, resume, self.value)
            else:
                self._waiting.append((than, resume))

        return begin


class Barrier:
    """Nobody goes on before all `parties` have come."""

    def __init__(self, sim: Simulation, parties: int) -> None:
        self._sim, self._parties = sim, parties
        self._here: list[Resume] = []

    def meet(self, resume: Resume) -> None:
        self._here.append(resume)
        if len(self._here) == self._parties:
            here, self._here = self._here, []
            for each in here:
                self._sim.at(self._sim.now, each)


class Signal:
    """Wakes whoever waits for a change of something."""

    def __init__(self) -> None:
        self._waiting: list[Resume] = []

    def wait(self, resume: Resume) -> None:
        self._waiting.append(resume)

    def notify(self, _: Any = None) -> None:
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume(None)
