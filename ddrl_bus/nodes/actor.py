"""The actor: steps its environments with the latest weights, and sends unrolls.

    weights ─→ policy ─→ act ─→ step ─→ … T rows … ─→ unroll ─→ trajectories

Python's event loop is paid once per unroll, not once per step: T steps of all environments run on the compute thread,
straight into the bytes that will travel.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from ddrl_bus.algos.acting import State, make_policy
from ddrl_bus.envs import VectorEnv
from ddrl_bus.errors import EnvError
from ddrl_bus.experience import RECORD, Unroll, UnrollSchema
from ddrl_bus.messages import Trajectory, Weights, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.wire import Arena, Array, Message

ENV_FAULTS: Final = 3
"""Faults in a row after which an actor gives up on its environment."""


class Actor(Node):
    role: ClassVar[str] = "actor"
    obs: Array
    """What the next action is taken from, [N, ...]."""
    memory: State
    """The policy's recurrent state."""

    async def start(self) -> None:
        options: Any = self.node.options
        self.weights = self.open_subscriber("weights")
        self.trajectories = self.open_sender("trajectories")
        config, spaces = self.plan.algo, self.spaces
        self.policy = make_policy(self.algorithm, config, spaces, self.seeds(stream=1))
        self.schema = UnrollSchema(
            (spaces.obs_dtype, spaces.obs_shape),
            (spaces.action_dtype, spaces.action_shape),
            self.algorithm.record(config, spaces),
            config.unroll,
        )
        self.envs: int = options.envs
        self.layout = self.schema.layout(self.envs)
        self.env_steps = self.ledger.counter("env_steps")
        self.env_faults = self.ledger.counter("env_faults")
        names = ("env", "forward", "record", "pack", "send", "unpack", "send_wait", "weights_wait")
        self.clocks = {name: clock(self.ledger, name) for name in names}
        # `max_lag: 0` is lock-step: no unroll starts with weights that the last one was played with.
        self.lockstep = self.ports["trajectories"].link.max_lag == 0
        self.version = self.learner_epoch = -1
        self._new_env(restart=0)

    async def run(self) -> None:
        faults = 0
        if not await self._fresh_weights():
            return
        while not self.draining.is_set():
            if (newer := self.weights.latest()) is not None:
                self._load(newer)
            try:
                arena, episodes = await self.compute(self._unroll)
            except EnvError as error:
                faults += 1
                if faults >= ENV_FAULTS:
                    raise
                self._rebuild(error, faults)
                continue
            faults = 0
            if not await self._send(arena, episodes):
                break
            if self.lockstep and not await self._fresh_weights():
                break
        await self.trajectories.flush(self.plan.grace)

    # ---- weights

    async def _fresh_weights(self) -> bool:
        """Wait for weights newer than those we act with; False if the node drains first."""
        with self.clocks["weights_wait"]:
            message = await self.until(self.weights.next(), self.draining)
        if message is not None:
            self._load(message)
        return message is not None

    def _load(self, message: Message) -> None:
        with self.clocks["unpack"]:
            weights = parse(Weights, message)
            self.policy.load(message.arrays)
            self.version, self.learner_epoch = weights.updates, message.epoch

    # ---- one unroll

    def _unroll(self) -> tuple[Arena, list[tuple[float, int]]]:
        """T steps of every environment, on the compute thread."""
        with self.clocks["pack"]:
            unroll = Unroll(self.layout)
        rows, env, forward, record = unroll.rows, self.clocks["env"], self.clocks["forward"], self.clocks["record"]
        episodes: list[tuple[float, int]] = []
        rows["obs"][0] = self.obs
        for t in range(self.schema.unroll):
            with forward:
                acted = self.policy.act(self.obs, self.memory)
            with env:
                step = self.env_group.step(acted.action)
            with record:
                self.obs, self.memory = step.obs, acted.state
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
        self.env_steps.add(self.schema.unroll * self.envs)
        with self.clocks["pack"]:
            return unroll.finish(), episodes

    async def _send(self, arena: Arena, episodes: list[tuple[float, int]]) -> bool:
        """Hand the unroll over; False if the node drains while nobody has room for it."""
        fields = fields_of(
            Trajectory(self.version, self.learner_epoch, [r for r, _ in episodes], [n for _, n in episodes])
        )
        with self.clocks["send"]:
            if self.trajectories.try_send(arena, fields):
                return True
        with self.clocks["send_wait"]:
            return bool(await self.until(self._sent(arena, fields), self.draining))

    async def _sent(self, arena: Arena, fields: dict[str, Any]) -> bool:
        await self.trajectories.send(arena, fields)
        return True

    # ---- environments

    def _new_env(self, restart: int) -> None:
        self.env_group = VectorEnv(self.env, self.envs, self.seeds(restart))
        self.obs = self.env_group.reset()
        self.memory = self.policy.initial_state(self.envs)

    def _rebuild(self, error: EnvError, faults: int) -> None:
        """Start the environments anew; the half-played unroll is dropped, for its end is no end of the MDP."""
        self.env_faults.add()
        self.log.error("environments rebuilt, fault %d of %d in a row: %s", faults, ENV_FAULTS, error)
        self.env_group.close()
        self._new_env(restart=self.env_faults.value)

    def gauge(self) -> dict[str, float]:
        return {"env_steps": self.env_steps.value, "version": self.version, "credit": self.trajectories.credit}
