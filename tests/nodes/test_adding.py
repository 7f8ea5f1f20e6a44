"""What a controller makes of nodes that are added to its run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rig import PATIENCE_S, Rig, beat, eventually, json_of, progress_of, rig_of

from ddrl_bus.errors import RemoteError
from ddrl_bus.messages import STATUS, Control, Join, Joined, fields_of, parse
from ddrl_bus.transport.links import Client
from ddrl_bus.versions import versions


def people(rig: Rig) -> Client:
    """Somebody who asks, under a name of their own."""
    (address,) = rig.plan.ports("actor-0")["progress"].peers.values()
    return rig.bus(f"people-{len(rig.buses)}").client("progress", address)


async def join(rig: Rig, count: int = 1, group: str = "actor", host: str = "cpu7") -> list[str]:
    wanted = Join(versions(), host=host, group=group, count=count)
    answer = await people(rig).request(Join.KIND, fields_of(wanted), timeout_s=PATIENCE_S)
    return parse(Joined, answer).added


async def test_no_name_is_given_twice_whoever_asks_and_whichever_controller(tmp_path: Path) -> None:
    async with rig_of(tmp_path) as rig:
        controller = rig.start("controller-0")
        one, other = await asyncio.gather(join(rig, 2), join(rig, 3, host="cpu8"))
        names = [*one, *other]
        assert len(set(names)) == 5
        assert {name.partition(".")[0] for name in names} == {f"actor-{2 + number}" for number in range(5)}
        await controller.drained()
        rig.start("controller-0", life=2)
        # One that came under a name of its own, from a host that has the topology.
        await beat(rig.client("actor-9.cpu1"), progress_of(rig.plan, "actor"))
        assert await join(rig, 1) == ["actor-10.cpu7"]


async def test_they_drain_with_their_kind_and_leave_on_their_own(tmp_path: Path) -> None:
    async with rig_of(tmp_path) as rig:
        controller = rig.start("controller-0")
        first, second = await join(rig, 2)
        clients = {name: rig.client(name) for name in (first, second, "learner-0")}
        roles = {first: "actor", second: "actor", "learner-0": "learner"}

        async def says(name: str, **change: object) -> Control:
            return await beat(clients[name], progress_of(rig.plan, roles[name], **change))

        for name in clients:
            await says(name)
        await says(first, state="stopped", counters={"env_steps": 40})
        status = json_of(await people(rig).request(STATUS, timeout_s=PATIENCE_S))
        assert status["added"] == {"here": 1, "left": 1, "lost": 0}
        assert first not in status["nodes"]
        assert status["nodes"][second]["state"] == "running"
        assert status["env_steps"] == 40

        controller.stop.set()
        await eventually(lambda: controller.node.control.phase == "drain")
        assert {second, "actor-0"} <= set((await says(second)).draining)
        assert first not in controller.node.control.draining
        assert "learner-0" not in controller.node.control.draining
        with pytest.raises(RemoteError, match="is ending"):
            await join(rig)
        await says(second, state="stopped")
        await eventually(lambda: "learner-0" in controller.node.control.draining)
        await says("learner-0", state="stopped")
        async with asyncio.timeout(PATIENCE_S):
            await controller.task


@pytest.mark.parametrize(
    ("count", "group", "host", "why"),
    [
        (1, "learner", "cpu7", "only actors"),
        (0, "actor", "cpu7", "got 0 on host 'cpu7'"),
        (1 << 40, "actor", "cpu7", "4,096 actors in all at most"),
        (1, "actor", "no/host", "got 1 on host 'no/host'"),
        (1, "actor", "x" * 60, "at most 64 characters"),
    ],
)
async def test_what_is_refused(tmp_path: Path, count: int, group: str, host: str, why: str) -> None:
    async with rig_of(tmp_path) as rig:
        rig.start("controller-0")
        with pytest.raises(RemoteError, match=why):
            await join(rig, count, group, host)
        assert await join(rig) == ["actor-2.cpu7"]
