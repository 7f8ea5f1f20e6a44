"""An evaluator plays pinned versions; a test plays learner and controller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import walks
from rig import REPLAY, WORKERS, FakeController, Living, Rig, eventually, make_plan, net, publish_weights, rig_of

from ddrl_bus import envs
from ddrl_bus.algos import algorithm
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.checkpoint import Checkpoint
from ddrl_bus.messages import Evaluation
from ddrl_bus.nodes.evaluator import evaluate, play
from ddrl_bus.nodes.shards import parts
from ddrl_bus.transport.links import Publisher


class Stage:
    def __init__(self, rig: Rig, servers: Sequence[str] = ()) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.weights: Publisher = rig.publisher("learner-0", "weights")
        self.servers = [rig.publisher(name, "parameters") for name in servers]
        self.evaluator: Living = rig.start("evaluator-0")

    async def evaluation(self, number: int) -> Evaluation:
        """The report of this number."""

        def told() -> Evaluation | None:
            said = [progress.evaluation for progress in self.controller.heard.get("evaluator-0", [])]
            return next((e for e in said if e is not None and e.number == number), None)

        found: Evaluation = await eventually(told, f"evaluation {number}")
        return found


def leaning(action: int) -> dict[str, np.ndarray]:
    """Weights that always take `action`."""
    arrays = net()
    arrays["policy.bias"][action] = 10.0
    return arrays


async def test_a_report_names_the_weights_that_were_played(tmp_path: Path) -> None:
    async with rig_of(tmp_path) as rig:
        stage = Stage(rig)
        publish_weights(stage.weights, 7, leaning(0), env_steps=280)
        found = await stage.evaluation(1)
        assert (found.version, found.learner_epoch, found.env_steps) == (7, 1 << 32 | 7, 280)
        assert (found.episodes, found.confirm) == (2, 0)
        assert 8 <= found.mean_return <= 11  # a cart that is pushed one way only drops its pole after so many steps
        await stage.evaluator.drained()


async def test_with_a_parameter_server_its_parameters_are_played(tmp_path: Path) -> None:
    async with rig_of(tmp_path, *WORKERS) as rig:
        controller = rig.fake_controller()
        publish_weights(rig.publisher("param_server-0", "parameters"), 7, leaning(0))
        evaluator = rig.start("evaluator-0")
        await eventually(lambda: (said := controller.last("evaluator-0")) and said.evaluation)
        assert evaluator.node.evaluation.version == 7
        await evaluator.drained()


async def test_of_several_parameter_servers_the_newest_parts_are_played_together(tmp_path: Path) -> None:
    async with rig_of(tmp_path, *WORKERS, "nodes.param_server.count=2", "nodes.evaluator.every=0s") as rig:
        stage = Stage(rig, ["param_server-0", "param_server-1"])
        ours, others = ({name: leaning(0)[name] for name in names} for names in parts(net(), 2))
        publish_weights(stage.servers[0], 7, ours, env_steps=280)
        await asyncio.sleep(0.1)
        assert stage.evaluator.node.played == 0  # half a network is none
        publish_weights(stage.servers[1], 5, others, env_steps=200)
        found = await stage.evaluation(1)
        assert (found.version, found.env_steps) == (5, 200)
        assert 8 <= found.mean_return <= 11
        publish_weights(stage.servers[1], 8, others)
        assert (await stage.evaluation(2)).version == 7  # the other one's is the newest there is
        await stage.evaluator.drained()


async def test_a_confirmation_waits_for_every_part(tmp_path: Path) -> None:
    async with rig_of(tmp_path, *WORKERS, "nodes.param_server.count=2", "nodes.evaluator.every=1h") as rig:
        stage = Stage(rig, ["param_server-0", "param_server-1"])
        ours, others = ({name: leaning(0)[name] for name in names} for names in parts(net(), 2))
        publish_weights(stage.servers[0], 1, ours)
        publish_weights(stage.servers[1], 1, others)
        publish_weights(stage.servers[1], 2, others, confirm=4)
        await asyncio.sleep(0.1)
        assert stage.evaluator.node.played == 0
        publish_weights(stage.servers[0], 3, ours, confirm=4)
        found = await stage.evaluation(1)
        assert (found.confirm, found.version) == (4, 2)
        await stage.evaluator.drained()


async def test_new_weights_during_an_evaluation_change_nothing(tmp_path: Path) -> None:
    """A version is pinned: played whole, whatever comes meanwhile; the newest follows."""
    async with rig_of(tmp_path, "nodes.evaluator.every=0s") as rig:
        stage = Stage(rig)
        publish_weights(stage.weights, 1)
        versions = [(await stage.evaluation(1)).version]
        for number in range(2, 5):
            publish_weights(stage.weights, number * 10)
            publish_weights(stage.weights, number * 10 + 1)
            versions.append((await stage.evaluation(number)).version)
        await stage.evaluator.drained()
    assert versions == [1, 21, 31, 41]


async def test_what_the_controller_wants_confirmed_is_played_at_once(tmp_path: Path) -> None:
    async with rig_of(tmp_path, "nodes.evaluator.every=1h") as rig:
        stage = Stage(rig)
        publish_weights(stage.weights, 1)
        publish_weights(stage.weights, 2)
        await asyncio.sleep(0.1)
        assert stage.evaluator.node.played == 0
        stage.weights.publish(9, *_confirming(3))
        found = await stage.evaluation(1)
        assert (found.confirm, found.version) == (5, 3)
        await stage.evaluator.drained()


def _confirming(updates: int):
    from ddrl_bus.messages import Weights, fields_of
    from ddrl_bus.transport.wire import Arena

    return Arena.of(Weights.KIND, net()), fields_of(Weights(env_steps=updates * 40, updates=updates, confirm=5))


@pytest.mark.parametrize("publishes", [True, False])
async def test_drains_at_any_time(tmp_path: Path, publishes: bool) -> None:
    async with rig_of(tmp_path, "nodes.evaluator.every=0s") as rig:
        stage = Stage(rig)
        if publishes:
            publish_weights(stage.weights, 1)
            await stage.evaluation(1)
        await stage.evaluator.running()
        await stage.evaluator.drained()
        assert stage.evaluator.node.state == "stopped"


# ── play ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def policy_of(config: envs.EnvConfig, arrays: dict[str, np.ndarray]):
    impala = algorithm("impala")
    policy = make_policy(impala, impala.Config(hidden=(8,)), envs.describe(config), seed=1)
    policy.load(arrays)
    return policy


def test_one_episode_of_each_environment() -> None:
    walks.Walk.faults.clear()
    config = envs.EnvConfig("Walk-v0", {"length": 3})
    arrays = net() | {"torso.0.weight": np.zeros((8, 2), np.float32)}
    assert play(policy_of(config, arrays), config, 5, np.random.SeedSequence(1)) == [1.0 + 2 + 3] * 5


def test_the_same_seed_plays_the_same_and_another_does_not() -> None:
    config = envs.EnvConfig("CartPole-v1")
    returns = [play(policy_of(config, leaning(1)), config, 20, np.random.SeedSequence(s)) for s in (1, 1, 2)]
    assert returns[0] == returns[1] != returns[2]


@pytest.mark.parametrize(("env_steps", "explores"), [(100, True), (10_000, False)])
async def test_exploration_has_faded_as_far_as_the_weights_have_come(
    tmp_path: Path, env_steps: int, explores: bool
) -> None:
    fading = ("algo.epsilon=0.0", "algo.epsilon_steps=10000", "nodes.evaluator.greedy=false")
    async with rig_of(tmp_path, *REPLAY, *fading, "nodes.evaluator.episodes=20", "nodes.evaluator.every=0s") as rig:
        stage = Stage(rig)
        network = algorithm("dqn")(rig.plan.algo, envs.describe(envs.EnvConfig("CartPole-v1")), seed=1)
        arrays = {name: np.zeros_like(array) for name, array in network.weights().items()}
        arrays["q.bias"][0] = 1.0
        publish_weights(stage.weights, 1, arrays, env_steps=env_steps)
        assert ((await stage.evaluation(1)).mean_return > 12) == explores  # else it leans to one side, and falls
        await stage.evaluator.drained()


def test_evaluate_plays_the_network_of_a_checkpoint(tmp_path: Path) -> None:
    arrays = {f"net.{name}": array for name, array in leaning(0).items()} | {"counters": np.array([3, 120])}
    saved = Checkpoint(120, arrays, {"env_steps": 120, "updates": 3})
    found = evaluate(make_plan(tmp_path), saved, episodes=4, seed=9)
    assert {key: found[key] for key in ("episodes", "env_steps", "updates", "seed")} == {
        "episodes": 4,
        "env_steps": 120,
        "updates": 3,
        "seed": 9,
    }
    assert 8 <= found["min"] <= found["return"] <= found["max"] <= 11
    assert evaluate(make_plan(tmp_path), saved, episodes=4, seed=9) == found


@pytest.mark.parametrize("greedy", ["true", "false"])
def test_evaluate_plays_as_the_evaluator_of_the_run_does(tmp_path: Path, greedy: str) -> None:
    """Leaning a little to one side, the likeliest action is always the same, and a pole falls within 11 steps."""
    arrays = {f"net.{name}": array for name, array in leaning(0).items()}
    arrays["net.policy.bias"] = np.array([0.1, 0.0], np.float32)
    saved = Checkpoint(120, arrays, {"env_steps": 120, "updates": 3})
    found = evaluate(make_plan(tmp_path, f"nodes.evaluator.greedy={greedy}"), saved, episodes=20, seed=9)
    assert (found["max"] <= 11) == (greedy == "true")
