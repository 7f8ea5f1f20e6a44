"""What may be added to a run, from where, and what it is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddrl_bus.errors import UsageError
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.nodes.access import access_of
from ddrl_bus.nodes.base import number_of, places
from ddrl_bus.topology import Plan, load
from ddrl_bus.topology.exposure import unlisted

TOPOLOGY = """
name: t
env: {id: CartPole-v1}
algo: {name: impala}
hosts: {gpu0: 10.0.0.1, spare: 10.0.0.2}
nodes:
  actor: {count: 2, envs: 16}
  slow: {kind: actor, envs: 4}
  learner: {}
links:
  trajectories: {kind: queue, from: [actor, slow], to: learner, window: 2}
  weights: {kind: latest, from: learner, to: [actor, slow, evaluator]}
"""


def plan_of(tmp_path: Path, *overrides: str) -> Plan:
    path = tmp_path / "t.yaml"
    path.write_text(TOPOLOGY)
    return load(path, overrides=overrides, catalog=catalog(starts=False), environ={})


def test_a_name_says_what_an_added_node_is(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    node = plan.node(plan.name_added("slow", 3, "cpu7.lan"))
    assert (node.name, node.group, node.index, node.host) == ("slow-4.cpu7.lan", "slow", 4, "cpu7.lan")
    assert node.options is plan.groups["slow"]
    assert plan.process("slow-4.cpu7.lan") == (node,)
    assert node.name not in plan.nodes


@pytest.mark.parametrize(
    "name",
    [
        *(
            "actor-1.spare",
            "actor-02.spare",
            "actor-9999.spare",
            "actor-2",
            "actor-2.",
            "actor-2.a/b",
            "actor--2.spare",
        ),
        *("learner-1.spare", "nobody-2.spare", f"actor-2.{'x' * 63}", "actor-2.spare\n", "actor-٢.spare"),
    ],
)
def test_what_is_no_name_of_one(tmp_path: Path, name: str) -> None:
    assert plan_of(tmp_path).added(name) is None


@pytest.mark.parametrize(
    ("overrides", "group", "why"),
    [
        ([], "learner", "learner is of kind learner; only actors"),
        ([], "actr", r"no group 'actr' with nodes; expected one of actor, slow; did you mean 'actor'\?"),
        (["nodes.slow.count=0", "links.trajectories.from=actor"], "slow", "no group 'slow' with nodes"),
        (["links.trajectories.max_lag=0", "links.trajectories.window=1", "algo.batch=36"], "actor", "is in lock-step"),
        (
            [*(f"nodes.{group}.bundle=b" for group in ("learner", "slow")), "nodes.slow.count=1"],
            "slow",
            "shares processes with all of bundle b",
        ),
    ],
)
def test_groups_that_are_what_the_plan_says(tmp_path: Path, overrides: list[str], group: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(plan_of(tmp_path, *overrides).why_fixed(group))


def test_a_listed_host_without_nodes_is_listed_for_what_is_added_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    ports = plan.ports("actor-2.spare")
    addresses = [address for port in ports.values() for address in port.peers.values()]
    assert len(addresses) == 4  # trajectories, weights, progress, control
    assert all(address.startswith("tcp://10.0.0.1:") for address in addresses)
    assert not any(port.binds for port in ports.values())
    near = plan.ports("actor-2.gpu0")
    assert all(address.startswith("ipc://") for port in near.values() for address in port.peers.values())


def test_without_such_a_host_nobody_reaches_the_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "hosts={gpu0: 10.0.0.1}")
    with pytest.raises(
        UsageError, match="learner-0 binds trajectories for its own machine only; for actors of cpu7 list"
    ):
        plan.ports("actor-2.cpu7")


def test_only_listed_hosts_have_rights_on_encrypted_links(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert unlisted(plan, "actor-2.spare") == unlisted(plan_of(tmp_path, "insecure=true"), "actor-2.cpu7") == []
    assert set(unlisted(plan, "actor-2.cpu7")) == {"trajectories", "weights", "progress", "control"}
    access = access_of(plan, "learner-0")
    assert access.hosts == {"gpu0", "spare"}
    assert access.added == {link: {"actor": "actor", "slow": "actor"} for link in ("trajectories", "weights")}


def test_numbers_and_exploration_of_added_ones_are_nobody_elses(tmp_path: Path) -> None:
    """Places fill the range evenly, however many come."""
    plan = plan_of(tmp_path)
    added = [plan.node(plan.name_added("actor", number, "spare")) for number in range(8)]
    numbers = [number_of(plan, node) for node in [*plan.members(("actor", "slow")), *added]]
    assert numbers == list(range(3 + 8))
    theirs = np.concatenate([places(plan, node) for node in added])
    counts, _ = np.histogram(theirs, bins=8, range=(0, 1))
    assert theirs.shape == (8 * 16,)
    assert counts.min() >= 15
    assert counts.max() <= 17
    assert places(plan, plan.nodes["actor-0"])[0] == 0
    assert places(plan, plan.nodes["slow-0"])[-1] == 1
