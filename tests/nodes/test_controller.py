"""A controller; a test plays all others."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import PATIENCE_S, WORKERS, Living, Rig, beat, epoch, eventually, json_of, progress_of, rig_of

from ddrl_bus.errors import FencedError, RemoteError
from ddrl_bus.messages import (
    STATUS,
    STOP,
    Control,
    Evaluation,
    Group,
    Join,
    Joined,
    Progress,
    Replica,
    fields_of,
    parse,
)
from ddrl_bus.nodes import controller as controllers
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Client
from ddrl_bus.transport.wire import Message
from ddrl_bus.versions import versions

NODES = {"actor-0": "actor", "actor-1": "actor", "learner-0": "learner", "evaluator-0": "evaluator"}
OTHERS = {"learner-1": "learner", "param_server-0": "param_server", "param_server-1": "param_server"}
OTHERS |= {"relay-0": "relay"}


class Stage:
    """A controller, and members that report when the test says so."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.clients: dict[tuple[str, int], Client] = {}
        self.controller: Living = rig.start("controller-0")
        self.control = rig.subscriber("actor-0", "control")

    async def beat(self, name: str, life: int = 1, **change: Any) -> Control:
        if (name, life) not in self.clients:
            self.clients[name, life] = self.rig.client(name, life=life)
        return await beat(self.clients[name, life], progress_of(self.rig.plan, (NODES | OTHERS)[name], **change))

    async def everybody(self, **change: Any) -> None:
        for name in NODES:
            await self.beat(name, **change)

    async def evaluated(self, mean: float, number: int, confirm: int = 0) -> Control:
        evaluation = Evaluation(mean, 20, version=1, learner_epoch=1, env_steps=40, confirm=confirm, number=number)
        return await self.beat("evaluator-0", evaluation=evaluation)

    async def said(self, phase: str, **expected: Any) -> Control:
        """The first control of this phase, and of these values, that is published."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                control = parse(Control, await self.control.next())
                if control.phase == phase and all(getattr(control, k) == v for k, v in expected.items()):
                    return control

    async def asked(self, kind: str, node: str = "people") -> Any:
        (address,) = self.rig.plan.ports("actor-0")["progress"].peers.values()
        return await self.rig.bus(node).client("progress", address).request(kind, timeout_s=PATIENCE_S)

    async def status(self) -> Any:
        return json_of(await self.asked(STATUS))

    def result(self) -> Any:
        return json.loads((self.rig.folder / "result.json").read_text())


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *overrides) as rig:
            stage = Stage(rig)
            await stage.said("run")
            yield stage

    return made


REWARD = "stop.reward=475"

# ── confirm, resume ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_reward_is_confirmed_then_everybody_drains(on_stage: OnStage) -> None:
    async with on_stage(REWARD) as stage:
        await stage.everybody()
        await stage.evaluated(474.9, number=1)
        await stage.evaluated(475.0, number=2)
        asked = await stage.said("confirm", reason="reward")
        assert asked.confirm > 0
        await stage.evaluated(480.0, number=3, confirm=asked.confirm)
        await stage.said("drain", reason="reward", draining=["actor-0", "actor-1", "evaluator-0"])


async def test_a_reward_that_does_not_hold_goes_on(on_stage: OnStage) -> None:
    async with on_stage(REWARD) as stage:
        await stage.everybody()
        await stage.evaluated(500.0, number=1)
        first = await stage.said("confirm")
        await stage.evaluated(440.0, number=2, confirm=first.confirm)
        await stage.said("run")
        assert (await stage.evaluated(440.0, number=2, confirm=first.confirm)).phase == "run"  # told twice, heard once
        await stage.evaluated(490.0, number=3)
        second = await stage.said("confirm")
        assert second.confirm == first.confirm + 1
        await stage.evaluated(500.0, number=4, confirm=first.confirm)  # of the earlier confirmation
        await asyncio.sleep(2 * controllers.TICK_S)
        assert (await stage.status())["phase"] == "confirm"
        await stage.evaluated(475.0, number=5, confirm=second.confirm)
        await stage.said("drain", reason="reward")


async def test_a_confirmation_that_did_not_hold_is_written_once_and_confirms_nothing(on_stage: OnStage) -> None:
    async with on_stage(REWARD) as stage:
        await stage.everybody()
        await stage.evaluated(500.0, number=1)
        first = await stage.said("confirm")
        await stage.evaluated(440.0, number=2, confirm=first.confirm)
        await stage.said("run")
        for _ in range(2):  # as heartbeats do
            await stage.evaluated(440.0, number=2, confirm=first.confirm)
        assert stage.controller.node.confirmed is None
        lines = (stage.rig.folder / "metrics.jsonl").read_text().splitlines()
        assert [(json.loads(line)["evaluation"] or {}).get("number") for line in lines].count(2) == 1


async def test_spent_steps_are_confirmed_whatever_they_are_worth(on_stage: OnStage) -> None:
    async with on_stage(REWARD, "stop.steps=100") as stage:
        await stage.everybody()
        await stage.beat("learner-0", done="steps")
        asked = await stage.said("confirm", reason="steps")
        await stage.evaluated(100.0, number=1, confirm=asked.confirm)
        await stage.said("drain", reason="steps")


async def test_the_clock_ends_a_run(on_stage: OnStage) -> None:
    async with on_stage("stop.time=300ms") as stage:
        await stage.everybody()
        await stage.said("confirm", reason="time")


async def test_without_an_evaluator_nothing_is_confirmed(on_stage: OnStage) -> None:
    async with on_stage("stop.steps=100") as stage:
        await stage.beat("learner-0", done="steps")
        await stage.said("drain", reason="steps")


async def test_an_evaluation_that_never_comes_is_not_waited_for(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controllers, "CONFIRM_S", 0.2)
    async with on_stage("stop.steps=100") as stage:
        await stage.everybody()
        await stage.beat("learner-0", done="steps")
        await stage.said("confirm")
        await stage.said("drain", reason="steps")


async def test_a_new_life_asks_with_a_number_that_was_never_used(on_stage: OnStage) -> None:
    async with on_stage(REWARD) as stage:
        await stage.everybody()
        await stage.evaluated(500.0, number=1)
        before = await stage.said("confirm")
        stage.controller.task.cancel()
        await asyncio.gather(stage.controller.task, return_exceptions=True)
        stage.controller = stage.rig.start("controller-0", life=2)
        await stage.said("run")
        await stage.everybody()
        await stage.evaluated(500.0, number=2)
        assert (await stage.said("confirm")).confirm > before.confirm


# ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_controller_tells_of_the_group_that_it_takes_over(on_stage: OnStage) -> None:
    async with on_stage("nodes.learner.count=2") as stage:
        group = Group(3, {"learner-1": epoch(1), "learner-0": epoch(1)}, "127.0.0.1:1")
        for name in group.members:
            await stage.beat(name, replica=Replica("127.0.0.1:1", group))
        assert await stage.said("run", group=group)
        assert (await stage.beat("actor-0")).group == group


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sources_drain_before_sinks(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.everybody()
        answer = parse(Control, await stage.asked(STOP))
        assert (answer.phase, answer.reason) == ("drain", "stop")
        sources = ["actor-0", "actor-1", "evaluator-0"]
        assert answer.draining == sources
        await stage.beat("actor-0", state="stopped")
        await stage.beat("evaluator-0", state="failed")
        await stage.beat("actor-1", state="draining")
        await asyncio.sleep(2 * controllers.TICK_S)
        assert (await stage.beat("actor-1", state="draining")).draining == sources
        await stage.beat("actor-1", state="stopped")
        await stage.said("drain", draining=[*sources, "learner-0"])
        assert not stage.controller.task.done()
        await stage.beat("learner-0", state="stopped")
        async with asyncio.timeout(PATIENCE_S):
            await stage.controller.task
        assert stage.result()["reason"] == "stop"


async def test_a_relay_drains_between_its_subscribers_and_the_learner(on_stage: OnStage) -> None:
    hosts = ("hosts.a=127.0.0.1", "hosts.b=127.0.0.2", "nodes.actor.host=[b]", "nodes.evaluator.host=[b]")
    async with on_stage(*hosts) as stage:
        names = ["actor-0", "actor-1", "evaluator-0", "relay-0", "learner-0"]
        for name in names:
            await stage.beat(name)
        assert parse(Control, await stage.asked(STOP)).draining == names[:3]
        for name in names[:2]:
            await stage.beat(name, state="stopped")
        assert (await stage.beat("relay-0")).draining == names[:3]
        await stage.beat("evaluator-0", state="stopped")
        await stage.said("drain", draining=names[:4])
        await stage.beat("relay-0", state="stopped")
        await stage.said("drain", draining=names)


async def test_a_parameter_server_drains_after_its_workers(on_stage: OnStage) -> None:
    async with on_stage(*WORKERS) as stage:
        names = ["actor-0", "actor-1", "evaluator-0", "learner-0", "learner-1", "param_server-0"]
        for name in names:
            await stage.beat(name)
        assert parse(Control, await stage.asked(STOP)).draining == names[:3]
        for name in names[:4]:
            await stage.beat(name, state="stopped")
        assert (await stage.beat("learner-1", state="draining")).draining == names[:5]
        await stage.beat("learner-1", state="stopped")
        await stage.said("drain", draining=names)
        await stage.beat("param_server-0", state="stopped", gauges={"updates": 9.0, "first_update_at": 1e9})
        async with asyncio.timeout(PATIENCE_S):
            await stage.controller.task
        assert stage.result()["updates"] == 9


async def test_the_silent_are_not_waited_for(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "DEAD_S", 0.3)
    async with on_stage() as stage:
        await stage.everybody()
        await stage.asked(STOP)
        async with asyncio.timeout(PATIENCE_S):
            await stage.controller.task


async def test_a_late_comer_is_told_to_leave(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.beat("learner-0")
        await stage.asked(STOP)
        late = await stage.beat("actor-1", state="starting")
        assert "actor-1" in late.draining


async def test_stop_drains_too(on_stage: OnStage) -> None:
    """A signal to the controller alone: everybody leaves before it does."""
    async with on_stage() as stage:
        await stage.everybody()
        stage.controller.stop.set()
        await stage.said("drain", reason="stop")
        for name in NODES:
            await stage.beat(name, state="stopped")
        async with asyncio.timeout(PATIENCE_S):
            await stage.controller.task


# ── who belongs here ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_another_topology_is_refused(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        with pytest.raises(
            RemoteError, match=r"actor-0 runs topology 0123, this is rig .*start every host from the same"
        ):
            await stage.beat("actor-0", topology="0123")
        assert (await stage.status())["nodes"]["actor-0"]["state"] == "unheard"


async def test_an_unknown_node_is_refused(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        (address,) = stage.rig.plan.ports("actor-0")["progress"].peers.values()
        stranger = stage.rig.bus("actor-9").client("progress", address)
        with pytest.raises(RemoteError, match="actor-9 runs topology"):
            await beat(stranger, progress_of(stage.rig.plan, "actor"))


async def test_an_older_life_is_fenced(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.beat("actor-0", life=1)
        await stage.beat("actor-0", life=2, pid=22)
        with pytest.raises(FencedError, match="controller-0: a newer life of actor-0 is here"):
            await stage.beat("actor-0", life=1)
        assert (await stage.status())["nodes"]["actor-0"]["pid"] == 22


async def test_another_version_of_the_package_is_named(on_stage: OnStage, caplog: Any) -> None:
    async with on_stage() as stage:
        await stage.beat("actor-0", package="9.9.9")
    assert "actor-0 runs ddrl_bus 9.9.9" in caplog.text


@pytest.mark.parametrize("kind", ["explode", "_probe", ""])
async def test_an_unknown_request_is_refused(on_stage: OnStage, kind: str) -> None:
    async with on_stage() as stage:
        with pytest.raises(RemoteError, match="unknown request"):
            await stage.asked(kind)


async def test_a_report_that_is_none_is_refused(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        with pytest.raises(RemoteError, match="fields: progress"):
            await stage.asked(Progress.KIND, node="actor-1")
        await stage.beat("actor-0")


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_status(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.beat("actor-0", counters={"env_steps": 640}, gauges={"version": 3.0}, pid=77, host="cpu1")
        await stage.beat("actor-1", counters={"env_steps": 320})
        await stage.beat("learner-0", gauges={"updates": 12.0})
        await stage.evaluated(99.5, number=1)
        await stage.evaluated(66.0, number=2)
        status = await stage.status()
    assert {key: status[key] for key in ("name", "run_id", "seed", "phase", "env_steps", "updates")} == {
        "name": "rig",
        "run_id": stage.rig.plan.run_id,
        "seed": 3,
        "phase": "run",
        "env_steps": 960,
        "updates": 12,
    }
    assert (status["return"], status["best_return"]) == (66.0, 99.5)
    assert status["nodes"].keys() == {*NODES, "controller-0"}
    actor = status["nodes"]["actor-0"]
    assert {key: actor[key] for key in ("role", "pid", "host", "state", "gauges", "error", "epoch")} == {
        "role": "actor",
        "pid": 77,
        "host": "cpu1",
        "state": "running",
        "gauges": {"version": 3.0},
        "error": None,
        "epoch": f"{1 << 32 | 7:016x}",
    }
    assert status["nodes"]["controller-0"]["state"] == "running"


async def test_a_parameter_server_knows_how_far_the_run_is(on_stage: OnStage) -> None:
    async with on_stage(*WORKERS) as stage:
        for name in ("learner-0", "learner-1"):
            await stage.beat(name, gauges={"updates": 5.0, "first_update_at": 1.0})
        await stage.beat("param_server-0", gauges={"updates": 7.0})
        assert (await stage.status())["updates"] == 7
        await stage.beat("param_server-0", done="steps")
        await stage.said("drain", reason="steps")


async def test_of_several_parameter_servers_the_furthest_says_how_far_the_run_is(on_stage: OnStage) -> None:
    """Every gradient concerns each of them: their figures are not added up."""
    async with on_stage(*WORKERS, "nodes.param_server.count=2") as stage:
        await stage.beat("param_server-0", gauges={"updates": 7.0, "first_update_at": 1.0})
        await stage.beat("param_server-1", gauges={"updates": 9.0})
        assert (await stage.status())["updates"] == 9
        await stage.beat("evaluator-0")
        await stage.beat("param_server-1", done="steps")
        asked = await stage.said("confirm", reason="steps")
        await stage.evaluated(90.0, number=1, confirm=asked.confirm)
        await stage.said("drain", reason="steps")


async def test_steps_of_dead_lives_count(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.beat("actor-0", life=1, counters={"env_steps": 640})
        await stage.beat("actor-0", life=2, counters={"env_steps": 100})
        assert (await stage.status())["env_steps"] == 740


async def test_steps_of_before_the_controller_died_count(on_stage: OnStage) -> None:
    """Also those of nodes that are gone by then: their ledgers are in the run directory."""
    async with on_stage() as stage:
        Ledger(stage.rig.folder / "ledger" / "actor-0@0000000100000001.page").counter("env_steps").add(640)
        (stage.rig.folder / "ledger" / "actor-1@0000000100000001.json").write_text('{"env_steps": 60}')
        stage.controller.task.cancel()
        await asyncio.gather(stage.controller.task, return_exceptions=True)
        stage.controller = stage.rig.start("controller-0", life=2)
        await stage.said("run")
        await stage.beat("actor-0", life=2, counters={"env_steps": 7})
        assert (await stage.status())["env_steps"] == 707


async def test_a_new_life_tells_how_the_last_one_ended(on_stage: OnStage) -> None:
    """Only of itself, and by names that are no paths."""
    async with on_stage() as stage:
        await stage.beat("actor-0", life=1, counters={"env_steps": 600})
        dead = f"actor-0@{1 << 32 | 7:016x}"
        told = {
            dead: {"env_steps": 640},
            "actor-1@0000000000000001": {"env_steps": 1},
            "actor-0@../x": {"env_steps": 1},
        }
        await stage.beat("actor-0", life=2, counters={"env_steps": 60}, earlier=told)
        assert (await stage.status())["env_steps"] == 700
        actors = {life for life in stage.controller.node.lives if life.startswith("actor")}
        assert actors == {dead, f"actor-0@{2 << 32 | 7:016x}"}


async def test_a_loss_that_is_no_number_ends_nothing(on_stage: OnStage) -> None:
    """Gauges that JSON cannot say are null, in the metrics and in the status."""
    async with on_stage() as stage:
        gauges = {"first_update_at": 1.0, "loss": float("nan"), "grad_norm": float("inf")}
        await stage.everybody(gauges=gauges)
        metrics = stage.rig.folder / "metrics.jsonl"
        await eventually(lambda: metrics.exists() and metrics.read_text())
        for nodes in (json.loads(metrics.read_text().splitlines()[0])["nodes"], (await stage.status())["nodes"]):
            said = nodes["learner-0"].get("gauges", nodes["learner-0"])
            assert said == {"first_update_at": 1.0, "loss": None, "grad_norm": None}
        assert not stage.controller.task.done()


async def test_the_result_and_the_books_of_every_life(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.everybody()
        await stage.evaluated(321.0, number=1)
        await stage.beat("actor-1", life=2, counters={"env_steps": 50, "time/env": 75, "time/pack": 25})
        await stage.asked(STOP)
        for name in NODES:
            if name != "actor-1":
                await stage.beat(name, state="stopped", counters={"env_steps": 7} if name == "actor-0" else {})
        await stage.beat(
            "actor-1", life=2, state="stopped", counters={"env_steps": 60, "time/env": 75, "time/pack": 25}
        )
        async with asyncio.timeout(PATIENCE_S):
            await stage.controller.task
    result = stage.result()
    assert (result["reason"], result["return"], result["confirmed"]) == ("stop", 321.0, False)
    assert (result["env_steps"], result["seed"]) == (67, 3)
    assert result["overhead"]["actor-1"] == pytest.approx(0.25)
    told = {path.stem: json.loads(path.read_text()) for path in (stage.rig.folder / "ledger").glob("*.json")}
    assert told[f"actor-1@{2 << 32 | 7:016x}"]["env_steps"] == 60
    assert len(told) == 5


async def test_metrics_begin_with_the_first_update(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.everybody()
        await asyncio.sleep(3 * controllers.TICK_S)
        metrics = stage.rig.folder / "metrics.jsonl"
        assert metrics.read_text() == ""
        await stage.beat("learner-0", gauges={"first_update_at": 5.0})
        await eventually(metrics.read_text)
        assert np.isfinite(json.loads(metrics.read_text().splitlines()[0])["time"])


async def test_status_counts_the_bytes_of_each_link_over_all_lives(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.beat("learner-0", counters={"trajectories/bytes_in": 700})
        await stage.beat("learner-0", life=2, counters={"trajectories/bytes_in": 30})
        links = (await stage.status())["links"]
    assert links["trajectories"]["bytes_in"] == 730
    assert links["trajectories"]["terms"].startswith("queue, window ")
    assert links["progress"]["bytes_in"] > 0  # at the controller itself
    assert links["weights"] == {"terms": "latest, float16", "bytes_in": 0}


async def test_status_names_the_hosts_that_any_node_has_shut_out(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        counters = {"security/cpu2/quarantined": 1, "security/cpu1/quarantined": 0, "security/denied": 4}
        await stage.beat("learner-0", counters=counters)
        status = await stage.status()
        assert status["quarantined"] == ["cpu2"]
        assert status["nodes"]["learner-0"]["counters"] == counters


# ── joining ──────────────────────────────────────────────────────────────────────────────────────────────────────

TWO_HOSTS = ("hosts={a: 127.0.0.1:27077, b: 127.0.0.1:27177}", "nodes.actor.host=b")


async def join(stage: Stage, **wanted: str) -> Message:
    (address,) = stage.rig.plan.ports("actor-0")["progress"].peers.values()
    client = stage.rig.bus(f"people-{len(stage.rig.buses)}").client("progress", address)
    return await client.request(Join.KIND, fields_of(Join({"torch": "0"}, **wanted)), timeout_s=PATIENCE_S)


async def test_who_joins_gets_the_topology_and_the_lives_that_went_before(on_stage: OnStage) -> None:
    async with on_stage(*TWO_HOSTS) as stage:
        await stage.beat("actor-1", life=2)
        await stage.beat("actor-1", life=2, state="stopped")
        await stage.beat("learner-0", life=3)
        answer = await join(stage, host="b")
        process = await join(stage, process="actor-0")
    joined, text = parse(Joined, answer), bytes(answer.arrays["topology"])
    assert text.decode() == stage.rig.plan.lock()
    assert joined.digest == hashlib.sha256(text).hexdigest()
    assert joined.versions == versions()
    assert (joined.lives.keys(), joined.present) == ({"actor-1"}, [])
    assert parse(Joined, process).lives == {}


async def test_who_joins_hears_who_is_there_already(on_stage: OnStage) -> None:
    async with on_stage(*TWO_HOSTS) as stage:
        await stage.beat("actor-1")
        assert parse(Joined, await join(stage, host="b")).present == ["actor-1"]
        assert parse(Joined, await join(stage, process="actor-1")).present == ["actor-1"]
        assert parse(Joined, await join(stage, process="actor-0")).present == []


async def test_nobody_joins_a_run_that_ends(on_stage: OnStage) -> None:
    async with on_stage(*TWO_HOSTS) as stage:
        await stage.beat("actor-1")
        await stage.asked(STOP)
        with pytest.raises(RemoteError, match=r"is ending \(stop\)"):
            await join(stage, host="b")


async def test_a_join_that_makes_no_sense_is_refused(on_stage: OnStage) -> None:
    async with on_stage(*TWO_HOSTS) as stage:
        with pytest.raises(RemoteError, match="fields: join"):
            await stage.asked(Join.KIND)
