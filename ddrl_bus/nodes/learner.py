"""The learner: fills batches from unrolls as they come, trains, publishes weights.

    trajectories ─→ slot (one copy) ─→ ready ─→ train ─→ weights
                     ↑ while the last batch is trained on, the next one fills

It alone knows when the budget of steps is spent. While the controller has a result confirmed, it holds still and
publishes what it has; should the result not hold, it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, ClassVar

import numpy as np

from ddrl_bus import checkpoint
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.errors import WireError
from ddrl_bus.experience import BatchSlots, Slot, record_of
from ddrl_bus.messages import Trajectory, Weights, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.wire import Arena, Array, Layout, Message

Updated = tuple[Slot, Arena | None]
"""A slot that was trained on, and the weights that came of it, if they are due to be published."""


class Learner(Node):
    role: ClassVar[str] = "learner"

    async def start(self) -> None:
        options: Any = self.node.options
        self.trajectories = self.open_receiver("trajectories")
        self.weights = self.open_publisher("weights")
        self.publish_every: int = options.publish_every
        self.trajectories.check = self._check
        link = self.ports["trajectories"].link
        self.max_lag = link.max_lag
        self.senders = [node.name for node in self.plan.members(link.sources)]
        self.clocks = {n: clock(self.ledger, n) for n in ("learn", "pack", "send", "unpack", "queue_wait")}
        self.trained = self.ledger.counter("trajectories", "trained")
        self.lags: deque[int] = deque(maxlen=256)
        self.returns: deque[float] = deque(maxlen=100)
        self.metrics: dict[str, float] = {}
        self.published = self.confirmed = 0
        self.first_update_at = 0.0
        await self.compute(self._build, options.device)

    def _build(self, device: str) -> None:
        """Network, optimiser and batch memory, on the compute thread: importing torch takes seconds."""
        torch.set_num_threads(1)  # actors share these cores
        seed = int(self.seeds().generate_state(1)[0])
        self.algo = self.algorithm(self.plan.algo, self.spaces, seed=seed, device=device)
        saved = checkpoint.newest(self.run_dir / "checkpoints")
        if saved is not None:
            self.algo.load_state(saved.arrays)
            self.log.info("resumed env_steps=%d updates=%d", self.algo.env_steps, self.algo.updates)
        self.batches = BatchSlots(self.schema, self.plan.algo.batch, allocate=self._allocate)
        self.weights_layout = Layout(Weights.KIND, {k: (v.dtype.name, v.shape) for k, v in self.algo.weights().items()})
        self.checkpoint_at = time.monotonic() + self.plan.checkpoint.every

    def _allocate(self, dtype: str, shape: tuple[int, ...]) -> Array:
        array: Array = np.empty(shape, dtype)
        if self.algo.device.type == "cuda":  # copies to the GPU from pinned memory are direct
            array = torch.from_numpy(array).pin_memory().numpy()
        return array

    async def run(self) -> None:
        self.free: asyncio.Queue[Slot] = asyncio.Queue()
        self.ready: deque[Slot] = deque()
        self.batch_ready = asyncio.Event()
        self.training: deque[asyncio.Future[Updated]] = deque()
        for slot in self.batches.free:
            self.free.put_nowait(slot)
        self._publish(await self.compute(self._snapshot))
        assembling = asyncio.create_task(self._assemble(), name=f"{self.name}.assemble")
        try:
            await self._train_until_drained(assembling)
        finally:
            assembling.cancel()
        await self._settle()

    # ---- batches

    def _check(self, message: Message) -> str | None:
        try:
            parse(Trajectory, message)
        except WireError as error:
            return error.reason
        return self.schema.check(message)

    async def _assemble(self) -> None:
        """Copy unrolls into slots, each column once, while the compute thread trains."""
        slot = await self.free.get()
        while True:
            for message, version in await self._next_unrolls():
                start, envs = 0, message.arrays["obs"].shape[1]
                while start < envs:
                    with self.clocks["unpack"]:
                        start = self.batches.copy(slot, message, version, start)
                    if slot.full:
                        self.ready.append(slot)
                        self.batch_ready.set()
                        self._train_ahead()
                        slot = await self.free.get()

    async def _next_unrolls(self) -> list[tuple[Message, int]]:
        """The next one; in lock-step one of every sender, in the senders' order, so that a batch repeats exactly."""
        if self.max_lag != 0:
            return [await self._next_unroll()]
        round_: dict[str, tuple[Message, int]] = {}
        while len(round_) < len(self.senders):
            message, version = await self._next_unroll()
            if message.node in round_:  # of an earlier life, which died meanwhile
                self._evict("superseded", 1)
            round_[message.node] = message, version
        return [round_[name] for name in sorted(round_)]

    async def _next_unroll(self) -> tuple[Message, int]:
        """The next unroll that is not too old, and the version it was played with."""
        while True:
            message = await self.trajectories.recv()
            trajectory = parse(Trajectory, message)
            self.returns.extend(trajectory.returns)
            if self.max_lag is None or self._lag(trajectory) <= self.max_lag:
                return message, trajectory.version
            self._evict("stale", 1)

    def _lag(self, trajectory: Trajectory) -> int:
        """Versions that the learner will be ahead of it when the batch that fills now is trained on."""
        waiting = len(self.batches.free) - self.free.qsize() - 1
        return self.algo.updates + waiting - trajectory.version

    def _evict(self, reason: str, messages: int) -> None:
        self.ledger.counter("trajectories", "evicted", reason).add(messages)

    # ---- training

    async def _train_until_drained(self, assembling: asyncio.Task[None]) -> None:
        try:
            while self.training or not self.draining.is_set():
                if assembling.done():
                    assembling.result()
                self._train_ahead()
                if self.training:
                    self._updated(await self.training[0])
                else:
                    await self._attend()
        finally:
            await asyncio.gather(*self.training, return_exceptions=True)  # the first failure is the one to show

    def _train_ahead(self) -> None:
        """Hand ready batches to the thread, two at most: the second hides the switch between loop and thread."""
        while self.ready and len(self.training) < 2 and self._may_train():
            self.training.append(self.submit(self._update, self.ready.popleft()))

    def _may_train(self) -> bool:
        """Whether one more update, after those under way, is wanted."""
        if self.draining.is_set() or self.control.phase != "run":
            return False
        rows = self.plan.algo.batch * self.plan.algo.unroll
        steps = self.plan.stop.steps
        return steps is None or self.algo.env_steps + len(self.training) * rows < steps

    async def _attend(self) -> None:
        """Nothing is being trained: see to the controller's wishes, or wait for a batch."""
        self.control_changed.clear()
        self.batch_ready.clear()
        if self.control.confirm > self.confirmed:
            self.confirmed = self.control.confirm
            self._publish(await self.compute(self._snapshot), self.confirmed)
        if self.plan.stop.steps is not None and self.algo.env_steps >= self.plan.stop.steps and self.done is None:
            self.done = "steps"
            self.report()
        if self.done is not None or self.control.phase != "run":
            await self.until(self.control_changed.wait(), self.draining)
            return
        if not self.ready:
            with self.clocks["queue_wait"]:
                await self.until(self.batch_ready.wait(), self.draining, self.control_changed)

    def _updated(self, updated: Updated) -> None:
        self.training.popleft()
        slot, arena = updated
        self.trained.add(slot.messages)
        slot.clear()
        self.free.put_nowait(slot)
        if not self.first_update_at:
            self.first_update_at = time.time()
            self.report()
        if arena is not None:
            self._publish(arena)

    def _update(self, slot: Slot) -> Updated:
        """One update, on the compute thread; a snapshot of the weights if they are due."""
        self.lags.extend((self.algo.updates - slot.version[0]).tolist())
        with self.clocks["learn"]:
            index, obs = slot.final_rows(self.schema.obs)
            rows = slot.rows
            batch = Batch(
                obs=rows["obs"],
                action=rows["action"],
                reward=rows["reward"],
                terminated=rows["terminated"],
                truncated=rows["truncated"],
                record=record_of(rows),
                version=slot.version,
                final_obs=obs,
                final_index=index,
            )
            self.metrics.update(self.algo.step(batch))
        if time.monotonic() >= self.checkpoint_at:
            self._save()
        return slot, self._snapshot() if self.algo.updates % self.publish_every == 0 else None

    # ---- weights

    def _snapshot(self) -> Arena:
        with self.clocks["pack"]:
            arena = self.weights_layout.arena()
            for name, array in self.algo.weights().items():
                arena.arrays[name][...] = array
            return arena

    def _publish(self, arena: Arena, confirm: int = 0) -> None:
        with self.clocks["send"]:
            self.published += 1
            weights = Weights(self.algo.env_steps, self.algo.updates, confirm)
            self.weights.publish(self.published, arena, fields_of(weights))

    # ---- the end

    async def _settle(self) -> None:
        """Account for what came and will not be trained on, and save what was learnt."""
        while self.trajectories.try_recv() is not None:
            pass
        books = self.ledger.snapshot()
        taken = sum(
            count for name, count in books.items() if name.startswith("trajectories/") and name.endswith("/taken")
        )
        settled = self.trained.value + sum(n for name, n in books.items() if name.startswith("trajectories/evicted/"))
        self._evict("drained", taken - settled)
        await self.compute(self._save)

    def _save(self) -> None:
        settings = self.plan.checkpoint
        self.checkpoint_at = time.monotonic() + settings.every
        values = {
            "topology": self.plan.run_id,
            "algo": self.plan.algo_name,
            "learner_epoch": self.epoch,
            "env_steps": self.algo.env_steps,
            "updates": self.algo.updates,
        }
        try:
            checkpoint.save(
                self.run_dir / "checkpoints",
                checkpoint.Checkpoint(self.algo.env_steps, self.algo.state(), values),
                settings.keep,
            )
        except OSError as error:  # a full disk must not end the training that it cannot save
            self.log.error("checkpoint not written: %s", error)

    def gauge(self) -> dict[str, float]:
        lags = np.array(self.lags or [0])
        return {
            "env_steps": self.algo.env_steps,
            "updates": self.algo.updates,
            "queue": self.trajectories.queued,
            "lag_mean": float(lags.mean()),
            "lag_p95": float(np.percentile(lags, 95)),
            "lag_max": float(lags.max()),
            "first_update_at": self.first_update_at,
            **({"return_mean": float(np.mean(self.returns))} if self.returns else {}),
            **self.metrics,
        }
