"""The control of replayed learning: the same training without a bus, in one process.

One actor, one buffer and one learner take turns, so that `samples_per_insert` is kept as a replay node keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ddrl_bus.algos import Algorithm, Batch, algorithm, make_policy, memory
from ddrl_bus.algos.policy import Explore
from ddrl_bus.envs import EnvConfig, VectorEnv
from ddrl_bus.experience import FINAL, RECORD, STATE, Unrolls, under
from ddrl_bus.messages import Actions
from ddrl_bus.nodes.assembly import Assembler, Played
from ddrl_bus.nodes.base import node_seeds, places, unroll_schema
from ddrl_bus.rate_limiter import RateLimiter
from ddrl_bus.replay_buffer import ReplayBuffer
from ddrl_bus.topology.plan import Plan
from ddrl_bus.transport.wire import Array, Spec


class ReplayTraining:
    """Of a topology that replays: its first actor, and a shard."""

    def __init__(self, plan: Plan) -> None:
        node = next(node for node in plan.nodes.values() if node.kind == "actor")
        shard: Any = next(node.options for node in plan.nodes.values() if node.kind == "replay")
        options: Any = node.options
        algo, self._config, envs = algorithm(plan.algo_name), plan.algo, options.envs
        self.env = VectorEnv(EnvConfig(**plan.env.model_dump()), envs, node_seeds(plan.seed, "actor", 0))
        spaces = self.env.spaces
        schema, windows = unroll_schema(algo, self._config, spaces), algo.windows(self._config)
        assert windows is not None
        self.learner: Algorithm[Any] = algo(self._config, spaces, seed=plan.seed)
        self._policy = make_policy(algo, self._config, spaces, node_seeds(plan.seed, "actor", 0, stream=1))
        self._assembler = Assembler(Unrolls(schema, envs, partial(algo.priorities, self._config)))
        self._schema, self._windows = schema.windows(windows.length), windows
        self._buffer = ReplayBuffer(self._schema, windows.rows, windows.starts, shard.capacity, windows.alpha)
        self._items = windows.starts * envs
        limits = shard.min_size, shard.samples_per_insert, shard.slack
        self._limiter = RateLimiter(*limits, insert=self._items, batch=self._config.batch)
        self._paced = shard.samples_per_insert is not None
        self._explore, self._fresh_steps = Explore(places(plan, node)), 0
        self._obs, self._state = self.env.reset(), self._policy.initial_state(envs)
        self._assembler.observed(self._obs)

    def update(self) -> dict[str, float]:
        """Plays what may be played before a batch, and trains on it; returns the learner's report."""
        batch = self._config.batch
        if not self._paced:
            self._insert()
        while not self._limiter.may_sample(batch):
            self._insert()
        drawn = self._buffer.sample(batch, _empty)
        self._limiter.sampled(batch)
        steps, self._fresh_steps = self._fresh_steps, 0
        report = self.learner.step(self._batch(drawn), steps)
        if self.learner.errors is not None and self._windows.alpha:
            self._buffer.update(drawn["id"], self.learner.errors)
        return report

    def _insert(self) -> None:
        arena, fields = self._unroll()
        self._buffer.add(arena.arrays)
        self._limiter.inserted(self._items)
        self._fresh_steps += (len(arena.arrays["reward"]) - fields["overlap"]) * self.env.n

    def _unroll(self) -> Played:
        self._policy.load(self.learner.weights())
        self._explore = self._explore._replace(env_steps=self.learner.env_steps)
        by, played = Actions(self.learner.updates, 0), None
        while played is None:
            before = {STATE + name: array for name, array in self._state.items()} if self._assembler.begins else {}
            acted = self._policy.act(self._obs, self._state, self._explore)
            record = {RECORD + name: array for name, array in acted.record.items()}
            self._assembler.acted({"action": acted.action, **record, **before}, by)
            step = self.env.step(acted.action)
            arrays = {"reward": step.reward, "terminated": step.terminated, "truncated": step.truncated}
            if (cut := step.truncated[step.final_index]).any():
                arrays |= dict(zip(FINAL, (step.final_index[cut], step.final_obs[cut]), strict=True))
            self._assembler.led_to(arrays, [], [])
            self._obs = step.obs
            self._state = memory.carry(acted.state, acted.action, step.reward, step.final_index)
            played = self._assembler.observed(self._obs)
        return played

    def _batch(self, drawn: Mapping[str, Array]) -> Batch:
        rows = {name: array for name, array in drawn.items() if name in self._schema.rows}
        dtype, shape = self._schema.obs
        weight = None
        if self._windows.alpha and self._windows.beta:
            probability = drawn["probability"]
            weight = ((probability.min() / probability) ** self._windows.beta).astype(np.float32)
        return Batch(
            **rows,
            obs=drawn["obs"],
            record={},
            state=under(STATE, drawn),
            version=drawn["version"],
            final_obs=drawn.get(FINAL[1], np.empty((0, *shape), dtype)),
            final_index=drawn.get(FINAL[0], np.empty(0, np.int64)),
            weight=weight,
        )

    def close(self) -> None:
        self.env.close()


def _empty(specs: Mapping[str, Spec]) -> dict[str, Array]:
    return {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}
