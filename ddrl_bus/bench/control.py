"""The control of the communication benchmarks: the same training without a bus, in one process.

`run_control` acts, stacks and learns in turn, with the environments, policies and algorithms that the nodes use, so
what a distributed run adds to it is the cost of communication. With `target` it also says when the greedy policy got
there; the defaults in algos/impala.py were chosen that way:

    python -m ddrl_bus.bench.control --seeds 8 --lag 3 --target 475 lr=1e-3
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import Algorithm, Batch, Policy, algorithm, make_policy
from ddrl_bus.envs import EnvConfig, VectorEnv, describe
from ddrl_bus.nodes.evaluator import play

R = TypeVar("R")
ACTOR, EVALUATOR = 1, 2  # roles in SeedSequence([run seed, role, index, restart])


@dataclass
class Result:
    env_steps: int = 0
    updates: int = 0
    wall_s: float = 0.0
    """without the evaluations"""
    steps_per_s: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    """of wall_s: env, forward, learn, other"""
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    """(env steps, wall_s, mean return), oldest first"""
    solved_at: tuple[int, float] | None = None
    """env steps and wall_s at the first evaluation that reached the target"""
    report: dict[str, float] = field(default_factory=dict)
    """the learner's last"""


def run_control(
    env: EnvConfig,
    algo: type[Algorithm[Any]],
    config: Any,
    *,
    envs: int,
    steps: int,
    seed: int,
    lag: int = 0,
    target: float | None = None,
    evaluate_every: int = 20_000,
    stable: int = 0,
) -> Result:
    """Trains for `steps` env steps, or until `1 + stable` evaluations in a row reached `target`.

    A batch comes from `config.batch / envs` actors of `envs` columns each. `lag`: they act with weights that are so
    many updates old, as in a distributed run. Evaluations come every `evaluate_every` env steps and are not timed.
    """
    if config.batch % envs:
        raise ValueError(f"batch {config.batch} is not a multiple of {envs} environments")
    clock, result = _Clock(), Result()
    actors = []
    for index in range(config.batch // envs):
        vector = VectorEnv(env, envs, np.random.SeedSequence([seed, ACTOR, index, 0]))
        policy = make_policy(algo, config, vector.spaces, np.random.SeedSequence([seed, ACTOR, index, 1]))
        actors.append(_Actor(vector, policy, slice(index * envs, (index + 1) * envs), clock))
    spaces = actors[0].env.spaces
    learner = algo(config, spaces, seed=seed)
    versions = deque([learner.weights()], maxlen=lag + 1)  # [0] is what actors use
    batch = _empty_batch(config, spaces, algo.record(config, spaces))
    next_evaluation, start = 0, time.perf_counter()

    while result.env_steps < steps:
        final = [actor.unroll(batch, versions[0]) for actor in actors]
        batch.final_obs = np.concatenate([obs for obs, _ in final])
        batch.final_index = np.concatenate([index for _, index in final])
        result.report |= clock("learn", learner.step, batch)
        versions.append(learner.weights())
        result.updates, result.env_steps = learner.updates, learner.env_steps
        if target is not None and result.env_steps >= next_evaluation:
            next_evaluation += evaluate_every
            paused = time.perf_counter()
            mean = float(np.mean(evaluate(env, algo, config, versions[-1], episodes=20, seed=seed + result.updates)))
            result.evaluations.append((result.env_steps, round(paused - start, 3), mean))
            start += time.perf_counter() - paused
            if result.solved_at is None and mean >= target:
                result.solved_at = result.evaluations[-1][:2]
            if [r >= target for _, _, r in result.evaluations[-1 - stable :]] == [True] * (1 + stable):
                break

    result.wall_s = time.perf_counter() - start
    result.steps_per_s = result.env_steps / result.wall_s
    result.shares = {name: seconds / result.wall_s for name, seconds in clock.seconds.items()}
    result.shares["other"] = 1.0 - sum(result.shares.values())
    for actor in actors:
        actor.env.close()
    return result


def evaluate(
    env: EnvConfig,
    algo: type[Algorithm[Any]],
    config: Any,
    weights: Mapping[str, NDArray[Any]],
    *,
    episodes: int,
    seed: int,
) -> list[float]:
    """Returns of `episodes` greedy episodes, played as an evaluator plays them."""
    policy = make_policy(algo, config, describe(env), seed)
    policy.load(weights)
    return play(policy, env, episodes, np.random.SeedSequence([seed, EVALUATOR, 0, 0]))


class _Clock:
    """Seconds spent in functions, under a name each."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("env", "forward", "learn"), 0.0)

    def __call__(self, name: str, function: Callable[..., R], *args: Any) -> R:
        start = time.perf_counter()
        result = function(*args)
        self.seconds[name] += time.perf_counter() - start
        return result


class _Actor:
    """Fills its columns of a batch, T rows at a time."""

    def __init__(self, env: VectorEnv, policy: Policy, columns: slice, clock: _Clock) -> None:
        self.env, self._policy, self._columns, self._clock = env, policy, columns, clock
        self._obs, self._state = env.reset(), policy.initial_state(env.n)

    def unroll(self, batch: Batch, weights: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns final observations [K, ...] of truncated rows and their index t·B + b [K]."""
        self._policy.load(weights)
        columns, width = self._columns, batch.reward.shape[1]
        final = [(self._obs[:0], np.zeros(0, np.int64))]
        for t in range(len(batch.reward)):
            acted = self._clock("forward", self._policy.act, self._obs, self._state)
            step = self._clock("env", self.env.step, acted.action)
            batch.obs[t, columns] = self._obs
            batch.action[t, columns] = acted.action
            batch.reward[t, columns] = step.reward
            batch.terminated[t, columns] = step.terminated
            batch.truncated[t, columns] = step.truncated
            for name, array in acted.record.items():
                batch.record[name][t, columns] = array
            if len(step.final_index):
                cut = step.truncated[step.final_index]
                final.append((step.final_obs[cut], t * width + columns.start + step.final_index[cut]))
            self._obs, self._state = step.obs, acted.state
        batch.obs[-1, columns] = self._obs
        return np.concatenate([obs for obs, _ in final]), np.concatenate([index for _, index in final])


def _empty_batch(config: Any, spaces: Any, record: Mapping[str, tuple[str, tuple[int, ...]]]) -> Batch:
    rows = (config.unroll, config.batch)
    return Batch(
        obs=np.zeros((config.unroll + 1, config.batch, *spaces.obs_shape), spaces.obs_dtype),
        action=np.zeros((*rows, *spaces.action_shape), spaces.action_dtype),
        reward=np.zeros(rows, np.float32),
        terminated=np.zeros(rows, np.bool_),
        truncated=np.zeros(rows, np.bool_),
        record={name: np.zeros((*rows, *shape), dtype) for name, (dtype, shape) in record.items()},
        version=np.zeros(rows, np.int64),
        final_obs=np.zeros((0, *spaces.obs_shape), spaces.obs_dtype),
        final_index=np.zeros(0, np.int64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="field=json", help="fields of the algorithm's Config")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--algo", default="impala")
    parser.add_argument("--envs", type=int, default=32, help="columns per actor")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lag", type=int, default=0, help="updates")
    parser.add_argument("--target", type=float, help="mean greedy return of 20 episodes to stop at")
    parser.add_argument("--stable", type=int, default=0, help="evaluations that must reach the target after the first")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    algo = algorithm(args.algo)
    fields = dict(setting.split("=", 1) for setting in args.settings)
    config = algo.Config(**{name: _value(text) for name, text in fields.items()})
    for seed in range(args.seeds):
        result = run_control(
            EnvConfig(args.env),
            algo,
            config,
            envs=args.envs,
            steps=args.steps,
            seed=seed,
            lag=args.lag,
            target=args.target,
            stable=args.stable,
        )
        print(json.dumps({"seed": seed, **asdict(result)}), flush=True)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
