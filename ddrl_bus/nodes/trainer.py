"""What belongs to a run's parameters, at the one node that holds them: a learner, or a parameter server.

    build or resume ─→ update … update ─→ snapshot ─→ publish
                                  └────→ checkpoint

It knows when the budget of steps is spent. While the controller has a result confirmed, the node holds still and
publishes what it has; should the result not hold, it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddrl_bus import checkpoint
from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.lazy import torch
from ddrl_bus.messages import Weights, fields_of
from ddrl_bus.metrics import clock
from ddrl_bus.nodes import shards
from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.links import Publisher
from ddrl_bus.transport.wire import Arena, Array, Layout


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters of one moment."""

    weights: Weights
    arena: Arena


class Trainer:
    """The algorithm of a run, its budget, checkpoints and published weights.

    `build`, `snapshot` and `save` belong to the node's compute thread, as the updates do; the rest to the event loop.

    Args:
        publisher: where the weights go; None where nobody listens.
        shard: which of how many parts of the parameters the node holds; all of them where nothing is said.
    """

    algo: Algorithm[Any]
    resumed: checkpoint.Checkpoint | None
    """What it goes on from."""
    saves = True
    """Of several replicas one saves."""
    names: list[str]
    """Of the parameters that the node holds."""

    def __init__(self, node: Node, publisher: Publisher | None, shard: tuple[int, int] = (0, 1)) -> None:
        self._node = node
        self._publisher = publisher
        self._pack, self._send = clock(node.ledger, "pack"), clock(node.ledger, "send")
        self._published = self._confirmed = 0
        self._shard, self._shards = shard
        weights = node.ports.get("weights")
        self._precision = weights.link.precision if weights else "float32"
        self._overflown = False

    def build(self, device: str) -> Algorithm[Any]:
        """The algorithm, as the newest checkpoint left it if there is one.

        Raises:
            RefusedFileError: there are checkpoints, and none is whole or fits.
            UsageError: there are more shards than parameters.
        """
        self.algo = make_algorithm(self._node, device)
        weights = self.algo.weights()
        self.names = shards.parts(weights, self._shards)[self._shard]
        self.resumed = shards.newest(self._node.run_dir, self._node.name, self._shards)
        if self.resumed is not None:
            self.algo.load_state(self.resumed.arrays)
            self._node.log.info("resumed env_steps=%d updates=%d", self.algo.env_steps, self.algo.updates)
        self._layouts = {
            precision: Layout(Weights.KIND, {name: (precision, weights[name].shape) for name in self.names})
            for precision in ("float32", "float16")
        }
        self._save_at = time.monotonic() + self._node.plan.checkpoint.every
        return self.algo

    # ---- how far

    def spent(self, under_way: int = 0) -> bool:
        """Whether the budget is used up once `under_way` more steps have been trained on."""
        steps = self._node.plan.stop.steps
        return steps is not None and self.algo.env_steps + under_way >= steps

    @property
    def held(self) -> bool:
        """Whether the parameters shall stay as they are."""
        return self._node.draining.is_set() or self._node.control.phase != "run"

    async def attend(self) -> None:
        """Nothing is being updated: see to the controller's wishes, and tell it of a spent budget."""
        node = self._node
        if node.control.confirm > self._confirmed:
            self._confirmed = node.control.confirm
            self.publish(await node.compute(self.snapshot, True), self._confirmed)
        if self.spent() and node.done is None:
            node.done = "steps"
            node.report()

    # ---- weights

    def snapshot(self, exact: bool = False) -> Snapshot:
        """Args: `exact` leaves nothing rounded: what is to be confirmed is what a checkpoint holds."""
        with self._pack:
            precision = "float32" if exact else self._precision
            arena = self._copied(precision)
            if precision == "float16" and overflown(arena):
                if not self._overflown:
                    self._node.log.warning("weights are beyond float16; publishing float32 while there are such")
                self._overflown = True
                arena = self._copied("float32")
            return Snapshot(Weights(self.algo.env_steps, self.algo.updates), arena)

    def _copied(self, precision: str) -> Arena:
        arena = self._layouts[precision].arena()
        self.algo.copy_weights(arena.arrays)
        return arena

    def publish(self, snapshot: Snapshot, confirm: int = 0) -> None:
        if self._publisher is None:
            return
        with self._send:
            self._published += 1
            weights = Weights(snapshot.weights.env_steps, snapshot.weights.updates, confirm)
            self._publisher.publish(self._published, snapshot.arena, fields_of(weights))

    # ---- checkpoints

    @property
    def save_due(self) -> bool:
        return self.saves and time.monotonic() >= self._save_at

    def save(self, **values: Any) -> bool:
        """Write a checkpoint, with `values` of plain JSON in it; says whether it is on disk."""
        if not self.saves:
            return False
        plan, algo = self._node.plan, self.algo
        self._save_at = time.monotonic() + plan.checkpoint.every
        values |= {
            "topology": plan.run_id,
            "algo": plan.algo_name,
            "learner_epoch": self._node.epoch,
            "env_steps": algo.env_steps,
            "updates": algo.updates,
            "shards": self._shards,
            "parameters": self.names,
        }
        folder = shards.folder(self._node.run_dir, self._node.name, self._shards)
        try:
            saved = checkpoint.Checkpoint(algo.env_steps, algo.state(), values)
            checkpoint.save(folder, saved, plan.checkpoint.keep)
        except OSError as error:  # a full disk must not end the training that it cannot save
            self._node.log.error("checkpoint not written: %s", error)
            return False
        return True


def overflown(arena: Arena) -> bool:
    """Whether an arena of float16 arrays holds what is not finite; sixty times as quick as isfinite."""
    return bool((arena.body.view(np.uint16) & 0x7C00).max() == 0x7C00)


def make_algorithm(node: Node, device: str) -> Algorithm[Any]:
    """The run's algorithm with a network of this node's seed; on the compute thread: importing torch takes seconds."""
    torch.set_num_threads(1)  # actors share these cores
    seed = int(node.seeds().generate_state(1)[0])
    return node.algorithm(node.plan.algo, node.spaces, seed=seed, device=device)


def lag_gauge(lags: Iterable[Array]) -> dict[str, float]:
    """Mean, 95th percentile and maximum of versions between acting and learning; arrays of any shape, on any thread."""
    rows = np.concatenate([lag.ravel() for lag in tuple(lags)] or [np.zeros(1)])
    return {"lag_mean": float(rows.mean()), "lag_p95": float(np.percentile(rows, 95)), "lag_max": float(rows.max())}
