"""Unrolls whose first rows are the last ones of the unroll before: each is a slice of one long stream of rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walks
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import REPLAY, Living, Rig, eventually, publish_weights, rig_of

from ddrl_bus.algos import memory
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.envs import presets
from ddrl_bus.experience import RECORD, STATE, Unrolls, UnrollSchema, under
from ddrl_bus.messages import Actions, Trajectory, fields_of, parse
from ddrl_bus.nodes.assembly import Assembler
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Array, Message

# ── cut out of random streams ────────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Rows of N environments with random ends, and what their agents carry: `steps` of them and an observation."""

    def __init__(self, steps: int, envs: int, seed: int, ends: float) -> None:
        rng = np.random.default_rng(seed)
        self.steps, self.envs = steps, envs
        self.obs = rng.normal(size=(steps + 1, envs, 2)).astype(np.float32)
        kind = rng.choice(3, (steps, envs), p=[1 - ends, ends / 2, ends / 2])
        self.rows = {
            "action": rng.integers(0, 9, (steps, envs)),
            "reward": rng.normal(size=(steps, envs)).astype(np.float32),
            "terminated": kind == 1,
            "truncated": kind == 2,
            "record.q": rng.normal(size=(steps, envs)).astype(np.float32),
            "version": np.cumsum(rng.integers(0, 2, steps)),
        }
        self.final_obs = rng.normal(size=(steps, envs, 2)).astype(np.float32)
        self.state = {
            "h": rng.normal(size=(steps, envs, 3)).astype(np.float32),
            "frames": rng.integers(0, 255, (steps, envs, 2, 4), np.uint8),
        }
        self._carried = {name: np.empty_like(array[0]) for name, array in self.state.items()}

    def carried(self, step: int) -> dict[str, Array]:
        """In the same arrays each time, as agents have it."""
        for name, array in self.state.items():
            self._carried[name][...] = array[step]
        return self._carried

    def schema(self, new: int, overlap: int) -> UnrollSchema:
        state = {"h": ("float32", (3,)), "frames": ("uint8", (2, 4))}
        spec = ("float32", (2,)), ("int64", ()), {"q": ("float32", ())}
        return UnrollSchema(*spec, new + overlap, state, overlap, starts=new)

    def cut(self, begin: int, rows: int, priorities: Array) -> dict[str, Array]:
        """The arrays of the unroll that begins at this row."""
        now = slice(begin, begin + rows)
        truncated = self.rows["truncated"][now]
        found = {name: array[now] for name, array in self.rows.items()}
        found |= {STATE + name: array[begin] for name, array in self.state.items()}
        found |= {"obs": self.obs[begin : begin + rows + 1], "priority": priorities}
        if truncated.any():
            found |= {"final_index": np.flatnonzero(truncated), "final_obs": self.final_obs[now][truncated]}
        return found


def priorities(rows: Any, record: Any) -> Array:
    """Something of all rows: what is missing, or of another unroll, shows."""
    return np.asarray(np.flip(abs(rows["reward"] + record["q"]).cumsum(0), 0), np.float32)


Writer = Callable[[Stream, UnrollSchema, int], Iterator[tuple[Any, dict[str, Any]]]]
"""(stream, schema, step before which everything begins anew) → unrolls and their fields"""


def as_an_actor(stream: Stream, schema: UnrollSchema, anew: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Writes whole unrolls; one that breaks off is forgotten."""
    first_ones = first_rows(schema)
    for begin, end in ((0, anew), (anew, stream.steps)):
        unrolls, step = Unrolls(schema, stream.envs, first_ones), begin
        while True:
            unroll = unrolls.next()
            if step + unroll.length - unroll.first > end:
                break
            unroll.rows["obs"][unroll.first] = stream.obs[step]
            for t in range(unroll.first, unroll.length):
                unroll.carried(t, stream.carried(step))
                unroll.rows["obs"][t + 1] = stream.obs[step + 1]
                for name, array in stream.rows.items():
                    unroll.rows[name][t] = array[step]
                cut = np.flatnonzero(stream.rows["truncated"][step])
                if len(cut):
                    unroll.truncated(t, cut, stream.final_obs[step, cut])
                step += 1
            yield unroll.finish(), fields_of(Trajectory(7, [1.0], [1], unroll.first))


def step_by_step(stream: Stream, schema: UnrollSchema, anew: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """As inference nodes and actors that ask them: an assembler is told; of state only what it wants to know."""
    assembler = Assembler(Unrolls(schema, stream.envs, first_rows(schema)))
    told = 0
    for step in range(stream.steps + 1):
        played = assembler.observed(stream.obs[step])
        if played:
            yield played
        if step == anew:
            assembler.restart()
            assembler.observed(stream.obs[step])
        if step < stream.steps:
            state = {STATE + name: array for name, array in stream.carried(step).items() if assembler.begins}
            told += assembler.begins
            row = {name: stream.rows[name][step] for name in ("action", "record.q")}
            assembler.acted({**row, **state}, Actions(int(stream.rows["version"][step]), 7))
            outcome = {name: stream.rows[name][step] for name in ("reward", "terminated", "truncated")}
            cut = np.flatnonzero(outcome["truncated"])
            if len(cut):
                outcome |= {"final_index": cut, "final_obs": stream.final_obs[step, cut]}
            assembler.led_to(outcome, [], [])
    assert told <= 2 + 2 * (stream.steps // schema.starts)


def first_rows(schema: UnrollSchema) -> Any:
    return lambda rows, record: priorities(rows, record)[: schema.starts]


@pytest.mark.parametrize("writer", [as_an_actor, step_by_step])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_unrolls_are_slices_of_the_stream(writer: Writer, data: st.DataObject) -> None:
    """Also where the overlap is longer than what is new, and after everything began anew somewhere."""
    new, overlap, envs = (data.draw(st.integers(*limits)) for limits in ((1, 5), (0, 7), (1, 3)))
    steps = data.draw(st.integers(new + overlap, 40))
    anew = data.draw(st.integers(0, steps))
    stream = Stream(steps, envs, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 0.3, 0.9])))
    schema, rows = stream.schema(new, overlap), new + overlap
    begins = [
        (begin, k > 0)
        for start, end in ((0, anew), (anew, steps))
        for k, begin in enumerate(range(start, end - rows + 1, new))
    ]
    found = [wire.decode(arena.encode("actor-0", 1, 1, fields)) for arena, fields in writer(stream, schema, anew)]
    assert len(found) == len(begins)
    for message, (begin, follows) in zip(found, begins, strict=True):
        assert schema.check(message) is None
        assert parse(Trajectory, message).overlap == (overlap if follows else 0)
        expected = stream.cut(begin, rows, np.empty(0))
        expected["priority"] = first_rows(schema)(expected, under(RECORD, expected))
        assert message.arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(message.arrays[name], array, f"{name} from row {begin}")


def test_what_comes_to_nothing_is_counted_once() -> None:
    """Rows of an overlap were sent before."""
    stream = Stream(20, 2, 0, 0.0)
    schema = stream.schema(new=3, overlap=2)
    assembler = Assembler(Unrolls(schema, 2, first_rows(schema)))
    lost = []
    for step in range(20):
        if step in (4, 4 + 5, 4 + 5 + 7):
            lost.append(assembler.restart())
        assembler.observed(stream.obs[step])
        state = {STATE + name: array for name, array in stream.carried(step).items()}
        row = {name: stream.rows[name][step] for name in ("action", "record.q")}
        assembler.acted({**row, **state}, Actions(0, 7))
        assembler.led_to({name: stream.rows[name][step] for name in ("reward", "terminated", "truncated")}, [], [])
    assert lost == [4, 5, 7 - 5]  # none was sent; whole, but the observation that ends it never came; one was sent


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────

ENVS = 4
WALKS = (*REPLAY, "env.id=Walk-v0", "nodes.actor.envs=4", "links.trajectories.window=3")
DQN = (*WALKS, "env.preset=stacked")
R2D2 = (
    *(setting for setting in WALKS if "dqn" not in setting),
    *("algo.name=r2d2", "algo.burn_in=7", "algo.core=lstm", "algo.core_size=3", "algo.last_inputs=true"),
)
ASKED = (
    *("nodes.inference.kind=inference", "links.act.kind=request", "links.weights.to=[inference,evaluator]"),
    "nodes.actor.groups=1",
)
NODES = {
    "actor": ("actor-0", ()),
    "inference": ("inference-0", (*ASKED, "links.trajectories.from=inference")),
    "asking actor": ("actor-0", (*ASKED, "links.trajectories.from=actor")),
}
"""Who sends unrolls, and the wiring in which that is so."""


@pytest.fixture(autouse=True)
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset whose agents see three observations at once."""
    monkeypatch.setitem(presets.PRESETS, "stacked", presets.Preset("any", lambda _: True, stack=3))
    walks.Walk.faults.clear()


class Stage:
    """Who sends unrolls, with whom it needs for that; a test plays the learner and the replay node."""

    def __init__(self, rig: Rig, sender: str) -> None:
        self.rig = rig
        rig.fake_controller()
        self.weights = rig.publisher("learner-0", "weights")
        self.replay = rig.receiver("replay-0")
        self.nodes: list[Living] = [rig.start(name) for name in ("actor-0", "inference-0") if name in rig.plan.nodes]
        self.actor = self.nodes[0]
        self.sender = next(living for living in self.nodes if living.node.name == sender)
        node = self.node = self.sender.node
        self.net = node.algorithm(rig.plan.algo, node.spaces, seed=1).weights()
        self.publish(1)

    def publish(self, updates: int) -> None:
        """The same weights under another number."""
        publish_weights(self.weights, updates, self.net)

    async def unrolls(self, n: int) -> list[Message]:
        async with asyncio.timeout(30):
            messages = [await self.replay.recv() for _ in range(n)]
        assert [self.node.schema.check(message) for message in messages] == [None] * n
        return messages

    def joined(self, messages: list[Message]) -> dict[str, Array]:
        """The new rows of consecutive unrolls, one after the other, of which each unroll is a slice."""
        schema = self.node.schema
        news = [parse(Trajectory, message).overlap for message in messages]
        assert news == [0] + [schema.overlap] * (len(messages) - 1)
        joined = {
            name: np.concatenate([m.arrays[name][first:] for m, first in zip(messages, news, strict=True)])
            for name in (*schema.rows, "version")
        }
        obs = [m.arrays["obs"][first:-1] for m, first in zip(messages, news, strict=True)]
        joined["obs"] = np.concatenate([*obs, messages[-1].arrays["obs"][-1:]])
        for k, message in enumerate(messages):
            begin = k * (schema.unroll - schema.overlap)
            for name, array in joined.items():
                more = name == "obs"
                np.testing.assert_array_equal(message.arrays[name], array[begin : begin + schema.unroll + more], name)
        return joined

    def states(self, joined: dict[str, Array]) -> list[memory.State]:
        """What agents carried into each row, played once more from the first."""
        plan, node = self.rig.plan, self.node
        policy = make_policy(node.algorithm, plan.algo, node.spaces, 0)
        policy.load(self.net)
        state, states = policy.initial_state(ENVS), []
        for t, action in enumerate(joined["action"]):
            states.append({name: array.copy() for name, array in state.items()})
            ended = np.flatnonzero(joined["terminated"][t] | joined["truncated"][t])
            acted = policy.act(joined["obs"][t], state, None)
            state = memory.carry(acted.state, action, joined["reward"][t], ended)
        return states


@pytest.mark.parametrize("algo", [DQN, R2D2], ids=["dqn, stacked", "r2d2"])
@pytest.mark.parametrize("sender", NODES)
async def test_nodes_send_slices_of_what_they_play(tmp_path: Path, sender: str, algo: tuple[str, ...]) -> None:
    """Rows, versions, final observations, and the state of the row with which an unroll begins. R2D2's overlap is
    longer than what is new."""
    name, wiring = NODES[sender]
    async with rig_of(tmp_path, *algo, *wiring, "env.kwargs.length=6") as rig:
        stage = Stage(rig, name)
        messages = []
        for version in range(2, 8):
            messages += await stage.unrolls(1)
            stage.publish(version)
        messages += await stage.unrolls(2)
        node, schema = stage.node, stage.node.schema
        joined = stage.joined(messages)
        assert joined["obs"][:, 0, 0].tolist() == [t % 6 for t in range(len(joined["obs"]))]
        assert len(np.unique(joined["version"])) > 1
        new, states = schema.unroll - schema.overlap, stage.states(joined)
        for k, message in enumerate(messages):
            arrays = message.arrays
            assert all((obs == [6, 60]).all() for obs in arrays["final_obs"])
            carried = under(STATE, arrays)
            assert carried.keys() == states[0].keys() != set()
            for name, array in carried.items():
                np.testing.assert_array_equal(array, states[k * new][name], f"{name} of unroll {k}")
            first = node.algorithm.priorities(rig.plan.algo, arrays, under(RECORD, arrays))
            np.testing.assert_array_equal(arrays["priority"], first)
            assert arrays["priority"].shape == (schema.starts, ENVS)
        returns = [r for message in messages for r in parse(Trajectory, message).returns]
        assert returns == [21.0] * (len(joined["action"]) // 6 * ENVS)
        for living in stage.nodes:
            await living.drained()


@pytest.mark.parametrize("sender", NODES)
async def test_environments_made_anew_follow_nothing(tmp_path: Path, sender: str) -> None:
    """Step 18 fails, once: the second or the third unroll."""
    name, wiring = NODES[sender]
    faults = ("env.kwargs.length=100", "env.kwargs.fault=raise", "env.kwargs.at=18", "env.kwargs.times=1")
    async with rig_of(tmp_path, *R2D2, *wiring, *faults) as rig:
        stage = Stage(rig, name)
        messages = await stage.unrolls(6)
        overlaps = [parse(Trajectory, message).overlap for message in messages]
        assert overlaps == [0, 7, 0, 7, 7, 7]  # rows 0 to 12, 5 to 17, then new walkers
        assert [int(message.arrays["obs"][0, 0, 0]) for message in messages] == [0, 5, 0, 5, 10, 15]
        assert not any(array.any() for array in under(STATE, messages[2].arrays).values())
        stage.joined(messages[:2])
        stage.joined(messages[2:])
        for living in stage.nodes:
            await living.drained()


@pytest.mark.parametrize("sender", NODES)
async def test_steps_are_counted_once(tmp_path: Path, sender: str) -> None:
    """Every step that is counted is new in one unroll, or unfinished."""
    name, wiring = NODES[sender]
    async with rig_of(tmp_path, *R2D2, *wiring) as rig:
        stage = Stage(rig, name)
        messages = await stage.unrolls(5)
        new, schema = 5 * ENVS, stage.node.schema
        held = 5 + 3 + 1  # the last finds no room
        await eventually(lambda: stage.actor.count("env_steps") >= held * new + schema.overlap * ENVS)
        await eventually(lambda: stage.replay.queued == 3)
        for living in stage.nodes:
            await living.drained()
        messages += await stage.unrolls(stage.replay.queued)
        assert len(messages) == stage.sender.count("trajectories", "/produced")
        brought = sum(schema.unroll - parse(Trajectory, message).overlap for message in messages) * ENVS
        left = stage.actor.count("env_steps") - brought
    if sender == "actor":  # whole unrolls that nobody had room for
        assert left in (new, 2 * new)
    else:  # likewise, and the answer to the newest question may not have been played
        assert left >= new
        assert 0 <= stage.sender.count("unfinished") - left <= ENVS
