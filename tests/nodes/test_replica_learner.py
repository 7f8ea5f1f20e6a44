"""Learners that train as one; a test plays their actors and, mostly, the controller.

Each has its thread, as in a run: they wait for one another in collectives of real gloo.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rig import PATIENCE_S, FakeController, Living, Rig, epoch, eventually, rig_of

from ddrl_bus import checkpoint
from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.errors import DivergedError, FencedError
from ddrl_bus.experience import BatchSlots, Unroll
from ddrl_bus.messages import Group, Tally, Trajectory, Weights, fields_of, parse
from ddrl_bus.nodes.batches import batch_of
from ddrl_bus.transport.ledger import audit, read
from ddrl_bus.transport.links import Subscriber
from ddrl_bus.transport.wire import Arena, decode

UNROLL, BATCH = 5, 8
ROWS = UNROLL * BATCH
REPLICAS = (
    *("nodes.learner={count: 2, device: cpu, bundle: worker, deadline: 20s}",),
    *("nodes.actor={count: 2, envs: 8, bundle: worker}", "algo.optimizer=sgd", "algo.anneal_steps=10_000"),
)
"""Overrides: each learner has an actor of its own."""
LOCK_STEP = ("links.trajectories.window=1", "links.trajectories.max_lag=0")
PPO = (
    *REPLICAS,
    *LOCK_STEP,
    *("algo={name: ppo, unroll: 5, batch: 8, hidden: [8], epochs: 3, minibatches: 1, lr: 0.05, optimizer: sgd}",),
)
PREEMPTED = (*PPO, "algo.preempt=1", "algo.preempt_after=0.4", "links.tally.kind=latest")


class Stage:
    """Learners, and the ends that they talk to."""

    def __init__(self, rig: Rig, started: int | None = None) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.names = [name for name, node in rig.plan.nodes.items() if node.kind == "learner"]
        self.weights: list[Subscriber] = [
            rig.bus("evaluator-0").subscriber("weights", rig.plan.ports(name)["weights"].binds[0])
            for name in self.names
        ]
        binds = [rig.plan.ports(name)["trajectories"].binds[0] for name in self.names]
        self.actors = [
            rig.bus(f"actor-{n}").sender("trajectories", {name: bind})
            for n, (name, bind) in enumerate(zip(self.names, binds, strict=True))
        ]
        self.learners: list[Living] = [rig.start(name, inline=False) for name in self.names[:started]]
        self.generation = 0

    def node(self, rank: int = 0) -> Any:
        return self.learners[rank].node

    def algo(self, rank: int = 0) -> Any:
        return getattr(self.node(rank), "algo", None)

    @property
    def algos(self) -> list[Any]:
        return [self.algo(rank) for rank in range(len(self.learners))]

    # ── the controller's part

    async def say(self, *ranks: int, **epochs: int) -> Group:
        """That these are a group, once they all have been heard."""
        names = [self.names[rank] for rank in ranks]
        heard = await eventually(lambda: (said := self.controller.last(names[0])) and said.replica)
        self.generation += 1
        members = {
            name: epochs.get(name, self.learners[rank].node.epoch) for name, rank in zip(names, ranks, strict=True)
        }
        group = Group(self.generation, members, heard.store)
        self.controller.say(group=group)
        return group

    async def form(self, *ranks: int) -> None:
        """Them, or all, a group that they are in."""
        ranks = ranks or tuple(range(len(self.learners)))
        group = await self.say(*ranks)
        await eventually(lambda: all(self.in_group(rank, group) for rank in ranks), f"{group}")

    def in_group(self, rank: int, group: Group) -> bool:
        replica = self.node(rank).replica
        return replica is not None and replica.group == group

    async def broken(self, *ranks: int) -> None:
        """They have told that the newest group failed them."""

        def told(rank: int) -> bool:
            said = self.controller.last(self.names[rank])
            return said is not None and said.replica is not None and said.replica.broken == self.generation

        await eventually(lambda: all(told(rank) for rank in ranks), f"{ranks} broken")

    # ── the actors' part

    def unroll(self, rank: int, seed: int, version: int, rows: int = UNROLL) -> tuple[Arena, dict[str, Any]]:
        """Of random rows, another one for each rank and seed."""
        rng = np.random.default_rng([seed, rank])
        unroll = Unroll(self.node(rank).schema.layout(BATCH))
        for array in unroll.rows.values():
            floats = array.dtype.kind == "f"
            array[...] = 0.5 * rng.normal(size=array.shape) if floats else rng.integers(0, 2, array.shape)
        unroll.rows["truncated"][...] = False
        unroll.rows["version"][...] = version
        unroll.cut(rows)
        return unroll.finish(), fields_of(Trajectory(0, [], []))

    async def send(self, *ranks: int, seed: int = 0, version: int = 0, rows: int = UNROLL) -> None:
        """A batch for each of them, or for all."""
        async with asyncio.timeout(PATIENCE_S):
            for rank in ranks or range(len(self.learners)):
                await self.actors[rank].send(*self.unroll(rank, seed, version, rows))

    async def updated(self, times: int, *ranks: int) -> None:
        those = ranks or tuple(range(len(self.learners)))
        await eventually(lambda: all(self.node(rank).made >= times for rank in those), f"update {times} at {those}")

    async def train(self, update: int, *ranks: int, rows: int = UNROLL) -> None:
        """This update, at them or all, with batches of its number."""
        await self.send(*ranks, seed=update, version=update - 1, rows=rows)
        await self.updated(update, *ranks)

    # ── what comes of it

    def published(self, rank: int) -> list[Weights]:
        """What came last, if anything did."""
        message = self.weights[rank].latest()
        return [parse(Weights, message)] if message else []

    async def publishes(self, rank: int, weights: Weights) -> None:
        """These, as the next but those of fewer updates."""
        async with asyncio.timeout(PATIENCE_S):
            while (said := parse(Weights, await self.weights[rank].next())).updates < weights.updates:
                pass
            while weights.confirm and not said.confirm:
                said = parse(Weights, await self.weights[rank].next())
        assert said == weights

    def one(self) -> Algorithm[Any]:
        """A learner of its own, where the first replica is now."""
        node = self.node()
        one: Algorithm[Any] = node.algorithm(node.plan.algo, node.spaces, seed=7)
        one.load_state(self.algo().state())
        return one

    def whole(self, update: int, *ranks: int) -> Batch:
        """What `train` gives them, or all, as one batch."""
        schema, those = self.node().schema, ranks or tuple(range(len(self.learners)))
        (slot,) = (slots := BatchSlots(schema, BATCH * len(those), 1)).free
        for rank in those:
            arena, fields = self.unroll(rank, update, update - 1)
            slots.copy(slot, decode(arena.encode("actor", 1, 1, fields)), 0)
        return batch_of(slot, schema)

    def assert_equal(self, *ranks: int) -> None:
        """They are where the first of them, or of all, is, bit for bit."""
        first, *others = [self.algo(rank) for rank in ranks or range(len(self.learners))]
        state = first.state()
        for other in others:
            for name, array in other.state().items():
                np.testing.assert_array_equal(array, state[name], name)

    async def drained(self) -> None:
        self.controller.say(phase="drain")
        for learner in self.learners:
            learner.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(learner.task for learner in self.learners))

    def books(self, rank: int) -> tuple[int, dict[str, int]]:
        """(unrolls trained on, reason → unrolls evicted); each that was taken is one of them."""
        books = self.learners[rank].books
        trained, start = books["trajectories/trained"], "trajectories/evicted/"
        evicted = {name.removeprefix(start): n for name, n in books.items() if name.startswith(start) and n}
        taken = sum(n for name, n in books.items() if name.startswith("trajectories/") and name.endswith("/taken"))
        assert taken == trained + sum(evicted.values())
        return trained, evicted


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str, started: int | None = None) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *overrides) as rig:
            yield Stage(rig, started)

    return made


def three(*overrides: str) -> tuple[str, ...]:
    return (*overrides, "nodes.learner.count=3", "nodes.actor.count=3")


async def deaf(stage: Stage, rank: int) -> Callable[[], None]:
    """It hears nothing from the controller until the function is called that this returns."""
    node, before = stage.node(rank), stage.node(rank).control
    obey, node._obey = node._obey, lambda control: None
    stage.controller.say()  # the same again, for whoever listens already
    await eventually(lambda: node.control is not before)
    return lambda: setattr(node, "_obey", obey)


def breaks(learner: Living, call: int, *, after: bool = False) -> None:
    """From now on its sum of this number fails, and so everybody's; or it alone learns no more of it than that."""
    collective, calls = learner.node.collective, 0
    whole = collective.sum

    def sum_(tensor: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == call and after:
            whole(tensor)
        if calls >= call:
            collective.close()
        whole(tensor)

    collective.sum = sum_


# ── what they learn ──────────────────────────────────────────────────────────────────────────────────────────────

RULES = {
    "impala, mean": (*REPLICAS, "algo.reduction=mean", "algo.lr=0.1"),
    "impala, sum": (*REPLICAS, "algo.reduction=sum", "algo.lr=0.002"),
    "impala, lock-step": (*REPLICAS, *LOCK_STEP, "algo.reduction=mean", "algo.lr=0.1"),
    "ppo": (*PPO, "algo.anneal_steps=10_000"),
    "ppo, batch norm": (*PPO, "algo.advantage_norm=batch", "algo.max_grad_norm=0.05"),
    "three": three(*REPLICAS, "algo.reduction=mean", "algo.lr=0.1"),
    "three, ppo": three(*PPO),
}


@pytest.mark.parametrize("rule", RULES)
async def test_replicas_learn_what_one_learns_from_all(on_stage: OnStage, rule: str) -> None:
    """And are equal, bit for bit, after each update."""
    async with on_stage(*RULES[rule]) as stage:
        await stage.form()
        stage.assert_equal()
        one = stage.one()
        before = one.weights()
        for update in range(1, 5):
            await stage.train(update)
            stage.assert_equal()
            one.step(stage.whole(update))
        assert all(
            (algo.updates, algo.env_steps) == (4, 4 * len(stage.names) * ROWS) == (one.updates, one.env_steps)
            for algo in stage.algos
        )
        found, expected = stage.algo().weights(), one.weights()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6)
        assert max(abs(expected[name] - before[name]).max() for name in before) > 1e-3
        await stage.drained()
        assert [stage.books(rank) for rank in range(len(stage.names))] == [(4, {})] * len(stage.names)


async def test_they_begin_with_what_the_first_has(on_stage: OnStage) -> None:
    """Their own seeds are others; and the first one's random numbers go on at all of them."""
    async with on_stage(*REPLICAS) as stage:
        await eventually(lambda: all(stage.algos))
        first, second = (algo.weights() for algo in stage.algos)
        assert any((array != second[name]).any() for name, array in first.items())
        await stage.form(1, 0)
        stage.assert_equal()
        for name, array in stage.algo().weights().items():
            np.testing.assert_array_equal(array, second[name], name)
        await stage.drained()


async def test_nobody_trains_until_all_have_a_batch(on_stage: OnStage) -> None:
    async with on_stage(*REPLICAS) as stage:
        await stage.send()
        await eventually(lambda: all(stage.node(rank).state == "running" for rank in range(2)))
        assert [algo.updates for algo in stage.algos] == [0, 0]  # nor before they are a group
        await stage.form()
        await stage.updated(1)
        for seed in (2, 3):
            await stage.send(0, seed=seed)
        await eventually(lambda: stage.node(1).votes.done(3) == 1)
        assert [algo.updates for algo in stage.algos] == [1, 1]
        await stage.send(1, seed=2)
        await stage.updated(2)
        await stage.send(1, seed=3)
        await stage.updated(3)
        stage.assert_equal()
        await stage.drained()


async def test_batches_of_unequal_rows_count_for_what_they_have(on_stage: OnStage) -> None:
    async with on_stage(*PREEMPTED) as stage:
        await stage.form()
        steps = 0
        for update, rows in enumerate([(5, 5), (5, 2), (3, 4), (2, 2)], 1):
            for rank in (0, 1):
                await stage.send(rank, seed=update, version=update - 1, rows=rows[rank])
            await stage.updated(update)
            steps += sum(rows) * BATCH
            assert [algo.env_steps for algo in stage.algos] == [steps] * 2
            stage.assert_equal()
        await stage.drained()
        assert [stage.books(rank) for rank in range(2)] == [(4, {})] * 2


async def test_actors_are_told_how_many_have_played(on_stage: OnStage) -> None:
    """Each by its own learner, of the update that its rollout is for."""
    async with on_stage(*PREEMPTED) as stage:
        tallies = [
            stage.rig.bus(f"actor-{n}").subscriber("tally", stage.rig.plan.ports(f"learner-{n}")["tally"].binds[0])
            for n in range(2)
        ]
        told: list[list[Tally]] = [[], []]

        async def hear(rank: int) -> None:
            while True:
                told[rank].append(parse(Tally, await tallies[rank].next()))

        stage.rig.tasks += [asyncio.create_task(hear(rank)) for rank in range(2)]
        await stage.form()
        await stage.send(0, seed=1, version=0)
        await eventually(lambda: all(Tally(1, 1, 2) in each for each in told))
        assert not any(tally.update > 1 for each in told for tally in each)
        await stage.send(1, seed=1, version=0)
        await stage.updated(1)
        await eventually(lambda: all(each[-1] == Tally(2, 0, 2) for each in told))
        assert all(before != after for each in told for before, after in pairwise(each))
        await stage.drained()


# ── a group that fails ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("broken", [0, 1])
async def test_what_broke_off_before_the_first_step_is_done_again(on_stage: OnStage, broken: int) -> None:
    """By the same batches, once: it comes to what one learner makes of them."""
    settings = ("algo.reduction=mean", "algo.lr=0.1", "links.trajectories.window=4")
    async with on_stage(*REPLICAS, *settings) as stage:
        await stage.form()
        one = stage.one()
        await stage.train(1)
        one.step(stage.whole(1))
        breaks(stage.learners[broken], 1)
        for update in (2, 3, 4):  # some are under way, the others ready
            await stage.send(seed=update, version=update - 1)
        await stage.broken(0, 1)
        await eventually(lambda: all(len(node.failed) + len(node.ready) == 3 for node in map(stage.node, (0, 1))))
        assert [algo.updates for algo in stage.algos] == [1, 1]
        await stage.form()
        await stage.updated(4)
        stage.assert_equal()
        for update in (2, 3, 4):
            one.step(stage.whole(update))
        for name, array in one.weights().items():
            np.testing.assert_allclose(stage.algo().weights()[name], array, rtol=1e-5, atol=1e-6)
        assert {algo.env_steps for algo in stage.algos} == {4 * 2 * ROWS} == {one.env_steps}
        await stage.drained()
        assert [stage.books(rank) for rank in range(2)] == [(4, {})] * 2


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize(("call", "after"), [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)])
async def test_what_broke_off_amid_several_steps_counts_once(
    on_stage: OnStage, call: int, after: bool, behind: int
) -> None:
    """As far as anybody came with it; what is left of its passes is left out. Where nobody made a step it is done
    again."""
    async with on_stage(*PPO, "algo.advantage_norm=none") as stage:
        await stage.form()
        await stage.train(1)
        breaks(stage.learners[behind], call, after=after)
        steps = call if after else call - 1  # that the other one makes
        await stage.send(seed=2, version=1)
        await stage.broken(behind)
        if steps < 3:
            await stage.broken(1 - behind)
        await stage.form()
        if not steps:
            await stage.updated(2)
            steps = 3
        stage.assert_equal()
        assert [(a.updates, a.gradient_steps, a.env_steps) for a in stage.algos] == [(2, 3 + steps, 4 * ROWS)] * 2
        await stage.train(3)
        stage.assert_equal()
        assert [(a.updates, a.gradient_steps, a.env_steps) for a in stage.algos] == [(3, 6 + steps, 6 * ROWS)] * 2
        await stage.drained()
        assert [stage.books(rank) for rank in range(2)] == [(3, {})] * 2


async def test_what_was_under_way_behind_it_is_done_again(on_stage: OnStage) -> None:
    """The first counts for the step that was made of it."""
    free = ("links.trajectories.window=4", "algo.advantage_norm=none")
    async with on_stage(*(setting for setting in PPO if setting not in LOCK_STEP), *free) as stage:
        await stage.form()
        breaks(stage.learners[1], 2)
        go_on = threading.Event()
        held = [stage.node(rank).submit(go_on.wait, PATIENCE_S) for rank in (0, 1)]
        for seed in (1, 2):
            await stage.send(seed=seed)
        await eventually(lambda: all(len(stage.node(rank).training) == 2 for rank in (0, 1)))
        go_on.set()
        assert all(await asyncio.gather(*held))
        await stage.broken(0, 1)
        await stage.form()
        await stage.updated(2)
        stage.assert_equal()
        await stage.drained()
        assert [(a.updates, a.gradient_steps, a.env_steps) for a in stage.algos] == [(2, 1 + 3, 4 * ROWS)] * 2
        assert [stage.books(rank) for rank in range(2)] == [(2, {})] * 2


async def test_those_who_are_left_go_on_without_the_one_that_is_lost(on_stage: OnStage) -> None:
    async with on_stage(*three(*REPLICAS, "algo.reduction=mean", "algo.lr=0.1")) as stage:
        await stage.form()
        one = stage.one()
        await stage.train(1)
        one.step(stage.whole(1))
        breaks(stage.learners[0], 1)
        await stage.send(seed=2, version=1)
        await stage.broken(0, 1, 2)
        await stage.form(1, 2)
        await stage.updated(2, 1, 2)
        await stage.train(3, 1, 2)
        stage.assert_equal(1, 2)
        for update in (2, 3):
            one.step(stage.whole(update, 1, 2))
        for name, array in one.weights().items():
            np.testing.assert_allclose(stage.algo(1).weights()[name], array, rtol=1e-5, atol=1e-6)
        assert (stage.algo(0).updates, stage.algo(1).updates, stage.algo(1).env_steps) == (1, 3, (3 + 2 + 2) * ROWS)
        await stage.form(1, 2, 0)  # it comes back, with a batch that nobody has trained on
        stage.assert_equal()
        await stage.send(1, 2, seed=4, version=3)
        await stage.updated(4)
        stage.assert_equal()
        await stage.drained()
        assert [stage.books(rank) for rank in range(3)] == [(2, {}), (4, {}), (4, {})]


async def test_a_group_that_somebody_does_not_come_to_is_told_of(on_stage: OnStage, caplog: Any) -> None:
    async with on_stage(*REPLICAS, "nodes.learner.deadline=500ms", started=1) as stage:
        await eventually(lambda: stage.algo())
        stage.learners.append(stage.learners[0])  # who is to be the second one never starts
        group = await stage.say(0, 1)
        await stage.broken(0)
        assert (said := stage.controller.last("learner-0"))
        assert said.replica
        assert said.replica.group is None
        assert "generation 1 of 2 replicas: " in caplog.text
        assert list(group.members) == ["learner-0", "learner-1"]
        del stage.learners[1]
        await stage.form(0)
        await stage.train(1, 0)
        await stage.drained()


# ── who comes back ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", ["impala", "ppo"])
async def test_in_lock_step_a_batch_of_older_weights_is_refused(on_stage: OnStage, rule: str) -> None:
    """It waited while the others went on."""
    async with on_stage(*(PPO if rule == "ppo" else (*REPLICAS, *LOCK_STEP))) as stage:
        await stage.form()
        await stage.train(1)
        await stage.send(1, seed=2, version=1)
        await eventually(lambda: len(stage.node(1).ready) == 1)
        await stage.form(0)
        for update in (2, 3):
            await stage.train(update, 0)
        await stage.form(0, 1)
        stage.assert_equal()
        await stage.publishes(1, Weights(env_steps=4 * ROWS, updates=3))  # its actor waits for such
        assert stage.learners[1].count("trajectories/evicted/stale") == 1
        await stage.send(1, seed=4, version=1)  # on its way meanwhile
        await stage.train(4)
        stage.assert_equal()
        assert stage.algo().env_steps == (2 + 1 + 1 + 2) * ROWS
        assert stage.node(1).free.qsize() + len(stage.node(1).ready) + 1 == len(stage.node(1).slots)
        await stage.drained()
        assert [stage.books(rank) for rank in range(2)] == [(4, {}), (2, {"stale": 2})]


async def test_a_new_life_takes_everything_from_the_others(on_stage: OnStage) -> None:
    """Not only parameters: what the optimiser and the random numbers have become, and how far the run is."""
    settings = ("algo.optimizer=adam", "algo.minibatches=2", "checkpoint.every=1h")
    async with on_stage(*PPO, *settings) as stage:
        await stage.form()
        for update in (1, 2):
            await stage.train(update)
        await stage.learners[1].drained()
        await stage.form(0)
        await stage.train(3, 0)
        stage.learners[1] = stage.rig.start("learner-1", life=2, inline=False)
        await stage.form(0, 1)
        stage.assert_equal()
        assert stage.algo(1).updates == 3
        for update in (4, 5):
            await stage.train(update)
            stage.assert_equal()
        await stage.drained()


async def test_a_new_group_does_not_wait_for_all_batches(on_stage: OnStage) -> None:
    """However many are ready: it is formed between two updates."""
    async with on_stage(*REPLICAS, "links.trajectories.window=16") as stage:
        await stage.form()
        step = stage.algo().step

        def slowly(*args: Any) -> Any:
            time.sleep(0.02)
            return step(*args)

        stage.algo().step = slowly
        for seed in range(16):
            await stage.send(seed=seed)
        await stage.updated(2)
        group = await stage.say(1, 0)
        await eventually(lambda: stage.in_group(0, group) or stage.node().made == 16)
        assert stage.node().made < 16
        await stage.updated(16)
        stage.assert_equal()
        assert stage.in_group(0, group)
        await stage.drained()


async def test_who_is_left_out_trains_no_more(on_stage: OnStage) -> None:
    async with on_stage(*REPLICAS) as stage:
        await stage.form()
        await stage.train(1)
        await stage.form(0)
        await stage.send(1, seed=2, version=1)
        for update in (2, 3):
            await stage.train(update, 0)
        assert [algo.updates for algo in stage.algos] == [3, 1]
        await stage.drained()
        assert stage.books(1) == (1, {"drained": 1})


async def test_who_hears_of_a_newer_life_of_itself_ends(on_stage: OnStage) -> None:
    async with on_stage(*REPLICAS, "nodes.learner.deadline=1s") as stage:
        await stage.form()
        await stage.say(0, 1, **{"learner-1": epoch(2)})
        with pytest.raises(FencedError, match=r"^a newer life of learner-1 is in generation 2 of the learners$"):
            await stage.learners[1].task


async def test_a_group_with_an_older_life_is_not_for_the_new_one(on_stage: OnStage) -> None:
    async with on_stage(*REPLICAS, "nodes.learner.deadline=500ms", started=1) as stage:
        stage.learners.append(stage.rig.start("learner-1", life=2, inline=False))
        await stage.learners[1].running()
        await stage.say(0, 1, **{"learner-1": epoch(1)})
        await stage.broken(0)
        assert stage.node(1).votes.group.generation == 0
        await stage.form()
        await stage.train(1)
        await stage.drained()


async def test_a_replica_that_another_is_unequal_to_ends(on_stage: OnStage) -> None:
    """One bit is enough, at the next update; the other goes on, or both end."""
    async with on_stage(*REPLICAS, "nodes.learner.deadline=1s") as stage:
        await stage.form()
        await stage.train(1)

        def flip() -> None:
            bias = stage.algo(1).net.value.bias.detach().numpy().view(np.uint32)
            bias[0] ^= 1

        await stage.node(1).compute(flip)
        await stage.send(seed=2, version=1)
        words = (
            r"^learner-\d: parameters of digest \w+ after update 2, expected \w+, which learner-\d has: replicas must"
        )
        tasks = [learner.task for learner in stage.learners]
        done, _ = await asyncio.wait(tasks, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        assert done
        for task in done:
            with pytest.raises(DivergedError, match=words):
                task.result()


# ── confirmation, budget, checkpoints ────────────────────────────────────────────────────────────────────────────


async def test_a_confirmation_holds_all_still(on_stage: OnStage) -> None:
    """The leader publishes for it once it knows that nobody is to train."""
    async with on_stage(*REPLICAS) as stage:
        await stage.form()
        await stage.train(1)
        await stage.send(0, seed=2, version=1)
        await eventually(lambda: stage.node(1).votes.done(2) == 1)
        restore = await deaf(stage, 1)
        stage.controller.say(phase="confirm", confirm=3)
        await eventually(lambda: stage.node().votes.mine.held)
        await asyncio.sleep(0.1)
        assert not any(weights.confirm for weights in stage.published(0))
        restore()
        await stage.publishes(0, Weights(env_steps=2 * ROWS, updates=1, confirm=3))
        await stage.send(1, seed=2, version=1)
        await eventually(lambda: stage.node(1).ready)
        await asyncio.sleep(0.05)
        assert [algo.updates for algo in stage.algos] == [1, 1]
        stage.controller.say(phase="run")
        await stage.updated(2)
        stage.assert_equal()
        await stage.drained()


async def test_a_confirmation_waits_for_what_was_promised(on_stage: OnStage) -> None:
    """All have voted for the update, and one has not come to its sum yet."""
    async with on_stage(*REPLICAS) as stage:
        await stage.form()
        await stage.train(1)
        go_on = threading.Event()
        held = stage.node(1).submit(go_on.wait, PATIENCE_S)
        await stage.send(seed=2, version=1)
        await eventually(lambda: all(stage.node(rank).training for rank in range(2)))
        stage.weights[0].latest()
        stage.controller.say(phase="confirm", confirm=3)
        await eventually(lambda: all(stage.node(rank).control.confirm == 3 for rank in range(2)))
        await asyncio.sleep(0.05)
        assert stage.weights[0].latest() is None
        go_on.set()
        assert await held
        await stage.publishes(0, Weights(env_steps=2 * 2 * ROWS, updates=2, confirm=3))
        await stage.updated(2)
        stage.assert_equal()
        await stage.drained()


async def test_a_promise_to_a_group_that_failed_binds_nobody(on_stage: OnStage) -> None:
    """Who holds still meanwhile does so in the next group, with its batch in hand."""
    async with on_stage(*REPLICAS) as stage:
        await stage.form()
        await stage.train(1)
        breaks(stage.learners[1], 1)
        go_on = threading.Event()
        held = stage.node(1).submit(go_on.wait, PATIENCE_S)
        await stage.send(seed=2, version=1)
        await eventually(lambda: all(stage.node(rank).training for rank in range(2)))
        stage.controller.say(phase="confirm", confirm=3)
        await eventually(lambda: all(stage.node(rank).control.confirm == 3 for rank in range(2)))
        go_on.set()
        assert await held
        await stage.broken(0, 1)
        await stage.form()
        await stage.publishes(0, Weights(env_steps=2 * ROWS, updates=1, confirm=3))
        stage.controller.say(phase="run")
        await stage.updated(2)
        stage.assert_equal()
        await stage.drained()
        assert [stage.books(rank) for rank in range(2)] == [(2, {})] * 2


@pytest.mark.parametrize("rule", ["free", "lock-step"])
@pytest.mark.parametrize("steps", [3 * 2 * ROWS, 3 * 2 * ROWS - 1, 2 * 2 * ROWS + 1])
async def test_all_stop_at_the_same_update(on_stage: OnStage, rule: str, steps: int) -> None:
    settings = LOCK_STEP if rule == "lock-step" else ("links.trajectories.window=16",)
    async with on_stage(*REPLICAS, *settings, f"stop.steps={steps}") as stage:
        await stage.form()
        if rule == "free":
            for _ in range(6):
                await stage.send()
        else:
            for update in (1, 2, 3):
                await stage.train(update)
            await stage.send(seed=4, version=3)
        said = stage.controller.last
        await eventually(lambda: all((last := said(name)) and last.done == "steps" for name in stage.names))
        assert [(algo.updates, algo.env_steps) for algo in stage.algos] == [(3, 3 * 2 * ROWS)] * 2
        await asyncio.sleep(0.05)
        assert [algo.updates for algo in stage.algos] == [3, 3]
        await stage.drained()
        assert [stage.books(rank)[0] for rank in range(2)] == [3, 3]


async def test_the_leader_saves_and_nobody_else(on_stage: OnStage) -> None:
    """Who leads next goes on with it; their lives tell who it was."""
    async with on_stage(*REPLICAS, "checkpoint.every=0s", "checkpoint.keep=100", started=1) as stage:
        stage.learners.append(stage.rig.start("learner-1", life=5, inline=False))
        await stage.form()
        for update in (1, 2):
            await stage.train(update)
        await stage.form(1)
        for update in (3, 4):
            await stage.train(update, 1)
        await stage.form(1, 0)
        await stage.train(5)
        await stage.drained()
        saved = [checkpoint.load(path) for path in sorted((stage.rig.folder / "checkpoints").iterdir())]
        for name, array in stage.algo().weights().items():
            np.testing.assert_array_equal(saved[-1].arrays[f"net.{name}"], array)
    lives = [(each.values["updates"], each.values["learner_epoch"] >> 32) for each in saved]
    assert sorted(set(lives)) == [(1, 1), (2, 1), (3, 5), (4, 5), (5, 5)]


async def test_others_hear_the_leader(on_stage: OnStage) -> None:
    """Those who have no actors of their own publish only once they lead, and at once then."""
    async with on_stage("nodes.learner={count: 2, device: cpu, deadline: 20s}") as stage:
        await stage.form()
        await stage.publishes(1, Weights(env_steps=0, updates=0))
        for update in (1, 2):
            await stage.train(update)
        await stage.publishes(0, Weights(env_steps=4 * ROWS, updates=2))
        assert stage.weights[1].latest() is None
        await stage.form(1, 0)
        await stage.publishes(1, Weights(env_steps=4 * ROWS, updates=2))
        await stage.train(3)
        await stage.publishes(1, Weights(env_steps=6 * ROWS, updates=3))
        assert stage.weights[0].latest() is None
        await stage.drained()


async def test_who_joins_publishes_what_it_has_become(on_stage: OnStage) -> None:
    """Its actor waits for weights that are new, in lock-step for ever."""
    async with on_stage(*REPLICAS, *LOCK_STEP) as stage:
        await stage.form(0)
        for update in (1, 2):
            await stage.train(update, 0)
        await stage.form(0, 1)
        await stage.publishes(1, Weights(env_steps=2 * ROWS, updates=2))
        await stage.train(3)
        await stage.drained()


# ── with everybody ───────────────────────────────────────────────────────────────────────────────────────────────

RUN = (
    *("nodes.learner={count: 2, device: cpu, bundle: worker, deadline: 20s}", "links.tally.kind=latest"),
    *("nodes.actor={count: 2, envs: 4, bundle: worker}", "links.trajectories.window=1"),
    *("links.trajectories.max_lag=0", "nodes.evaluator.every=1s"),
    *("algo={name: ppo, unroll: 8, batch: 4, hidden: [8], epochs: 2, minibatches: 2, preempt: 0.6}",),
)


async def test_a_whole_run_of_replicas(tmp_path: Path) -> None:
    """Actors, evaluator and controller are real; one learner leaves, and its next life joins."""
    async with rig_of(tmp_path, *RUN, "stop.steps=2000") as rig:
        nodes = {name: rig.start(name, inline=name == "controller-0") for name in rig.plan.nodes}
        one, other = nodes["learner-0"], nodes["learner-1"]
        await eventually(lambda: getattr(other.node, "made", 0) >= 3)
        await other.drained()
        before = one.node.made
        await eventually(lambda: one.node.made >= before + 3)
        again = rig.start("learner-1", life=2, inline=False)
        await eventually(lambda: getattr(again.node, "formed", False) and again.node.made >= before + 5)
        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.gather(*(living.task for living in rig.living))
        assert one.node.algo.digest() == again.node.algo.digest()
        for name, array in one.node.algo.state().items():
            np.testing.assert_array_equal(array, again.node.algo.state()[name], name)
        assert one.node.algo.env_steps >= 2000
        assert [len(living.node.votes.group.members) for living in (one, other, again)] == [2, 2, 2]
        result = json.loads((rig.folder / "result.json").read_text())
        assert (result["reason"], result["updates"]) == ("steps", one.node.algo.updates)
    (balance,) = audit(read(page) for page in (rig.folder / "ledger").glob("*.page")).values()
    assert balance.closed
    assert balance.refused == balance.duplicates == 0
