"""What the systems are shown to learn: one case a line, and when it counts as passed.

A case is an ordinary `ddrl run` over ZeroMQ, once a seed. Evaluations of policy gradients sample actions, as is usual.
A run always goes to the end of its steps, whatever it reached on the way, and what counts is the one evaluation of its
last weights on seeds that nothing else has seen. Controls are the same agent with something taken away: they must fail,
or the bar says nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan

SEEDS: Final = (1, 2, 3)
EPISODES: Final = 20
SLACK: Final = 1.02
"""Actors may be so far over the budget: what they had under way when the learner had its steps."""


@dataclass(frozen=True)
class Seed:
    """What one run came to."""

    final: float | None
    """Mean return of its last weights on fresh seeds; None: never confirmed."""
    best: float | None
    """Highest mean of all evaluations."""
    env_steps: int
    """Played by all actors together."""
    problem: str = ""
    """Why it counts for nothing, whatever the returns."""

    def reached(self, bar: float, steps: int) -> bool:
        return not self.problem and self.final is not None and self.final >= bar and self.env_steps <= SLACK * steps

    def stays(self, bar: float) -> bool:
        """Never above the bar."""
        known = (self.final, self.best)
        return not self.problem and all(value is not None and value <= bar for value in known)


@dataclass(frozen=True)
class Rule:
    """When a case has passed."""

    words: str
    holds: Callable[[Case, Sequence[Seed]], bool]
    control: bool = False


@dataclass(frozen=True)
class Case:
    name: str
    topology: str
    bar: float
    """Mean return over 20 episodes."""
    steps: int
    """Environment steps over all actors."""
    settings: str = ""
    """KEY=VALUE words, as after `ddrl run`."""
    rule: str = "worst"
    env: str = "CartPole-v1"
    control_of: str = ""
    """The case that this one is to be seen beside."""
    greedy: bool = False
    """Evaluations take the best known actions, as is usual for value-based agents, instead of sampled ones."""

    def words(self, seed: int) -> list[str]:
        """What follows `ddrl`."""
        ours = ["stop.reward=null", f"stop.steps={self.steps}"]
        ours += [f"nodes.evaluator.greedy={str(self.greedy).lower()}", f"nodes.evaluator.episodes={EPISODES}"]
        return [
            "run",
            self.topology,
            f"name={self.name}",
            f"seed={seed}",
            f"env.id={self.env}",
            *self.settings.split(),
            *ours,
        ]

    def lock(self) -> str:
        """The whole topology of its runs but for the seed, as a topology file; "" if it cannot be loaded."""
        plan = self._plan()
        lines = plan.lock().splitlines(keepends=True) if plan else []
        return "".join(line for line in lines if not line.startswith(("run_id:", "seed:")))

    def matches(self, stored: Path) -> bool:
        """Whether `stored`, a file of its `lock`, is what it would run now.

        What the file does not say yet, an option that came later, is its default in both: no change.
        """
        plan = self._plan()
        return plan == _resolved(str(stored)) if plan else not stored.exists()

    def _plan(self) -> Plan | None:
        _, topology, *overrides = self.words(seed=0)
        return _resolved(topology, overrides)

    def passes(self, seeds: Sequence[Seed]) -> bool:
        return RULES[self.rule].holds(self, seeds)


def _resolved(topology: str, overrides: Sequence[str] = ()) -> Plan | None:
    """The plan, whatever its seed; None if it cannot be loaded."""
    try:
        return dataclasses.replace(plan_of(topology, overrides, probe=False), seed=0, run_id="")
    except DdrlError:
        return None


def _worst(case: Case, seeds: Sequence[Seed]) -> bool:
    return all(seed.reached(case.bar, case.steps) for seed in seeds)


def _all_but_one(floor: float) -> Callable[[Case, Sequence[Seed]], bool]:
    def holds(case: Case, seeds: Sequence[Seed]) -> bool:
        there = sum(seed.reached(case.bar, case.steps) for seed in seeds)
        return there >= len(seeds) - 1 and all(seed.reached(floor, case.steps) for seed in seeds)

    return holds


def _stays(case: Case, seeds: Sequence[Seed]) -> bool:
    return all(seed.stays(case.bar) for seed in seeds)


def _ends_under(case: Case, seeds: Sequence[Seed]) -> bool:
    finals = [seed.final for seed in seeds if seed.final is not None and not seed.problem]
    return len(finals) == len(seeds) and sum(finals) / len(finals) <= case.bar


RULES: Final[dict[str, Rule]] = {
    "worst": Rule("every seed ≥ bar", _worst),
    "worst 400": Rule("2 of 3 seeds ≥ bar, worst ≥ 400", _all_but_one(400)),
    "stays": Rule("control: no evaluation of any seed above it", _stays, control=True),
    "ends under": Rule("control: mean of the seeds' final returns at or under it", _ends_under, control=True),
}

HALF_A_MILLION, MILLION = 500_000, 1_000_000
NO_VELOCITY: Final = "env.preset=no_velocity"
LAG: Final = (
    "nodes.learner.delay=15 algo.unroll=40 algo.gamma=0.98 algo.reward_scale=0.02 algo.activation=tanh "
    "algo.entropy_cost=0.003 nodes.actor.count=2"
)

TMAZE: Final = (
    "env.preset=null algo.burn_in=0 algo.gamma=0.95 algo.hidden=[32] algo.core_size=32 "
    "nodes.replay.samples_per_insert=8 algo.anneal_steps=300_000"
)

# fmt: off
CASES: Final[tuple[Case, ...]] = (
    Case("a2c-cartpole", "a2c", 475, HALF_A_MILLION),
    Case("a2c-acrobot", "a2c", -100, HALF_A_MILLION, "algo.entropy_cost=1e-4", env="Acrobot-v1"),
    Case("a3c-cartpole", "a3c", 475, 400_000, "algo.anneal_steps=400_000", "worst 400"),
    Case("ga3c-cartpole", "ga3c", 475, HALF_A_MILLION, rule="worst 400"),
    Case("impala-cartpole", "impala", 450, MILLION, "algo.anneal_steps=1_000_000"),
    Case("seed-cartpole", "seed", 450, 500_000, "algo.anneal_steps=500_000"),
    Case("torchbeast_mono-cartpole", "torchbeast_mono", 450, MILLION),
    Case("torchbeast_poly-cartpole", "torchbeast_poly", 450, MILLION),
    Case("appo-cartpole", "appo", 475, HALF_A_MILLION),
    Case("impala-minatar-breakout", "impala", 4, 800_000,
         "env.preset=minatar algo.reward_scale=1 algo.entropy_cost=0.01 algo.anneal_steps=800_000",
         env="MinAtar/Breakout-v1"),
    Case("impala-lstm-cartpole-no-velocity", "impala", 350, 2 * MILLION,
         f"{NO_VELOCITY} algo.core=lstm algo.anneal_steps=2_000_000"),
    Case("impala-mlp-cartpole-no-velocity", "impala", 200, 2 * MILLION, NO_VELOCITY, "stays",
         control_of="impala-lstm-cartpole-no-velocity"),
    Case("impala-lag15", "impala", 450, MILLION, f"{LAG} algo.anneal_steps=1_000_000"),
    Case("impala-lag15-no-correction", "impala", 300, MILLION, f"{LAG} algo.anneal_steps=1_000_000 algo.correct=false",
         "ends under", control_of="impala-lag15"),
    Case("apex-cartpole", "apex", 475, 150_000, greedy=True),
    Case("apex-acrobot", "apex", -100, 150_000, "algo.gamma=0.99", env="Acrobot-v1", greedy=True),
    Case("apex-minatar-breakout", "apex", 5, HALF_A_MILLION,
         "env.preset=minatar algo.gamma=0.99 algo.reward_scale=0.1 algo.n_step=3 algo.target_every=100 "
         "algo.anneal_steps=500_000 nodes.replay.samples_per_insert=2 nodes.replay.min_size=2000",
         env="MinAtar/Breakout-v1", greedy=True),
    Case("gorila-cartpole", "gorila", 400, 150_000, greedy=True),
    Case("r2d2-cartpole-no-velocity", "r2d2", 300, HALF_A_MILLION, greedy=True),
    Case("seed_r2d2-cartpole-no-velocity", "seed_r2d2", 300, HALF_A_MILLION, greedy=True),
    Case("r2d2-tmaze", "r2d2", 0.95, 300_000, TMAZE, env="ddrl_bus/TMaze-v0", greedy=True),
    Case("r2d2-tmaze-no-memory", "r2d2", 0.95, 300_000, f"{TMAZE} algo.core=none", "stays", env="ddrl_bus/TMaze-v0",
         control_of="r2d2-tmaze", greedy=True),
    Case("seed_r2d2-tmaze", "seed_r2d2", 0.95, 300_000, TMAZE, env="ddrl_bus/TMaze-v0", greedy=True),
    Case("ddppo-cartpole", "ddppo", 475, 200_000),
    Case("ddppo-cartpole-4-workers", "ddppo", 475, 200_000,
         "nodes.actor.count=4 nodes.learner.count=4 nodes.actor.envs=16 algo.batch=16"),
    Case("ddppo-lunarlander", "ddppo", 200, MILLION,
         "nodes.actor.envs=16 algo.batch=16 algo.unroll=128 algo.epochs=6 algo.minibatches=8 algo.lr=1e-3 "
         "algo.entropy_cost=0.005 algo.gamma=0.999 algo.gae_lambda=0.98 "
         "algo.anneal_steps=1_000_000 nodes.evaluator.every=20s", env="LunarLander-v3"),
    Case("ddppo-pendulum", "ddppo", -300, 300_000,
         "nodes.actor.envs=8 algo.batch=8 algo.unroll=200 algo.gamma=0.9 algo.reward_scale=0.1 algo.epochs=10 "
         "algo.minibatches=8 algo.lr=1e-3 algo.entropy_cost=0.003 algo.activation=tanh algo.shared_torso=false "
         "algo.anneal_steps=300_000 nodes.evaluator.every=20s", env="Pendulum-v1"),
    Case("impala-2-learners", "impala", 450, MILLION, "nodes.learner.count=2 algo.anneal_steps=1_000_000"),
)
# fmt: on


def named(names: Sequence[str], cases: Sequence[Case] = CASES) -> list[Case]:
    """The cases of these names; all without any.

    Raises:
        UsageError: there is no such case; names the nearest.
    """
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"no case {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; have {', '.join(known)}")
            )
    return [known[name] for name in names] or list(cases)
