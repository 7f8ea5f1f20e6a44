"""A parameter server; a test plays the workers, the controller and the evaluator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import PATIENCE_S, WORKERS, FakeController, Living, Rig, epoch, eventually, net, rig_of

from ddrl_bus import checkpoint
from ddrl_bus.errors import FencedError, UsageError
from ddrl_bus.messages import PULL, Gradient, Parameters, Weights, fields_of, parse
from ddrl_bus.nodes import param_server
from ddrl_bus.nodes.param_server import Judged, ParamServer
from ddrl_bus.nodes.shards import parts
from ddrl_bus.transport.links import Client, Subscriber
from ddrl_bus.transport.sessions import request
from ddrl_bus.transport.wire import Array, Message

ROWS = 20
LR = 2.0**-6
"""Exact in float32, as the gradients are."""
HEADS = ("policy", "value")
"""What the gradients of each of the two workers are of: in any order they come to the same, bit for bit."""


def gradient(worker: int = 0, value: float = 0.25) -> dict[str, Array]:
    return {name: array for name, array in net(value).items() if name.startswith(HEADS[worker])}


class Stage:
    """A parameter server, and the ends that talk to it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.parameters: Subscriber = rig.subscriber("evaluator-0", "parameters")
        self.clients: dict[tuple[int, int], Client] = {}
        self.server: Living = rig.start("param_server-0")

    def client(self, worker: int, life: int = 1) -> Client:
        key = worker, life
        if key not in self.clients:
            self.clients[key] = self.rig.client(f"learner-{worker}", "gradients", life)
        return self.clients[key]

    async def pull(self, worker: int = 0, life: int = 1) -> dict[str, Array]:
        answer = await self.client(worker, life).request(PULL, timeout_s=PATIENCE_S)
        assert parse(Parameters, answer).verdict == "pulled"
        return answer.arrays

    async def push(
        self, number: int, worker: int = 0, *, arrays: Mapping[str, Array] | None = None, life: int = 1, **fields: Any
    ) -> Message:
        values = {"number": number, "version": 0, "env_steps": ROWS, **fields}
        sent = fields_of(Gradient(**values))
        arrays = gradient(worker) if arrays is None else arrays
        return await self.client(worker, life).request(Gradient.KIND, sent, arrays, timeout_s=PATIENCE_S)

    async def verdict(self, number: int, worker: int = 0, **more: Any) -> str:
        return parse(Parameters, await self.push(number, worker, **more)).verdict

    async def published(self, **expected: Any) -> Message:
        """The first parameters with these values that are published."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await self.parameters.next()
                if all(getattr(parse(Weights, message), name) == value for name, value in expected.items()):
                    return message

    @property
    def algo(self) -> Any:
        return self.server.node.algo

    def count(self, what: str) -> int:
        return self.server.count(f"gradients/{what}")

    @property
    def saved(self) -> checkpoint.Checkpoint | None:
        return checkpoint.newest(self.rig.folder / "checkpoints")


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *WORKERS, f"algo.lr={LR}", *overrides) as rig:
            stage = Stage(rig)
            await stage.server.running()
            yield stage

    return made


def assert_equal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


def after(first: Mapping[str, Array], *gradients: Mapping[str, Array], lr: float = LR) -> dict[str, Array]:
    """`first` after plain gradient descent."""
    found = {name: array.copy() for name, array in first.items()}
    for each in gradients:
        for name, array in each.items():
            found[name] -= np.float32(lr) * array
    return found


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_gradients_are_applied_as_they_come(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        first = await stage.pull()
        answer = await stage.push(1)
        assert parse(Parameters, answer) == Parameters(env_steps=ROWS, updates=1, verdict="applied")
        assert_equal(answer.arrays, after(first, gradient(0)))
        answer = await stage.push(1, worker=1, env_steps=7)
        assert parse(Parameters, answer) == Parameters(env_steps=ROWS + 7, updates=2, verdict="applied")
        assert_equal(answer.arrays, after(first, gradient(0), gradient(1)))
        assert_equal(await stage.pull(1), answer.arrays)
        assert stage.count("applied") == 2
        await stage.server.drained()


async def test_the_learning_rate_falls_with_the_steps_of_all_workers(on_stage: OnStage) -> None:
    async with on_stage(f"algo.anneal_steps={4 * ROWS}") as stage:
        first = await stage.pull()
        await stage.push(1, worker=0)
        await stage.push(1, worker=1)
        answer = await stage.push(2, worker=0)
        halfway = after(after(first, gradient(0)), gradient(1), lr=LR * 3 / 4)
        assert_equal(answer.arrays, after(halfway, gradient(0), lr=LR / 2))
        assert stage.server.node.gauge()["lr"] == LR / 4
        await stage.server.drained()


async def test_a_repeated_gradient_is_answered_and_applied_once(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        first = await stage.pull()
        await stage.push(1)
        await stage.push(1, worker=1)
        answer = await stage.push(1)
        assert parse(Parameters, answer) == Parameters(env_steps=2 * ROWS, updates=2, verdict="duplicate")
        assert_equal(answer.arrays, after(first, gradient(0), gradient(1)))
        assert (stage.count("applied"), stage.count("duplicate")) == (2, 1)
        await stage.server.drained()


def poisoned() -> dict[str, Array]:
    arrays = gradient()
    arrays["policy.weight"][1, 2] = np.nan
    return arrays


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("non_finite", {"arrays": poisoned()}),
    ("non_finite", {"arrays": {"value.bias": np.array([np.inf], np.float32)}}),
    ("schema", {"arrays": {"policy.weight": np.zeros((8, 2), np.float32)}}),
    ("schema", {"arrays": gradient() | {"policy.scale": np.zeros(2, np.float32)}}),
    ("schema", {"arrays": {"policy.bias": np.zeros(2, np.float64)}}),
    ("schema", {"arrays": {}}),
    ("stale", {"version": 0}),
    ("fields", {"env_steps": -1}),
    ("fields", {"env_steps": "many"}),
    ("fields", {"version": -1}),
]


@pytest.mark.parametrize(("reason", "sent"), REFUSED)
async def test_what_is_refused_changes_nothing(on_stage: OnStage, reason: str, sent: dict[str, Any]) -> None:
    async with on_stage("nodes.param_server.max_staleness=1") as stage:
        await stage.push(1, worker=1)
        await stage.push(2, worker=1, version=1)
        before = stage.algo.state()
        answer = await stage.push(1, **{"version": 1, **sent})
        assert parse(Parameters, answer) == Parameters(env_steps=2 * ROWS, updates=2, verdict=reason)
        assert_equal(stage.algo.state(), before)
        assert_equal(answer.arrays, stage.algo.weights())
        assert (stage.count(f"refused/{reason}"), stage.count("applied")) == (1, 2)
        assert await stage.verdict(2, version=1) == "applied"
        gauge = stage.server.node.gauge()
        assert (gauge["refused"], gauge["lag_max"]) == (1, 1)
        await stage.server.drained()


async def test_a_stranger_is_told_nothing_new(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        (address,) = stage.rig.plan.ports("learner-0")["gradients"].peers.values()
        stranger = stage.rig.bus("learner-9").client("gradients", address)
        sent = fields_of(Gradient(1, 0, ROWS))
        answer = await stranger.request(Gradient.KIND, sent, gradient(), timeout_s=PATIENCE_S)
        assert parse(Parameters, answer) == Parameters(env_steps=0, updates=0, verdict="stranger")
        await stage.server.drained()


async def test_figures(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        for number, version in enumerate((0, 0, 1, 1), 1):
            await stage.push(number, version=version, report={"loss": number, "env_steps": 1e9})
        gauge = stage.server.node.gauge()
        assert (gauge["lag_mean"], gauge["lag_max"], gauge["loss"]) == (1.0, 2, 2.5)
        assert (gauge["updates"], gauge["env_steps"]) == (4, 4 * ROWS)
        assert gauge["first_update_at"] > 0
        await stage.server.drained()


# ── lives ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_life_of_a_worker_counts_from_one(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        assert [await stage.verdict(number) for number in (1, 2)] == ["applied", "applied"]
        await stage.pull(life=2)
        with pytest.raises(FencedError):
            await stage.push(3)
        assert [await stage.verdict(number, life=2) for number in (1, 1)] == ["applied", "duplicate"]
        await stage.server.drained()


async def test_an_old_life_is_fenced_by_the_next_server_too(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.push(1, life=2)
        await stage.server.drained()
        stage.server = stage.rig.start("param_server-0", life=2)
        await stage.server.running()
        assert await stage.verdict(9, life=1) == "fenced"
        assert stage.count("refused/fenced") == 1
        assert await stage.verdict(1, life=2) == "duplicate"
        await stage.server.drained()


class Mortal(ParamServer):
    """Dies of its third gradient, before anybody hears of it: before it is on disk, or in the next life after."""

    def _save(self) -> bool:
        if self._at_its_end() and self.epoch >> 32 & 1:
            raise RuntimeError("killed")
        return super()._save()

    def _judge_all(self, messages: list[Message]) -> Judged | None:
        judged = super()._judge_all(messages)
        if self._at_its_end():
            raise RuntimeError("killed")
        return judged

    def _at_its_end(self) -> bool:
        return bool(self.trainer.resumed and self.algo.updates >= self.trainer.resumed.values["updates"] + 3)


async def test_a_kill_between_apply_and_answer_applies_nothing_twice(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lives end with gradients applied and not acknowledged; answers get lost; the sum is that of a quiet run."""
    monkeypatch.setattr(request, "REPEAT_S", 0.05)
    total = 10
    async with on_stage("nodes.param_server.durable=true") as stage:
        first = await stage.pull()
        await stage.server.drained()
        verdicts: list[str] = []

        async def works(worker: int) -> None:
            for number in range(1, total + 1):
                if number % 4 == 0:  # the answer to this one is lost
                    impatient = asyncio.ensure_future(stage.push(number, worker))
                    await asyncio.sleep(0)
                    impatient.cancel()
                verdicts.append(await stage.verdict(number, worker))

        working = asyncio.gather(works(0), works(1))
        deaths = 0
        for life in range(2, 99):
            stage.server = stage.rig.run(
                Mortal(stage.rig.plan, "param_server-0", stage.rig.folder, epoch(life), stage.rig.hub, inline=True)
            )
            await asyncio.wait([working, stage.server.task], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                break
            with pytest.raises(RuntimeError, match="killed"):
                await stage.server.task
            deaths += 1
        await working
        await stage.server.drained()
        assert deaths >= 4
        assert len(verdicts) == 2 * total
        assert verdicts.count("duplicate") >= 2  # applied by a life that died before it said so
        assert set(verdicts) == {"applied", "duplicate"}
        gradients = [gradient(worker) for worker in (0, 1) for _ in range(total)]
        assert_equal(stage.algo.weights(), after(first, *gradients))
        assert (stage.algo.updates, stage.algo.env_steps) == (2 * total, 2 * total * ROWS)
        assert stage.saved is not None
        assert stage.saved.values["applied"] == {f"learner-{n}": [epoch(1), total] for n in (0, 1)}


async def test_durable_acknowledges_nothing_that_the_disk_refused(on_stage: OnStage, caplog: Any) -> None:
    async with on_stage("nodes.param_server.durable=true") as stage:
        await stage.pull()
        folder = stage.rig.folder / "checkpoints"
        folder.rename(folder.with_name("elsewhere"))
        folder.touch()  # no folder can be made here
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stage.push(1), 0.3)
        assert stage.algo.updates == 1
        folder.unlink()
        assert await stage.verdict(1) == "duplicate"
        assert stage.saved is not None
        assert stage.saved.values["applied"] == {"learner-0": [epoch(1), 1]}
        await stage.server.drained()
    assert "checkpoint not written" in caplog.text


async def test_it_resumes_where_it_left(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        for number in (1, 2):
            await stage.push(number)
        await stage.server.drained()
        before = stage.algo.state()
        stage.server = stage.rig.start("param_server-0", life=2)
        await stage.server.running()
        assert await stage.verdict(2) == "duplicate"
        assert_equal(stage.algo.state(), before)
        # Of a future that the checkpoint does not know: as far away as one that is as old.
        assert await stage.verdict(3, version=5) == "applied"
        assert stage.server.node.gauge()["lag_max"] == 3
        await stage.server.drained()


# ── several servers ──────────────────────────────────────────────────────────────────────────────────────────────


class Shards:
    """Several parameter servers and one worker; with one, the whole network is in it."""

    def __init__(self, rig: Rig, count: int) -> None:
        self.rig, self.count = rig, count
        self.controller = rig.fake_controller()
        self.names = [f"param_server-{n}" for n in range(count)]
        self.parts = parts(net(), count)
        self.servers = [rig.start(name) for name in self.names]
        addresses = rig.plan.ports("learner-0")["gradients"].peers
        bus = rig.bus("learner-0")
        self.clients = [bus.client("gradients", addresses[name]) for name in self.names]

    async def pull(self) -> dict[str, Array]:
        """All parameters; each comes from one server."""
        answers = [await client.request(PULL, timeout_s=PATIENCE_S) for client in self.clients]
        for answer, part in zip(answers, self.parts, strict=True):
            assert sorted(answer.arrays) == sorted(part)
        return {name: array for answer in answers for name, array in answer.arrays.items()}

    async def push(self, server: int, number: int, arrays: Mapping[str, Array], **fields: Any) -> Parameters:
        """This server's part of the arrays."""
        sent = fields_of(Gradient(**{"number": number, "version": 0, "env_steps": ROWS, **fields}))
        part = {name: array for name, array in arrays.items() if name in self.parts[server]}
        answer = await self.clients[server].request(Gradient.KIND, sent, part, timeout_s=PATIENCE_S)
        return parse(Parameters, answer)

    def saved(self, server: int) -> checkpoint.Checkpoint:
        found = checkpoint.newest(self.rig.folder / f"checkpoints-{self.names[server]}")
        assert found is not None
        return found


OnShards = Callable[..., AbstractAsyncContextManager[Shards]]


@pytest.fixture
def on_shards(tmp_path: Path) -> OnShards:
    @asynccontextmanager
    async def made(count: int, *overrides: str) -> AsyncIterator[Shards]:
        (folder := tmp_path / str(count)).mkdir()
        settings = (f"algo.lr={LR}", f"nodes.param_server.count={count}")
        async with rig_of(folder, *WORKERS, *settings, *overrides) as rig:
            shards = Shards(rig, count)
            for server in shards.servers:
                await server.running()
            yield shards

    return made


def a_gradient(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=array.shape).astype(np.float32) for name, array in net().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop_tf"])
async def test_four_servers_come_to_what_one_comes_to(on_shards: OnShards, optimizer: str) -> None:
    """Bit for bit, from the first parameters on."""
    settings = (f"algo.optimizer={optimizer}", f"algo.anneal_steps={30 * ROWS}")
    found = []
    for count in (1, 4):
        async with on_shards(count, *settings) as shards:
            first = await shards.pull()
            for number in range(1, 11):
                for server in range(count):
                    said = await shards.push(server, number, a_gradient(number))
                    assert said == Parameters(number * ROWS, number, "applied")
            found.append([first, await shards.pull()])
            for server in shards.servers:
                await server.drained()
    (first_of_one, one), (first_of_four, four) = found
    assert_equal(first_of_four, first_of_one)
    assert_equal(four, one)
    assert any((one[name] != first_of_one[name]).any() for name in one)


async def test_shards_count_each_for_itself(on_shards: OnShards) -> None:
    """Staleness too, by what each server's own count was."""
    async with on_shards(2, "nodes.param_server.max_staleness=0") as shards:
        first = await shards.pull()
        assert (await shards.push(0, 1, a_gradient(1))).updates == 1
        assert (await shards.push(0, 2, a_gradient(2))).verdict == "stale"
        assert await shards.push(1, 2, a_gradient(2)) == Parameters(ROWS, 1, "applied")
        assert (await shards.push(1, 2, a_gradient(2))).verdict == "duplicate"
        assert await shards.push(0, 3, a_gradient(3), version=1) == Parameters(2 * ROWS, 2, "applied")
        ours = [{name: a_gradient(n)[name] for name in shards.parts[server]} for server, n in ((0, 1), (1, 2), (0, 3))]
        assert_equal(await shards.pull(), after(first, *ours))


async def test_a_server_refuses_what_another_one_holds(on_shards: OnShards) -> None:
    async with on_shards(2) as shards:
        before = await shards.pull()
        shards.parts[0] += shards.parts[1][:1]
        assert (await shards.push(0, 1, a_gradient(1))).verdict == "schema"
        shards.parts[0].pop()
        assert_equal(await shards.pull(), before)


async def test_a_shard_comes_back_with_its_own_version(on_shards: OnShards) -> None:
    """From a folder of its own; what it knows of the worker is its own too."""
    async with on_shards(2, "nodes.param_server.durable=true") as shards:
        for number in (1, 2, 3):
            await shards.push(0, number, a_gradient(number))
        await shards.push(1, 1, a_gradient(1))
        before = await shards.pull()
        await shards.servers[0].drained()
        assert [shards.saved(n).values["updates"] for n in (0, 1)] == [3, 1]
        assert shards.saved(0).values["parameters"] == shards.parts[0]
        shards.servers[0] = shards.rig.start("param_server-0", life=2)
        await shards.servers[0].running()
        assert_equal(await shards.pull(), before)
        assert await shards.push(0, 3, a_gradient(3)) == Parameters(3 * ROWS, 3, "duplicate")
        assert await shards.push(1, 2, a_gradient(2)) == Parameters(2 * ROWS, 2, "applied")


async def test_more_servers_than_parameters(tmp_path: Path) -> None:
    async with rig_of(tmp_path, *WORKERS, "nodes.param_server.count=7") as rig:
        rig.fake_controller()
        with pytest.raises(UsageError, match="7 parameter servers, expected 1 to 6"):
            await rig.start("param_server-0").task


# ── what it publishes, and when it ends ──────────────────────────────────────────────────────────────────────────


async def test_it_publishes_now_and_then(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_server, "PUBLISH_S", 1000.0)
    async with on_stage() as stage:
        await stage.published(updates=0)
        answer = await stage.push(1)
        assert_equal((await stage.published(updates=1)).arrays, answer.arrays)
        answer = await stage.push(2)
        await asyncio.sleep(0.05)
        assert stage.parameters.latest() is None
        stage.controller.say(phase="confirm", confirm=1)
        assert_equal((await stage.published(updates=2, confirm=1)).arrays, answer.arrays)
        await stage.server.drained()


async def test_a_confirmation_holds_it_still(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.push(1)
        stage.controller.say(phase="confirm", confirm=3)
        confirmed = await stage.published(confirm=3)
        answer = await stage.push(2)
        assert parse(Parameters, answer) == Parameters(env_steps=ROWS, updates=1, verdict="held")
        assert_equal(answer.arrays, confirmed.arrays)
        assert_equal(await stage.pull(worker=1), confirmed.arrays)
        assert stage.server.node.gauge()["refused"] == 0
        stage.controller.say(phase="run")
        await eventually(lambda: stage.server.node.control.phase == "run")
        assert await stage.verdict(2) == "applied"
        await stage.server.drained()


async def test_nothing_newer_hides_what_is_to_be_confirmed(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the same parameters, which were too soon after others to be published before."""
    async with on_stage() as stage:
        await stage.push(1)
        await stage.published(updates=1)
        monkeypatch.setattr(stage.server.node, "publish_at", float("inf"))
        await stage.push(2)
        stage.controller.say(phase="confirm", confirm=1)
        await stage.published(updates=2, confirm=1)
        monkeypatch.setattr(stage.server.node, "publish_at", 0.0)
        assert await stage.verdict(3) == "held"
        await asyncio.sleep(0.05)
        assert stage.parameters.latest() is None
        stage.controller.say(phase="run")
        await eventually(lambda: stage.server.node.control.phase == "run")
        await stage.push(3)
        await stage.published(updates=3, confirm=0)
        await stage.server.drained()


async def test_the_budget_is_everybodys(on_stage: OnStage) -> None:
    async with on_stage(f"stop.steps={3 * ROWS - 1}") as stage:
        verdicts = [await stage.verdict(number, worker) for number in (1, 2, 3) for worker in (0, 1)]
        assert verdicts == ["applied"] * 3 + ["budget"] * 3
        assert stage.count("refused/budget") == 3
        await eventually(lambda: (said := stage.controller.last("param_server-0")) and said.done == "steps")
        await stage.server.drained()
        assert stage.saved is not None
        assert stage.saved.step == stage.algo.env_steps == 3 * ROWS
        assert_equal({name: stage.saved.arrays[f"net.{name}"] for name in net()}, stage.algo.weights())
