"""The actor: steps its environments with the latest weights, and sends unrolls.

    weights ─→ policy ─→ act ─→ step ─→ … T rows … ─→ unroll ─→ trajectories

Python's event loop is paid once per unroll, not once per step: T steps of all environments run on the compute thread,
straight into the bytes that will travel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, ClassVar

from ddrl_bus.algos import memory
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.algos.memory import State
from ddrl_bus.algos.policy import Explore
from ddrl_bus.envs import VectorEnv
from ddrl_bus.errors import EnvError
from ddrl_bus.experience import RECORD
from ddrl_bus.messages import Tally, Trajectory, Weights, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.assembly import Played
from ddrl_bus.nodes.base import Node, places
from ddrl_bus.nodes.env_faults import EnvFaults
from ddrl_bus.nodes.leader import weights_of
from ddrl_bus.nodes.preemption import preempted
from ddrl_bus.transport.shared import read
from ddrl_bus.transport.wire import Array, Message


class Actor(Node):
    role: ClassVar[str] = "actor"
    obs: Array
    """What the next action is taken from, [N, ...]."""
    memory: State
    """What the agents carry from step to step."""

    async def start(self) -> None:
        options: Any = self.node.options
        self.weights = weights_of(self)
        self.trajectories = self.open_sender("trajectories")
        self.policy = make_policy(self.algorithm, self.plan.algo, self.spaces, self.seeds(stream=1))
        self.envs: int = options.envs
        self.explore = Explore(places(self.plan, self.node))
        self.env_steps = self.ledger.counter("env_steps")
        self.env_faults = self.ledger.counter("env_faults")
        self.faults = EnvFaults(self.env_faults, self.log)
        names = ("env", "forward", "record", "pack", "send", "unpack", "send_wait", "weights_wait")
        self.clocks = {name: clock(self.ledger, name) for name in names}
        # `max_lag: 0` is lock-step: no unroll starts with weights that the last one was played with.
        self.lockstep = self.ports["trajectories"].link.max_lag == 0
        self.tally: Tally | None = None
        self.newest: Message | None = None
        self.loaded: Message | None = None
        self.version = self.learner_epoch = -1
        await self.compute(self._new_env, 0)

    def background(self) -> list[Coroutine[Any, Any, None]]:
        return [*super().background(), *([self._count()] if "tally" in self.ports else [])]

    async def _count(self) -> None:
        """Hear how many workers have played their rollouts."""
        tallies = self.open_subscriber("tally")
        while True:
            self.tally = parse(Tally, await tallies.next())

    async def run(self) -> None:
        playing: deque[asyncio.Future[Played]] = deque()
        fresh = await self._fresh_weights()
        try:
            while fresh and not self.draining.is_set():
                self.newest = self.weights.latest() or self.newest
                while len(playing) < self._ahead():
                    playing.append(self.submit(self._play))
                if not await self._send(await playing.popleft()):
                    break
                fresh = not self.lockstep or await self._fresh_weights()
        finally:
            await asyncio.gather(*playing, return_exceptions=True)  # nobody has room for these any more
        await self.trajectories.flush(self.plan.grace / 2)  # the rest is for the goodbye

    def _ahead(self) -> int:
        """Unrolls in the making: while there is credit, a second one hides the switch between loop and thread."""
        return 2 if self.trajectories.credit and not self.lockstep else 1

    async def _fresh_weights(self) -> bool:
        """Wait for weights newer than the last ones taken; False if the node drains first."""
        with self.clocks["weights_wait"]:
            while message := await self.until(self.weights.next(), self.draining):
                self.newest = message
                if (message.epoch, parse(Weights, message).updates) != (self.learner_epoch, self.version):
                    return True  # else they were published once more, to be confirmed
        return False

    async def _send(self, played: Played) -> bool:
        """Hand the unroll over; False if the node drains while nobody has room for it."""
        with self.clocks["send"]:
            if self.trajectories.try_send(*played):
                return True
        with self.clocks["send_wait"]:
            return bool(await self.until(self._sent(played), self.draining))

    async def _sent(self, played: Played) -> bool:
        await self.trajectories.send(*played)
        return True

    # ---- on the compute thread

    def _play(self) -> Played:
        """One unroll with the newest weights. Environments that fail are rebuilt, and the unroll starts over.

        What was half played is dropped: where it broke off is no end of an episode.
        """
        self._load()
        while True:
            try:
                if self.faults.in_a_row:
                    self.env_group.close()
                    self._new_env(restart=self.env_faults.value)
                played = self._unroll()
            except EnvError as error:
                self.faults.happened(error)
            else:
                self.faults.over()
                return played

    def _load(self) -> None:
        newest = self.newest  # the event loop may put a newer one there meanwhile
        if newest is None or newest is self.loaded:
            return
        with self.clocks["unpack"]:
            loaded = read(newest, lambda message: self.policy.load(message.arrays))
            weights = parse(Weights, loaded)
            self.explore = self.explore._replace(env_steps=weights.env_steps)
            self.loaded, self.version, self.learner_epoch = newest, weights.updates, loaded.epoch

    def _unroll(self) -> Played:
        with self.clocks["pack"]:
            unroll = self.unrolls.next()
        rows, env, forward, record = unroll.rows, self.clocks["env"], self.clocks["forward"], self.clocks["record"]
        episodes: list[tuple[float, int]] = []
        rows["obs"][unroll.first] = self.obs
        rows["version"][unroll.first :] = self.version
        for t in range(unroll.first, unroll.length):
            if self._preempted(t):
                unroll.cut(t)
                break
            unroll.carried(t, self.memory)
            with forward:
                acted = self.policy.act(self.obs, self.memory, self.explore)
            with env:
                step = self.env_group.step(acted.action)
            with record:
                self.obs = step.obs
                self.memory = memory.carry(acted.state, acted.action, step.reward, step.final_index)
                rows["obs"][t + 1] = step.obs
                rows["action"][t] = acted.action
                rows["reward"][t] = step.reward
                rows["terminated"][t] = step.terminated
                rows["truncated"][t] = step.truncated
                for name, array in acted.record.items():
                    rows[RECORD + name][t] = array
                if step.episodes:
                    episodes += step.episodes
                    cut = step.truncated[step.final_index]
                    if cut.any():
                        unroll.truncated(t, step.final_index[cut], step.final_obs[cut])
        self.env_steps.add((unroll.length - unroll.first) * self.envs)
        with self.clocks["pack"]:
            returns, lengths = [r for r, _ in episodes], [n for _, n in episodes]
            return unroll.finish(), fields_of(Trajectory(self.learner_epoch, returns, lengths, unroll.first))

    def _preempted(self, rows: int) -> bool:
        """Whether the others have waited long enough for a rollout that has so many rows."""
        tally = self.tally
        if tally is None or tally.update != self.version + 1:
            return False
        return preempted(rows, self.schema.least, tally.done, tally.workers, self.plan.algo.preempt)

    def _new_env(self, restart: int) -> None:
        self.env_group = VectorEnv(self.env, self.envs, self.seeds(restart))
        self.obs = self.env_group.reset()
        self.memory = self.policy.initial_state(self.envs)
        self.unrolls = self.unrolls_of(self.envs)

    def gauge(self) -> dict[str, float]:
        return {"env_steps": self.env_steps.value, "version": self.version, "credit": self.trajectories.credit}
