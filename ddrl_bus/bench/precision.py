"""What rounding weights to float16 changes of what actors say: `ddrl bench precision`.

A network is trained without a bus (`bench/control.py`). Then, update by update, its logits or Q are taken of the batch
that was just played: by its weights, by these rounded (*error*), and by those after one more update (*step*). The
change of an update is what actors live with anyway, for they are a version or more behind.

Beside it, what a learner's thread spends on copying its weights into a frame: as float32, as float16 with a look
whether all fit, and how long numpy takes to make the halves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from ddrl_bus.algos import algorithm
from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.bench.control import Training
from ddrl_bus.bench.report import US, About, Kind, Repeat, Row, row
from ddrl_bus.envs import EnvConfig
from ddrl_bus.nodes.trainer import overflown
from ddrl_bus.transport.wire import Arena

UPDATES: Final = 30
"""Looked at, once the network is trained."""
COPIES: Final = 100


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    env: EnvConfig
    algo: str
    settings: dict[str, Any]
    envs: int
    steps: int
    """Environment steps to train for."""


CASES: Final = (
    Case("CartPole, MLP, logits", EnvConfig("CartPole-v1"), "impala", {}, 32, 200_000),
    # without a replay: an unroll is one window
    Case("CartPole, MLP, Q", EnvConfig("CartPole-v1"), "dqn", {"unroll": 3, "n_step": 3, "batch": 128}, 32, 400_000),
    Case(
        "Pong, DQN's convolutions, logits",
        EnvConfig("ALE/Pong-v5", preset="atari"),
        "impala",
        {"batch": 8, "reward_clip": "sign", "reward_scale": 1.0},
        8,
        4_000,
    ),
)


ABOUT: Final = About(
    bench="precision",
    title="What weights in half precision change of what actors say",
    method=f"""A network is trained without a bus. Then, update by update, its logits or Q are taken of the batch
that was just played: by its weights, by these rounded to float16 (error), and by those after one more update (step).
A repeat is one of {UPDATES} updates. Then its weights are copied into a frame as a learner's thread does it,
{COPIES} times each in turn: as float32, as float16 with a look whether all fit, and by numpy.""",
    reading="""Error and step are the largest differences over the observations of a batch. The change of an update
is what actors live with anyway, for they are a version or more behind: error/step is the figure to look at. Best
action changes: of so many observations.""",
    baseline="one update, or a copy in float32",
)
_DIFFERENCE: Final = Kind("", digits=6)
_SAID: Final = {"error": _DIFFERENCE, "step": _DIFFERENCE, "best action changes": Kind("%", digits=2)}
_COPIED: Final = {"float32": US, "float16": US, "by numpy": US}


def measure(cases: Sequence[Case] = CASES, updates: int = UPDATES) -> Iterator[Row]:
    """Two rows for each case."""
    torch.set_num_threads(1)
    learners = []
    for case in cases:
        with closing(_trained(case)) as training:
            found = [_rounded(training) for _ in range(updates)]
        learners.append((case.name, training.learner))
        yield row("what actors say", case.name, found, _SAID, {"error/step": ("error", "step")})
    for name, learner in learners:
        name += f", {sum(p.numel() for p in learner.net.parameters()):,} weights"
        yield row("a copy into a frame", name, _copying(learner), _COPIED, {"ratio": ("float16", "float32")})


def _trained(case: Case) -> Training:
    rule = algorithm(case.algo)
    training = Training(case.env, rule, rule.Config(**case.settings), envs=case.envs, seed=1)
    while training.learner.env_steps < case.steps:
        training.update()
    return training


def _rounded(training: Training) -> Repeat:
    """What rounding changes, and then an update."""
    learner = training.learner
    exact, rounded = (type(learner).network(learner.config, learner.spaces, None) for _ in range(2))
    exact.load_state_dict(learner.net.state_dict())
    halves = {name: array.astype(np.float16) for name, array in learner.weights().items()}
    rounded.load_state_dict({name: torch.from_numpy(array) for name, array in halves.items()})
    training.update()
    said, roughly, later = (_said(net, training.batch.to("cpu")) for net in (exact, rounded, learner.net))
    return {
        "error": float((roughly - said).abs().max()),
        "step": float((later - said).abs().max()),
        "best action changes": 100 * float((roughly.argmax(-1) != said.argmax(-1)).float().mean()),
    }


def _copying(learner: Algorithm[Any]) -> list[Repeat]:
    """Microseconds, taken in turn."""
    weights = learner.weights()
    whole, half = (Arena.of("", {n: w.astype(dtype) for n, w in weights.items()}) for dtype in (np.float32, np.float16))

    def halves() -> None:
        learner.copy_weights(half.arrays)
        overflown(half)

    def by_numpy() -> None:
        for name, array in half.arrays.items():
            array[...] = weights[name]

    ways: dict[str, Callable[[], None]] = {
        "float32": partial(learner.copy_weights, whole.arrays),
        "float16": halves,
        "by numpy": by_numpy,
    }
    return [{name: _seconds(way) * 1e6 for name, way in ways.items()} for _ in range(COPIES)]


def _seconds(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _said(net: Any, batch: Batch) -> Any:
    """[..., A] logits or Q of the rows of a batch."""
    with torch.inference_mode():
        said = net.unroll(batch)
    return said if isinstance(said, torch.Tensor) else said[0]
