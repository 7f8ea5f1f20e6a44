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
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from ddrl_bus.algos import algorithm
from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.bench.control import Training
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


@dataclass(frozen=True, slots=True)
class Row:
    """Largest differences of logits or Q over the observations of a batch, medians over the updates."""

    network: str
    weights: int
    updates: int
    """Made when the looking ended."""
    error: float
    step: float
    ratio: float
    """Median of the paired ones."""
    spread: tuple[float, float]
    flipped: float
    """Share of observations whose best action becomes another by rounding."""
    float32_us: float
    float16_us: float
    numpy_us: float


def measure(cases: Sequence[Case] = CASES, updates: int = UPDATES) -> Iterator[Row]:
    torch.set_num_threads(1)
    for case in cases:
        yield _row(case, updates)


def _row(case: Case, updates: int) -> Row:
    rule = algorithm(case.algo)
    training = Training(case.env, rule, rule.Config(**case.settings), envs=case.envs, seed=1)
    learner = training.learner
    while learner.env_steps < case.steps:
        training.update()
    rounded = rule.network(learner.config, learner.spaces, None)
    errors, steps, flips = [], [], []
    for _ in range(updates):
        halves = {name: array.astype(np.float16) for name, array in learner.weights().items()}
        rounded.load_state_dict({name: torch.from_numpy(array) for name, array in halves.items()})
        exact = rule.network(learner.config, learner.spaces, None)
        exact.load_state_dict(learner.net.state_dict())
        training.update()
        said, roughly, later = (_said(net, training.batch.to("cpu")) for net in (exact, rounded, learner.net))
        errors.append(float((roughly - said).abs().max()))
        steps.append(float((later - said).abs().max()))
        flips.append(float((roughly.argmax(-1) != said.argmax(-1)).float().mean()))
    training.close()
    ratios = np.divide(errors, steps)
    return Row(
        case.name,
        sum(p.numel() for p in learner.net.parameters()),
        learner.updates,
        float(np.median(errors)),
        float(np.median(steps)),
        float(np.median(ratios)),
        (float(ratios.min()), float(ratios.max())),
        float(np.mean(flips)),
        *_copying(learner),
    )


def _copying(learner: Algorithm[Any]) -> Iterator[float]:
    """Microseconds, medians, taken in turn."""
    weights = learner.weights()
    whole, half = (Arena.of("", {n: w.astype(dtype) for n, w in weights.items()}) for dtype in (np.float32, np.float16))

    def halves() -> None:
        learner.copy_weights(half.arrays)
        overflown(half)

    def by_numpy() -> None:
        for name, array in half.arrays.items():
            array[...] = weights[name]

    ways = (partial(learner.copy_weights, whole.arrays), halves, by_numpy)
    seconds = [[_seconds(way) for way in ways] for _ in range(COPIES)]
    yield from (np.median(seconds, axis=0) * 1e6).tolist()


def _seconds(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _said(net: Any, batch: Batch) -> Any:
    """[..., A] logits or Q of the rows of a batch."""
    with torch.inference_mode():
        said = net.unroll(batch)
    return said if isinstance(said, torch.Tensor) else said[0]


def rows_as_text(rows: Iterator[Row]) -> Iterator[str]:
    """A table, a line at a time as the figures come."""
    head = f"{'network':<34}{'weights':>10}{'updates':>9}{'error':>10}{'step':>10}{'error/step':>12}"
    yield f"{head}  {'spread':<16}{'best action changes':>20}{'float32 µs':>12}{'float16 µs':>12}{'by numpy':>10}"
    for row in rows:
        spread = f"{row.spread[0]:.3f} to {row.spread[1]:.3f}"
        yield (
            f"{row.network:<34}{row.weights:>10,}{row.updates:>9,}{row.error:>10.2g}{row.step:>10.2g}"
            f"{row.ratio:>12.3f}  {spread:<16}{row.flipped:>20.2%}"
            f"{row.float32_us:>12.0f}{row.float16_us:>12.0f}{row.numpy_us:>10.0f}"
        )
