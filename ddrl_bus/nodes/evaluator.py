"""The evaluator: plays pinned weights with exploration off and reports the mean return."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np

from ddrl_bus import algos, envs
from ddrl_bus.algos import memory
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.algos.policy import Explore, Policy
from ddrl_bus.checkpoint import Checkpoint
from ddrl_bus.messages import Evaluation
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import ROLES, Node
from ddrl_bus.nodes.shards import Published, Slices
from ddrl_bus.topology.plan import Plan
from ddrl_bus.topology.schema import EvaluatorOptions

MAX_STEPS: Final = 100_000
"""Steps after which an evaluation episode counts as over, for environments without a time limit."""


class Evaluator(Node):
    role: ClassVar[str] = "evaluator"

    async def start(self) -> None:
        self.options: Any = self.node.options
        self.weights = Slices(self)
        self.policy = make_policy(self.algorithm, self.plan.algo, self.spaces, self.seeds(stream=1))
        self.clocks = {name: clock(self.ledger, name) for name in ("evaluate", "unpack", "weights_wait")}
        self.played = 0

    async def run(self) -> None:
        """Play every `every` seconds, and at once what the controller wants confirmed."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.options.every
        while not self.draining.is_set():
            with self.clocks["weights_wait"]:
                newest = await self.until(self._newest_when(due), self.draining)
            if newest is None:
                return
            await self._evaluate(newest.kept())
            due = loop.time() + self.options.every

    async def _newest_when(self, due: float) -> Published:
        """The newest weights at the time `due`, or those that the controller wants confirmed, at once."""
        newest = await self.weights.next()
        while not newest.weights.confirm:
            try:
                async with asyncio.timeout_at(due):
                    newest = await self.weights.next()
            except TimeoutError:
                break
        return newest

    async def _evaluate(self, published: Published) -> None:
        self.played += 1
        weights = published.weights
        returns = await self.compute(self._play, published, self.played)
        self.evaluation = Evaluation(
            mean_return=float(np.mean(returns)),
            episodes=len(returns),
            version=weights.updates,
            learner_epoch=published.epoch,
            env_steps=weights.env_steps,
            confirm=weights.confirm,
            number=self.played,
        )
        self.log.info("return=%.1f updates=%d", self.evaluation.mean_return, weights.updates)
        self.report()

    def _play(self, published: Published, number: int) -> list[float]:
        with self.clocks["unpack"]:
            self.policy.load(published.arrays)
        with self.clocks["evaluate"]:
            seeds, steps = self.seeds(restart=number, stream=2), published.weights.env_steps
            return play(
                self.policy, self.env, self.options.episodes, seeds, greedy=self.options.greedy, env_steps=steps
            )


def play(
    policy: Policy,
    env: envs.EnvConfig,
    episodes: int,
    seeds: np.random.SeedSequence,
    *,
    greedy: bool = True,
    env_steps: int = 0,
) -> list[float]:
    """Undiscounted returns of `episodes` full episodes, one in each of as many environments.

    One each, so that short episodes are not counted more often than long ones.

    Args:
        env_steps: that the weights were trained on, with which exploration may fade.
    """
    group = envs.VectorEnv(env, episodes, seeds)
    explore = None if greedy else Explore(np.ones(episodes, np.float32), env_steps)
    returns: dict[int, float] = {}
    obs, carried = group.reset(), policy.initial_state(episodes)
    for _ in range(MAX_STEPS):
        acted = policy.act(obs, carried, explore)
        step = group.step(acted.action)
        obs, carried = step.obs, memory.carry(acted.state, acted.action, step.reward, step.final_index)
        for index, (episode_return, _) in zip(step.final_index.tolist(), step.episodes, strict=True):
            returns.setdefault(index, episode_return)
        if len(returns) == episodes:
            break
    group.close()
    return list(returns.values())


def evaluate(plan: Plan, saved: Checkpoint, episodes: int, seed: int) -> dict[str, Any]:
    """What the weights of a checkpoint are worth, played as the run's evaluator plays: the closing object of `ddrl
    eval`."""
    env = envs.EnvConfig(**plan.env.model_dump())
    algorithm = algos.algorithm(plan.algo_name)
    policy = make_policy(algorithm, plan.algo, envs.describe(env), seed)
    policy.load(_net(saved.arrays))
    seeds = np.random.SeedSequence([seed, ROLES.index("evaluator")])
    greedy = all(options.greedy for options in plan.groups.values() if isinstance(options, EvaluatorOptions))
    returns = play(policy, env, episodes, seeds, greedy=greedy, env_steps=saved.values["env_steps"])
    return {
        "return": float(np.mean(returns)),
        "min": min(returns),
        "max": max(returns),
        "episodes": len(returns),
        "env_steps": saved.values["env_steps"],
        "updates": saved.values["updates"],
        "seed": seed,
    }


def _net(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("net."): array for name, array in arrays.items() if name.startswith("net.")}
