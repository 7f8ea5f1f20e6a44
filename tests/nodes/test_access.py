"""Rights follow from the plan: which hosts may speak for which nodes, over which links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from ddrl_bus import keys
from ddrl_bus.errors import SecurityError
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.nodes import base
from ddrl_bus.nodes.access import access_of, guard
from ddrl_bus.nodes.base import Node
from ddrl_bus.topology import Plan, load
from ddrl_bus.topology.exposure import insecure_links, leaves, needs_key
from ddrl_bus.topology.schema import PORTS, RELAYED
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.security import Peer

TOPOLOGY = """
name: t
env: {id: CartPole-v1}
algo: {name: impala}
hosts: {gpu0: 10.0.0.1, cpu1: 10.0.0.2, cpu2: 10.0.0.3}
nodes:
  actor: {count: 3, host: [cpu1, cpu2]}
  learner: {host: gpu0}
  evaluator: {host: cpu1}
  controller: {host: gpu0}
"""


def plan_of(tmp_path: Path, *overrides: str, text: str = TOPOLOGY) -> Plan:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    return load(path, overrides=overrides, catalog=catalog(starts=False), environ={})


def test_the_learner_lets_each_host_speak_for_its_own_actors(tmp_path: Path) -> None:
    access = access_of(plan_of(tmp_path, "links.weights.relay=false"), "learner-0")
    assert access.guests["trajectories"] == {
        "actor-0": Peer("cpu1", "actor"),
        "actor-1": Peer("cpu2", "actor"),
        "actor-2": Peer("cpu1", "actor"),
    }
    assert access.guests["weights"].keys() == {"actor-0", "actor-1", "actor-2", "evaluator-0"}
    assert access.guests.keys() == {"trajectories", "weights"}  # nobody sends it anything else
    assert access.plain == frozenset()
    assert len(access.binds) == 3  # credits too


def test_an_actor_binds_nothing_and_dials_who_has_its_learners_key(tmp_path: Path) -> None:
    access = access_of(plan_of(tmp_path), "actor-1")
    assert access.binds == frozenset()
    assert access.guests == {}
    assert set(access.servers.values()) == {Peer("gpu0", "learner"), Peer("gpu0", "controller")}
    assert len(access.servers) == 5  # trajectories, their credits, weights, progress, control


def test_an_insecure_link_is_plain_and_the_others_are_not(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "links.weights.insecure=true")
    access = access_of(plan, "learner-0")
    assert len(access.plain) == 1
    assert access.guests.keys() == {"trajectories"}
    assert insecure_links(plan, "learner-0") == insecure_links(plan, "actor-1") == ["weights"]
    assert access_of(plan_of(tmp_path, "insecure=true"), "learner-0").binds == frozenset()


def test_weights_that_are_relayed_are_the_relays_to_hear(tmp_path: Path) -> None:
    """Its host's subscribers are no guests any more, and dial nobody for them."""
    plan = plan_of(tmp_path)
    access = access_of(plan, "learner-0")
    assert access.guests["weights"] == {"actor-1": Peer("cpu2", "actor"), "relay-0": Peer("cpu1", "relay")}
    relay = access_of(plan, "relay-0")
    assert (relay.binds, relay.guests) == (frozenset(), {})
    assert set(relay.servers.values()) == {Peer("gpu0", "learner"), Peer("gpu0", "controller")}
    assert len(relay.servers) == 3  # weights, progress, control
    assert len(access_of(plan, "actor-0").servers) == 4  # no weights


@pytest.mark.parametrize(("role", "speaks"), [("actor", True), ("evaluator", True), ("learner", False)])
def test_whoever_may_hear_weights_may_run_the_relay_of_its_host(
    role: str, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    keys.new("gpu0")
    public = "a" + "1" * 39
    keys.allow(keys.Entry("cpu1", public, frozenset({role})))
    speakers = guard(plan_of(tmp_path), "learner-0", Ledger()).speakers("weights", public)
    assert ("relay-0" in speakers) is speaks
    assert str(keys.allowed()[-1]).split()[2:] == [role]  # which is what the file says


def test_relays_come_along_with_every_kind_that_hears_weights() -> None:
    assert {kind for link in RELAYED for kind in PORTS[link].targets} == keys.RELAYED


@pytest.mark.parametrize("overrides", [["hosts.cpu1=127.0.0.2", "hosts.gpu0=127.0.0.1", "hosts.cpu2=127.0.0.3"]])
def test_nothing_on_one_machine_needs_a_key(tmp_path: Path, overrides: Sequence[str]) -> None:
    plan = plan_of(tmp_path, *overrides)
    assert not any(needs_key(plan, host) for host in plan.hosts)
    assert insecure_links(plan, "learner-0") == []
    assert access_of(plan, "learner-0").binds == frozenset()


GORILA = """
name: t
env: {id: CartPole-v1}
algo: {name: dqn}
hosts: {a: 10.0.0.1, b: 10.0.0.2}
nodes:
  actor: {count: 2, bundle: w, host: [a, b]}
  replay: {count: 2, bundle: w, host: [a, b]}
  learner: {count: 2, bundle: w, host: [a, b]}
  param_server: {count: 2, host: [a, b]}
  evaluator: {host: b}
links:
  trajectories: {from: actor, to: replay}
  samples: {}
  weights: {to: actor}
  gradients: {}
  parameters: {}
"""


@pytest.mark.parametrize("text", [TOPOLOGY, GORILA])
def test_who_dials_and_who_may_come_are_the_same(text: str, tmp_path: Path) -> None:
    """For every pair of nodes on different hosts, seen from both sides."""
    plan = plan_of(tmp_path, text=text)
    dialled, let_in = set(), set()
    for name, node in plan.nodes.items():
        for link, port in plan.ports(name).items():
            dialled |= {(link, name, peer) for peer, address in port.peers.items() if leaves(address)}
        access = access_of(plan, name)
        let_in |= {(link, guest, name) for link, guests in access.guests.items() for guest in guests}
        assert not any(peer.host == node.host for guests in access.guests.values() for peer in guests.values())
    assert dialled == let_in
    assert let_in


def test_a_node_without_its_key_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    plan = plan_of(tmp_path)
    with pytest.raises(SecurityError, match="ddrl keys new cpu1"):
        guard(plan, "actor-0", Ledger())
    keys.new("cpu1")
    assert guard(plan, "actor-0", Ledger()).pair == keys.own("cpu1")
    assert guard(plan_of(tmp_path, "insecure=true"), "actor-0", Ledger()).pair is None


class Probe(Node):
    role: ClassVar[str] = "actor"

    async def start(self) -> None:
        """Opens nothing."""

    async def run(self) -> None:
        """Returns at once."""


@pytest.mark.parametrize("insecure", ["true", "false"])
async def test_a_node_in_the_open_says_so_again_and_again(
    insecure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "WARN_S", 0.001)
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    keys.new("cpu2")
    node = Probe(plan_of(tmp_path, f"links.weights.insecure={insecure}"), "actor-1", tmp_path, 1)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await node._warn()
    said = [record.getMessage() for record in caplog.records]
    if insecure == "true":
        assert len(said) > 1
        assert said[0] == "insecure=weights: in plain text, and open to whoever reaches this network"
    else:
        assert said == []
