"""The control of the communication benchmarks: the same training without a bus, in one process.

`run_control` acts, stacks and learns in turn, with the environments, policies, algorithms and seeds that the nodes use,
so what a distributed run adds to it is the cost of communication; in lock-step, the numbers are the very same. With
`target` it also says when the policy got there; the defaults in algos/ were chosen that way:

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

from ddrl_bus.algos import Algorithm, Batch, algorithm, make_policy, memory
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.envs import EnvConfig, VectorEnv, describe
from ddrl_bus.nodes.base import node_seeds
from ddrl_bus.nodes.evaluator import play

R = TypeVar("R")


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


class Training:
    """Actors and a learner that take turns.

    A batch comes from `config.batch / envs` actors of `envs` columns each. `lag`: they act with weights that are so
    many updates old, as in a distributed run; with `late_gradients` it is the gradients that are applied so many
    updates late, as in A3C with `lag + 1` workers, each with actors of its own.
    """

    def __init__(
        self,
        env: EnvConfig,
        algo: type[Algorithm[Any]],
        config: Any,
        *,
        envs: int,
        seed: int,
        lag: int = 0,
        late_gradients: bool = False,
    ) -> None:
        if config.batch % envs:
            raise ValueError(f"batch {config.batch} is not a multiple of {envs} environments")
        self.clock = Clock()
        count = config.batch // envs
        self._workers = []
        for worker in range(lag + 1 if late_gradients else 1):
            # As a learner that waits for all: columns in the order of the actors' names.
            indices = sorted(range(worker * count, (worker + 1) * count), key=str)
            self._workers.append([_Actor(env, algo, config, envs, seed, index, self.clock) for index in indices])
        self.actors = [actor for actors in self._workers for actor in actors]
        spaces = self.actors[0].env.spaces
        self.learner = algo(config, spaces, seed=int(node_seeds(seed, "learner", 0).generate_state(1)[0]))
        self.batch = _empty_batch(algo, config, spaces)
        self._lag, self._late = lag, late_gradients
        self._turn = 0
        self._gradients: deque[Mapping[str, NDArray[Any]]] = deque()
        self._versions = deque([self.learner.weights()], maxlen=1 if late_gradients else lag + 1)

    def update(self) -> dict[str, float]:
        """Plays one batch and trains on it; returns the learner's report."""
        batch, actors, start = self.batch, self._workers[self._turn % len(self._workers)], 0
        self._turn += 1
        finals = []
        for actor in actors:
            finals.append(actor.unroll(batch, slice(start, start + actor.env.n), self._versions[0]))
            start += actor.env.n
        batch.final_obs = np.concatenate([obs for obs, _ in finals])
        batch.final_index = np.concatenate([index for _, index in finals])
        report = self.clock("learn", self._learn_late if self._late else self.learner.step, batch)
        self._versions.append(self.learner.weights())
        return report

    def _learn_late(self, batch: Batch) -> dict[str, float]:
        gradient, report = self.learner.gradients(batch)
        self._gradients.append(gradient)
        if len(self._gradients) > self._lag:
            self.learner.apply(self._gradients.popleft(), batch.reward.size)
        return report

    def close(self) -> None:
        for actor in self.actors:
            actor.env.close()


def run_control(
    env: EnvConfig,
    algo: type[Algorithm[Any]],
    config: Any,
    *,
    envs: int,
    steps: int,
    seed: int,
    lag: int = 0,
    late_gradients: bool = False,
    target: float | None = None,
    evaluate_every: int = 20_000,
    stable: int = 0,
    greedy: bool = True,
) -> Result:
    """Trains for `steps` env steps, or until `1 + stable` evaluations in a row reached `target`.

    Evaluations come every `evaluate_every` env steps and are not timed; see `Training` for the rest.
    """
    training = Training(env, algo, config, envs=envs, seed=seed, lag=lag, late_gradients=late_gradients)
    learner, result = training.learner, Result()
    next_evaluation, start = 0, time.perf_counter()
    while learner.env_steps < steps:
        result.report |= training.update()
        result.updates, result.env_steps = learner.updates, learner.env_steps
        if target is not None and result.env_steps >= next_evaluation:
            next_evaluation += evaluate_every
            paused = time.perf_counter()
            returns = evaluate(
                env, algo, config, learner.weights(), episodes=20, seed=seed + result.updates, greedy=greedy
            )
            mean = float(np.mean(returns))
            result.evaluations.append((result.env_steps, round(paused - start, 3), mean))
            start += time.perf_counter() - paused
            if result.solved_at is None and mean >= target:
                result.solved_at = result.evaluations[-1][:2]
            if [r >= target for _, _, r in result.evaluations[-1 - stable :]] == [True] * (1 + stable):
                break

    result.wall_s = time.perf_counter() - start
    result.steps_per_s = result.env_steps / result.wall_s
    result.shares = {name: seconds / result.wall_s for name, seconds in training.clock.seconds.items()}
    result.shares["other"] = 1.0 - sum(result.shares.values())
    training.close()
    return result


def evaluate(
    env: EnvConfig,
    algo: type[Algorithm[Any]],
    config: Any,
    weights: Mapping[str, NDArray[Any]],
    *,
    episodes: int,
    seed: int,
    greedy: bool = True,
) -> list[float]:
    """Returns of `episodes` episodes, played as an evaluator plays them."""
    policy = make_policy(algo, config, describe(env), node_seeds(seed, "evaluator", 0, stream=1))
    policy.load(weights)
    return play(policy, env, episodes, node_seeds(seed, "evaluator", 0, stream=2), greedy=greedy)


class Clock:
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

    def __init__(
        self, env: EnvConfig, algo: type[Algorithm[Any]], config: Any, envs: int, seed: int, index: int, clock: Clock
    ) -> None:
        self.env = VectorEnv(env, envs, node_seeds(seed, "actor", index))
        self._policy = make_policy(algo, config, self.env.spaces, node_seeds(seed, "actor", index, stream=1))
        self._clock, self._explore = clock, Explore(np.zeros(envs, np.float32))
        self._obs, self._state = self.env.reset(), self._policy.initial_state(envs)

    def unroll(
        self, batch: Batch, columns: slice, weights: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns final observations [K, ...] of truncated rows and their index t·B + b [K]."""
        self._policy.load(weights)
        width = batch.reward.shape[1]
        for name, array in self._state.items():
            batch.state[name][columns] = array
        final = [(self._obs[:0], np.zeros(0, np.int64))]
        for t in range(len(batch.reward)):
            acted = self._clock("forward", self._policy.act, self._obs, self._state, self._explore)
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
            self._obs = step.obs
            self._state = memory.carry(acted.state, acted.action, step.reward, step.final_index)
        batch.obs[-1, columns] = self._obs
        return np.concatenate([obs for obs, _ in final]), np.concatenate([index for _, index in final])


def _empty_batch(algo: type[Algorithm[Any]], config: Any, spaces: Spaces) -> Batch:
    rows = (config.unroll, config.batch)

    def zeros(specs: Mapping[str, tuple[str, tuple[int, ...]]], *lead: int) -> dict[str, NDArray[Any]]:
        return {name: np.zeros((*lead, *shape), dtype) for name, (dtype, shape) in specs.items()}

    return Batch(
        obs=np.zeros((config.unroll + 1, config.batch, *spaces.obs_shape), spaces.obs_dtype),
        action=np.zeros((*rows, *spaces.action_shape), spaces.action_dtype),
        reward=np.zeros(rows, np.float32),
        terminated=np.zeros(rows, np.bool_),
        truncated=np.zeros(rows, np.bool_),
        record=zeros(algo.record(config, spaces), *rows),
        state=zeros(algo.carried(config, spaces), config.batch),
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
    parser.add_argument("--late-gradients", action="store_true", help="the lag is that of gradients, as in A3C")
    parser.add_argument("--target", type=float, help="mean return of 20 episodes to stop at")
    parser.add_argument(
        "--sampled", action="store_true", help="evaluate the policy as it acts, not its likeliest action"
    )
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
            late_gradients=args.late_gradients,
            target=args.target,
            stable=args.stable,
            greedy=not args.sampled,
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
