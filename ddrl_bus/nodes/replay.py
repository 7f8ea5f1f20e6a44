"""The replay node: keeps experience, and draws batches of it for learners; several are shards of one replay.

    trajectories ─→ windows, first priorities ─→ buffer ─→ draw ─→ samples
                                                   └─ new priorities ride on the next question

Whoever is ahead of `samples_per_insert` waits: unrolls stay in their senders' windows, so that in the end actors wait,
and a question waits here, until it is answered without items. (Horgan et al. 2018, arXiv 1803.00933; the rate limiter
is that of Reverb, Cassirer et al. 2021, arXiv 2102.04736.)
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np

from ddrl_bus import checkpoint
from ddrl_bus.checkpoint import Checkpoint, Parts
from ddrl_bus.errors import UsageError, WireError
from ddrl_bus.messages import Sample, Sampled, Trajectory, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.batches import check
from ddrl_bus.nodes.waiting import Waiting
from ddrl_bus.rate_limiter import RateLimiter
from ddrl_bus.replay_buffer import ReplayBuffer, Snapshot
from ddrl_bus.topology.plan import most_columns
from ddrl_bus.transport.links import Request
from ddrl_bus.transport.wire import MAX_FRAME, MAX_HEADER, Arena, Array, Layout, Message, Spec

KEPT_S: Final = 1.0
"""A question that must wait is kept for so long before it is answered without items."""
Answer = tuple[Sampled, Arena | None]
"""With the items, if any were drawn."""


@dataclass(slots=True)
class Question:
    """One that waits for its answer."""

    request: Request
    sample: Sample
    due: float
    """Seconds of the loop's clock at which it waits no longer."""
    new: bool = True
    """What it brings is not yet applied."""


class Replay(Node):
    role: ClassVar[str] = "replay"

    async def start(self) -> None:
        self.receiver = self.open_receiver("trajectories")
        self.fits, self.most = check(self.schema), most_columns(self.plan.groups, self.plan.links)
        self.receiver.check = self._check
        self.learners = {node.name for node in self.plan.members(self.ports["samples"].link.sources)}
        self.returns: deque[float] = deque(maxlen=100)
        self.questions: deque[Question] = deque()
        self.asked = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.saving: asyncio.Future[None] | None = None
        self.insert_wait, self.sample_wait = Waiting(self.log), Waiting(self.log)
        self.clocks = {name: clock(self.ledger, name) for name in ("record", "draw", "send", "requests_wait")}
        self.stored = self.ledger.counter("trajectories", "stored")
        self.drawn, self.evicted = (self.ledger.counter("items", what) for what in ("drawn", "evicted"))
        await self.compute(self._build)
        self.server = self.open_server("samples")

    def _build(self) -> None:
        options: Any = self.node.options
        self.save: bool = options.save
        rows, starts, alpha = self.windows.rows, self.windows.starts, self.windows.alpha
        seed = int(self.seeds().generate_state(1)[0])
        self.buffer = ReplayBuffer(self.windows_schema, rows, starts, options.capacity, alpha, seed)
        self._check_batch()
        self.largest = starts * self.most
        limits = options.min_size, options.samples_per_insert, options.slack
        self.limiter = RateLimiter(*limits, insert=self.largest, batch=self.plan.algo.batch)
        self.env_steps = 0
        self.folder = self.run_dir / f"checkpoints-{self.name}"
        self._restore()
        self.save_at = time.monotonic() + self.plan.checkpoint.every

    def _check_batch(self) -> None:
        """Refuse a batch that one answer may not be able to hold: all of it from this shard, each row truncated."""
        batch = self.plan.algo.batch
        size = MAX_HEADER + Layout(Sampled.KIND, self.buffer.specs(batch, batch * self.buffer.length)).size
        if size > MAX_FRAME:
            raise UsageError(
                f"algo.batch: got {batch:,}, which take up to {size:,} bytes in one answer of {self.name}; "
                f"expected at most {MAX_FRAME:,} bytes, which are {batch * MAX_FRAME // size:,}"
            )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self.server.serve(self._asked), name=f"{self.name}.serve")
            while not self.draining.is_set():
                await self._turn(await self._arrivals())
            listening.cancel()
        await self._saved()
        await self._turn(self._taken([]))
        await self._save()
        await self._saved()

    # ---- what comes

    def _check(self, message: Message) -> str | None:
        """Why an unroll is refused, which is never of more environments than buffer and limiter are made for."""
        if reason := self.fits(message):
            return reason
        return None if 1 <= message.arrays["obs"].shape[1] <= self.most else "schema"

    def _asked(self, request: Request) -> None:
        try:
            sample = parse(Sample, request.message)
            refusal = self._refusal(request.message, sample)
        except WireError as error:
            refusal = str(error)
        if refusal:
            request.refuse(refusal)
            return
        self.questions.append(Question(request, sample, asyncio.get_running_loop().time() + KEPT_S))
        self.asked.set()

    def _refusal(self, message: Message, sample: Sample) -> str:
        """Why a question is not answered."""
        if message.node not in self.learners:
            return f"{message.node} is no learner of this topology"
        if not 0 <= sample.count <= self.plan.algo.batch:
            return f"got a question for {sample.count} items, expected at most a batch of {self.plan.algo.batch}"
        arrays = message.arrays
        found: Mapping[str, Any] = {name: (array.dtype, array.ndim, array.size) for name, array in arrays.items()}
        size = arrays["id"].size if "id" in arrays else 0
        if arrays and found != {"id": ("int64", 1, size), "priority": ("float32", 1, size)}:
            return f"got {found}, expected id [K] int64 and priority [K] float32"
        return ""

    async def _arrivals(self) -> list[Message]:
        """Unrolls that may be stored now; returns when there is something to do, perhaps without any."""
        messages = self._taken([])
        if not messages and not self.asked.is_set():
            with self.clocks["requests_wait"]:
                first = await self.until(self._next(), self.asked, self.draining, self.control_changed)
            messages = self._taken([] if first is None else [first])
        self.asked.clear()
        self.control_changed.clear()
        return messages

    async def _next(self) -> Message:
        """The next unroll; what must wait stays where it is, so that its sender runs out of credit."""
        if self._waits():
            await asyncio.Event().wait()
        return self._counted(await self.receiver.recv())

    def _taken(self, messages: list[Message]) -> list[Message]:
        """These and all others that came and may be stored."""
        while not (waits := self._waits()) and (message := self.receiver.try_recv()):
            messages.append(self._counted(message))
        self.insert_wait.waits(waits if self.receiver.queued else "")
        return messages

    def _waits(self) -> str:
        """What the next unroll must wait for: no samples once the run drains, for then nobody draws any more."""
        if self.limiter.inserts + self.largest > self.buffer.room:
            return "inserts wait for a checkpoint: what they would replace is not yet written"
        if self.draining.is_set() or self.control.phase == "drain":
            return ""
        return self.limiter.insert_waits(self.largest)

    def _counted(self, message: Message) -> Message:
        """The unroll, taken to be stored: the next one may have to wait for it already."""
        self.limiter.inserted(self.windows.starts * int(message.arrays["obs"].shape[1]))
        return message

    # ---- what goes

    async def _turn(self, messages: list[Message]) -> None:
        """Everything that came, in one hand-over to the thread; questions are answered in their order."""
        if not messages and not self.questions:
            return
        for message in messages:
            self.returns.extend(parse(Trajectory, message).returns)
        loop = asyncio.get_running_loop()
        questions = list(self.questions)
        answers = await self.compute(self._work, messages, questions, loop.time())
        with self.clocks["send"]:
            for answer, items in answers:
                self.questions.popleft().request.answer(Sampled.KIND, fields_of(answer), items)
        if len(answers) < len(questions):
            loop.call_at(self.questions[0].due, self.asked.set)
        if time.monotonic() >= self.save_at and (self.saving is None or self.saving.done()):
            await self._save()

    # ---- on the compute thread

    def _work(self, messages: list[Message], questions: list[Question], now: float) -> list[Answer]:
        """Answers to the first of the questions, as many as may be answered by now."""
        with self.clocks["record"]:
            for message in messages:
                self._store(message)
            for question in questions:
                self._apply(question)
        answers: list[Answer] = []
        with self.clocks["draw"]:
            for question in questions:
                waits = self.limiter.sample_waits(max(1, question.sample.count))
                if question.sample.count:
                    self.sample_wait.waits(waits)
                    if waits and now < question.due:
                        break
                answers.append(self._answer(question.sample.count, waits))
        return answers

    def _store(self, message: Message) -> None:
        """The unroll's windows, over the oldest ones."""
        self.evicted.add(self.buffer.add(message.arrays))
        new_rows = self.windows.rows - parse(Trajectory, message).overlap
        self.env_steps += new_rows * int(message.arrays["obs"].shape[1])
        self.stored.add()

    def _apply(self, question: Question) -> None:
        """The priorities that the question brings; those of items that are gone are late."""
        arrays = question.request.message.arrays
        if not question.new or not arrays:
            return
        question.new = False
        item, priority = arrays["id"], arrays["priority"]
        sound = np.isfinite(priority) & (priority >= 0)
        same_life = question.sample.life == self.epoch
        late = self.buffer.update(item[sound], priority[sound]) if same_life else int(sound.sum())
        found = {"refused": len(item) - int(sound.sum()), "late": late, "applied": int(sound.sum()) - late}
        for what, number in found.items():
            self.ledger.counter("priorities", what).add(number)

    def _answer(self, count: int, waits: str) -> Answer:
        items = None
        if count and not waits:
            items = self._draw(count)
        return Sampled(self.buffer.items, self.buffer.mass, self.env_steps, waits), items

    def _draw(self, count: int) -> Arena:
        """Items, gathered straight into the bytes that will travel."""
        arenas: list[Arena] = []

        def allocate(specs: Mapping[str, Spec]) -> Mapping[str, Array]:
            arenas.append(_layout(tuple(specs.items())).arena())
            return arenas[0].arrays

        self.buffer.sample(count, allocate)
        self.limiter.sampled(count)
        self.drawn.add(count)
        return arenas[0]

    # ---- checkpoints

    async def _save(self) -> None:
        """Begin a checkpoint of this instant: between two turns the books agree with the contents. Only the copy of
        what is small keeps the compute thread; another one reads the rest and writes, and nobody's answer waits."""
        await self._saved()
        self.save_at = time.monotonic() + self.plan.checkpoint.every
        values: dict[str, Any] = {"topology": self.plan.run_id, "env_steps": self.env_steps}
        arrays: dict[str, Array] = {}
        parts: dict[str, Parts] = {}
        if self.save:
            snapshot = await self.compute(self.buffer.snapshot)
            arrays, values["limiter"] = snapshot.arrays, self.limiter.state()
            parts["ring.obs"] = Parts(snapshot.dtype, snapshot.shape, self._read(snapshot))
        saved = Checkpoint(self.env_steps, arrays, values)
        self.saving = asyncio.ensure_future(asyncio.to_thread(self._write, saved, parts))
        if self._inline:  # a run that repeats waits for no thread
            await self.saving

    async def _saved(self) -> None:
        """The checkpoint under way is written, or could not be."""
        if self.saving is not None:
            await self.saving

    def _write(self, saved: Checkpoint, parts: Mapping[str, Parts]) -> None:
        try:
            checkpoint.save(self.folder, saved, keep=1, parts=parts)
        except OSError as error:  # a full disk must not end the run whose experience it cannot save
            self.log.error("checkpoint not written: %s", error)
        finally:
            self.buffer.release()
            self.loop.call_soon_threadsafe(self.asked.set)

    def _read(self, snapshot: Snapshot) -> Iterator[Array]:
        for part in snapshot.obs():
            yield part
            self.loop.call_soon_threadsafe(self.asked.set)  # inserts that waited may go on

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        saved = checkpoint.newest(self.folder)
        if saved is None:
            return
        self.env_steps = int(saved.values["env_steps"])
        if "limiter" in saved.values:
            self.buffer.load_state(saved.arrays)
            self.limiter.load(saved.values["limiter"])
        self.log.info("restored items=%d env_steps=%d", self.buffer.items, self.env_steps)

    def gauge(self) -> dict[str, float]:
        return {
            "items": self.buffer.items,
            "mass": self.buffer.mass,
            "env_steps": self.env_steps,
            "samples_per_insert": self.limiter.ratio,
            "insert_wait_s": self.insert_wait.seconds,
            "sample_wait_s": self.sample_wait.seconds,
            "queue": self.receiver.queued,
            **({"return_mean": float(np.mean(self.returns))} if self.returns else {}),
        }


@lru_cache(maxsize=256)
def _layout(specs: tuple[tuple[str, Spec], ...]) -> Layout:
    return Layout(Sampled.KIND, dict(specs))
