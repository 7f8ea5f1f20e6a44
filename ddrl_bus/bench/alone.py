"""A topology's training without its bus: what its communication is measured against.

One process, one thread: actors act, a learner learns, in turn (`bench/control.py`, `bench/replay_control.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

from ddrl_bus.algos import algorithm
from ddrl_bus.bench.control import Training
from ddrl_bus.bench.crew import Member, crew
from ddrl_bus.bench.replay_control import ReplayTraining
from ddrl_bus.envs import EnvConfig
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology.plan import Plan

WARM_UP: Final = 3
"""Updates: the first ones import and allocate."""
_TURN_S: Final = 20.0


class Alone:
    """The loop, in a process that waits while it is not asked."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def steps_per_s(self, seconds: float) -> float:
        """Env steps a second, for so long."""
        steps = spent = 0.0
        while spent < seconds:
            self._member.tell(min(_TURN_S, seconds - spent))
            turn = self._member.answer()
            steps, spent = steps + turn[0], spent + turn[1]
        return steps / spent


@contextlib.contextmanager
def alone(topology: str, overrides: Sequence[str]) -> Iterator[Alone]:
    with crew(1) as (member,):
        member.start(_train, topology, list(overrides))
        member.answer()
        yield Alone(member)
        member.end()


def training(plan: Plan) -> Training | ReplayTraining:
    """Columns of a batch come from as many actors as fill it; from one, where theirs do not divide it, or replayed."""
    algo = algorithm(plan.algo_name)
    config: Any = plan.algo
    if algo.windows(config) is not None:
        return ReplayTraining(plan)
    options: Any = next(node.options for node in plan.nodes.values() if node.kind == "actor")
    envs = options.envs if config.batch % options.envs == 0 else config.batch
    return Training(EnvConfig(**plan.env.model_dump()), algo, config, envs=envs, seed=plan.seed)


def _train(pipe: Connection, topology: str, overrides: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)  # as a learner has
    loop = training(plan_of(topology, overrides, probe=False, starts=False))
    for _ in range(WARM_UP):
        loop.update()
    pipe.send(None)
    with contextlib.closing(loop):
        while (seconds := pipe.recv()) is not None:
            steps, began = loop.learner.env_steps, time.perf_counter()
            while time.perf_counter() < began + seconds:
                loop.update()
            pipe.send((loop.learner.env_steps - steps, time.perf_counter() - began))
