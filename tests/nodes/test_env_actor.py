"""An actor without a policy, on `walks.Walk`; a test plays the inference node, and the learner where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walks
from rig import FakeController, Living, Rig, rig_of

from ddrl_bus.errors import EnvError, RemoteError
from ddrl_bus.experience import UnrollSchema
from ddrl_bus.messages import Act, Actions, Trajectory, fields_of, parse
from ddrl_bus.nodes import env_actor
from ddrl_bus.nodes.env_actor import EnvActor
from ddrl_bus.transport.links import Receiver, Request, Server
from ddrl_bus.transport.wire import Array, Message

ENVS, UNROLL = 2, 5
SCHEMA = UnrollSchema(("float32", (2,)), ("int64", ()), {"policy": ("float32", (2,))}, UNROLL)
ASKS = (
    *("nodes.inference.kind=inference", "links.act.kind=request", "links.weights.to=[inference,evaluator]"),
    *("nodes.actor.groups=2", "env.id=Walk-v0"),
)
SEED, GA3C = (*ASKS, "links.trajectories.from=inference"), (*ASKS, "links.trajectories.from=actor")


class Stage:
    """An actor of two groups of two walkers each, and the ends that it talks to."""

    def __init__(self, rig: Rig, assembles: bool) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.server: Server = self.serve(1)
        self.trajectories: Receiver | None = rig.receiver("learner-0") if assembles else None
        self.actor: Living = rig.start("actor-0")
        self.asked: dict[int, Request] = {}

    def serve(self, life: int, node: str = "inference-0") -> Server:
        return self.rig.bus(node, life).server("act", self.rig.plan.ports(node)["act"].binds)

    async def next(self, group: int) -> Request:
        """The next question of this group; what the other asks waits."""
        async with asyncio.timeout(20):
            while group not in self.asked:
                request = await self.server.recv()
                self.asked[parse(Act, request.message).group] = request
        return self.asked.pop(group)

    async def step(self, group: int, **more: Array) -> Message:
        """The group's next question, which is answered."""
        request = await self.next(group)
        answer(request, **more)
        return request.message

    async def play(self, group: int) -> None:
        while True:
            await self.step(group)


def answer(request: Request, version: int = 3, **more: Array) -> None:
    """Actions 0 and 1; what is recorded of them is the position."""
    position = request.message.arrays["obs"][:, 0]
    record = {"record.policy": np.stack([position, position], axis=1).astype(np.float32)}
    arrays = {"action": np.arange(ENVS), **record, **more}
    request.answer(Actions.KIND, fields_of(Actions(version, 77)), arrays)


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(wiring: tuple[str, ...], *overrides: str, **kwargs: Any) -> AsyncIterator[Stage]:
        walks.Walk.faults.clear()
        settings = [f"env.kwargs.{name}={value}" for name, value in kwargs.items()]
        async with rig_of(tmp_path, *wiring, *settings, *overrides) as rig:
            yield Stage(rig, wiring is GA3C)

    return made


# ── what it asks ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("truncates", [True, False])
async def test_a_question_tells_what_the_last_actions_led_to(on_stage: OnStage, truncates: bool) -> None:
    async with on_stage(SEED, length=3, truncates=str(truncates).lower()) as stage:
        assert type(stage.actor.node) is EnvActor
        said = [await stage.step(0) for _ in range(5)]
        await stage.actor.drained()
        assert stage.actor.count("env_steps") == 5 * ENVS
    acts = [parse(Act, message) for message in said]
    assert [(act.group, act.step, act.begins) for act in acts] == [(0, step, False) for step in range(5)]
    assert [message.arrays["obs"][:, 0].tolist() for message in said] == [[p, p] for p in (0, 1, 2, 0, 1)]
    assert list(said[0].arrays) == ["obs"]
    for message, reward in zip(said[1:], (1, 2, 3, 1), strict=True):
        rows, ends = message.arrays, reward == 3
        assert rows["reward"].tolist() == [reward] * ENVS
        assert rows["truncated"].tolist() == [ends and truncates] * ENVS
        assert rows["terminated"].tolist() == [ends and not truncates] * ENVS
        assert ("final_obs" in rows) is (ends and truncates)
        assert parse(Act, message).returns == [6.0] * (ENVS if ends else 0)
    if truncates:
        assert said[3].arrays["final_index"].tolist() == [0, 1]
        assert said[3].arrays["final_obs"].tolist() == [[3.0, 30.0]] * ENVS


async def test_groups_step_in_turn(on_stage: OnStage) -> None:
    """One waits for its actions for as long as it takes, the other goes on."""
    async with on_stage(SEED) as stage:
        waits = await stage.next(1)
        for step in range(6):
            assert parse(Act, await stage.step(0)).step == step
        answer(waits)
        assert parse(Act, await stage.step(1)).step == 1
        await stage.actor.drained()
        assert set(stage.actor.node.gauge()) >= {"round_trip_ms", "round_trip_p95_ms"}
        assert stage.actor.count("time", "act_wait") > 0


async def test_groups_of_all_actors_are_dealt_over_the_inference_nodes(on_stage: OnStage) -> None:
    async with on_stage(SEED, "nodes.inference.count=3") as stage:
        second = stage.rig.start("actor-1")
        asked = set()
        servers = {0: stage.server, **{n: stage.serve(1, f"inference-{n}") for n in (1, 2)}}
        for number, n in ((0, 2), (1, 1), (2, 1)):
            for _ in range(n):
                async with asyncio.timeout(20):
                    message = (await servers[number].recv()).message
                asked.add((message.node, parse(Act, message).group, number))
        await stage.actor.drained()
        await second.drained()
    assert asked == {("actor-0", 0, 0), ("actor-0", 1, 1), ("actor-1", 0, 2), ("actor-1", 1, 0)}


async def test_it_leaves_while_it_waits(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        await stage.next(0)
        await stage.actor.drained()
        assert stage.actor.node.state == "stopped"


async def test_it_asks_again_what_nobody_answered(on_stage: OnStage, monkeypatch: Any) -> None:
    monkeypatch.setattr(env_actor, "ANSWER_S", 0.05)
    async with on_stage(SEED) as stage:
        first, again = await stage.next(0), await stage.next(0)
        assert first.message.seq < again.message.seq
        assert parse(Act, first.message) == parse(Act, again.message)
        assert (first.message.arrays["obs"] == again.message.arrays["obs"]).all()
        await stage.actor.drained()


async def test_a_refusal_ends_it(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        (await stage.next(0)).refuse("no such actor")
        with pytest.raises(RemoteError, match="no such actor"):
            await stage.actor.task


# ── unrolls of its own ───────────────────────────────────────────────────────────────────────────────────────────


async def test_it_keeps_what_was_answered(on_stage: OnStage) -> None:
    """The reward of the last row before an end is in, and so is each row's version."""
    async with on_stage(GA3C, length=3, truncates="false") as stage:
        assert stage.trajectories is not None
        begins = []
        for step in range(2 * UNROLL + 1):
            request = await stage.next(0)
            begins.append(parse(Act, request.message).begins)
            answer(request, version=step)
        async with asyncio.timeout(20):
            messages = [await stage.trajectories.recv() for _ in range(2)]
        await stage.actor.drained()
        assert stage.actor.count("unfinished") in (ENVS, 2 * ENVS)  # the last answer may still have been on its way
    assert begins == [step % UNROLL == 0 for step in range(2 * UNROLL + 1)]
    for n, message in enumerate(messages):
        assert SCHEMA.check(message) is None
        steps = np.arange(n * UNROLL, (n + 1) * UNROLL)
        rows = message.arrays
        assert rows["obs"][:, 0, 0].tolist() == [step % 3 for step in (*steps, (n + 1) * UNROLL)]
        assert rows["action"].tolist() == [[0, 1]] * UNROLL
        assert rows["reward"][:, 1].tolist() == [step % 3 + 1 for step in steps]
        assert rows["terminated"][:, 1].tolist() == [step % 3 == 2 for step in steps]
        assert rows["record.policy"][:, 0, 0].tolist() == [step % 3 for step in steps]
        assert rows["version"].tolist() == steps.tolist()
    assert parse(Trajectory, messages[0]) == Trajectory(77, [6.0] * ENVS, [3] * ENVS)


async def test_no_credit_stops_a_group(on_stage: OnStage) -> None:
    """A window of two unread unrolls; the third waits, and nothing is asked for that group until one is read."""
    async with on_stage(GA3C, length=100) as stage:
        assert stage.trajectories is not None
        for _ in range(3 * UNROLL):
            await stage.step(0)
        await stage.step(1)
        assert 0 not in stage.asked
        await stage.trajectories.recv()
        await stage.step(0)
        await stage.actor.drained()


async def test_a_younger_inference_node_begins_a_new_unroll(on_stage: OnStage) -> None:
    """It cannot know what the agents carried; the actor's steps are counted on."""
    async with on_stage(GA3C, length=100) as stage:
        assert stage.trajectories is not None
        for _ in range(3):
            await stage.step(0)
        await stage.next(0)  # step 3, which it takes along
        stage.rig.buses[[bus.node for bus in stage.rig.buses].index("inference-0")].close()
        stage.asked.clear()
        stage.server = stage.serve(2)
        steps = [parse(Act, await stage.step(0)).step for _ in range(UNROLL + 1)]
        async with asyncio.timeout(20):
            message = await stage.trajectories.recv()
        await stage.actor.drained()
        assert stage.actor.count("unfinished") >= 3 * ENVS
    assert steps == [3 + n for n in range(UNROLL + 1)]
    assert message.arrays["obs"][:, 0, 0].tolist() == [3 + n for n in range(UNROLL + 1)]


# ── environments that fail ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_fault_begins_anew(on_stage: OnStage, caplog: Any) -> None:
    """Step 4 of one group fails: new environments, no outcome, and the rows before it are in no unroll."""
    async with on_stage(GA3C, length=100, fault="raise", at=4, times=1) as stage:
        assert stage.trajectories is not None
        said = [await stage.step(0) for _ in range(4 + UNROLL + 1)]
        async with asyncio.timeout(20):
            message = await stage.trajectories.recv()
        await stage.actor.drained()
        assert stage.actor.count("env_faults") == 1
    assert "fault 1 of 3 in a row: Walk-v0: environment 0, step 4" in caplog.text
    assert [parse(Act, m).step for m in said] == list(range(10))
    assert [m.arrays["obs"][0, 0] for m in said] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert ["reward" in m.arrays for m in said] == [False, True, True, True, False] + [True] * 5
    assert message.arrays["obs"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


async def test_three_faults_in_a_row_are_given_up(on_stage: OnStage) -> None:
    """Each object gets to step 2: no unroll will ever be whole."""
    async with on_stage(SEED, length=100, fault="raise", at=2) as stage:
        stage.rig.tasks.append(asyncio.create_task(stage.play(0)))
        with pytest.raises(EnvError, match="environment 0, step 2: RuntimeError: fell over"):
            await stage.actor.task
        assert stage.actor.count("env_faults") == 3


async def test_faults_an_unroll_apart_are_forgotten(on_stage: OnStage) -> None:
    async with on_stage(SEED, length=100, fault="raise", at=7) as stage:
        for _ in range(30):
            await stage.step(0)
        await stage.actor.drained()
        assert stage.actor.count("env_faults") == 4


async def test_a_fault_leaves_the_other_group_alone(on_stage: OnStage) -> None:
    async with on_stage(SEED, length=100, fault="raise", at=4, times=1) as stage:
        for _ in range(6):
            await stage.step(0)
        said = [await stage.step(1) for _ in range(6)]
        await stage.actor.drained()
    assert [m.arrays["obs"][0, 0] for m in said] == [0, 1, 2, 3, 4, 5]
