"""Who binds what where, the same from every host; and the lock that says it all."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddrl_bus.errors import SecurityError
from ddrl_bus.topology import Plan, load, show
from ddrl_bus.topology.schema import KINDS, json_schema

from .fakes import BASE, CATALOG, HEAD, TOPOLOGIES, load_text

TWO_HOSTS = (
    HEAD
    + "nodes: {actor: {count: 3, envs: 32, host: [b, a]}, learner: {host: a}, evaluator: {host: b}}\n"
    + "hosts: {a: 10.0.0.1, b: 10.0.0.2}\ninsecure: true\n"
)
ENVIRON = {"TMPDIR": "/run/x", "GPU0": "10.0.0.5", "CPU1": "10.0.0.6"}


def plan_of(tmp_path: Path, text: str, **options: object) -> Plan:
    return load_text(tmp_path, text, environ=ENVIRON, run_id="r", **options)


def test_on_one_host_everything_is_ipc(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, BASE)
    root = f"ipc:///run/x/ddrl-{os.getuid()}/r"
    learner, actor, controller = (plan.ports(name) for name in ("learner-0", "actor-1", "controller-0"))
    assert learner["trajectories"].binds == (f"{root}/learner-0.trajectories",)
    assert learner["trajectories"].side == "in"
    assert learner["weights"].binds == (f"{root}/learner-0.weights",)
    assert learner["weights"].side == "out"
    assert actor["trajectories"].peers == {"learner-0": f"{root}/learner-0.trajectories"}
    assert actor["weights"].peers == {"learner-0": f"{root}/learner-0.weights"}
    assert actor["control"].peers == {"controller-0": f"{root}/controller-0.control"}
    assert actor["progress"].side == "out"
    assert controller["progress"].binds == (f"{root}/controller-0.progress",)
    assert set(plan.ports("evaluator-0")) == {"weights", "control", "progress"}


def test_across_hosts_ports_count_up_from_the_controllers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO_HOSTS)
    root = f"ipc:///run/x/ddrl-{os.getuid()}/r"
    assert [n.name for n in plan.on_host("b")] == ["actor-0", "actor-2", "evaluator-0"]
    assert plan.nodes["controller-0"].host == "a"
    binds = {f"{name}.{link}": bind.addresses for (name, link), bind in plan.binds.items()}
    assert binds == {
        "controller-0.progress": (f"{root}/controller-0.progress", "tcp://10.0.0.1:7077"),
        "controller-0.control": (f"{root}/controller-0.control", "tcp://10.0.0.1:7078"),
        "learner-0.trajectories": (f"{root}/learner-0.trajectories", "tcp://10.0.0.1:7079"),
        "learner-0.weights": (f"{root}/learner-0.weights", "tcp://10.0.0.1:7081"),  # credits are on 7080
    }
    assert plan.ports("actor-0")["trajectories"].peers == {"learner-0": "tcp://10.0.0.1:7079"}
    assert plan.ports("actor-1")["trajectories"].peers == {"learner-0": f"{root}/learner-0.trajectories"}


def test_progress_is_on_ipc_even_when_all_others_are_elsewhere(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO_HOSTS.replace("host: a}", "host: b}").replace("[b, a]", "b"))
    assert [a.partition(":")[0] for a in plan.ports("controller-0")["progress"].binds] == ["ipc", "tcp"]
    assert [a.partition(":")[0] for a in plan.ports("controller-0")["control"].binds] == ["tcp"]


def test_hosts_behind_one_address_get_ports_of_their_own(tmp_path: Path) -> None:
    text = HEAD + "nodes: {actor: {envs: 64, host: b}, learner: {host: c}, controller: {host: a}}\n"
    plan = plan_of(tmp_path, text + "hosts: {a: 127.0.0.1, b: 127.0.0.1, c: '127.0.0.1:8000'}\n")
    assert plan.ports("actor-0")["trajectories"].peers == {"learner-0": "tcp://127.0.0.1:8000"}
    assert plan.ports("actor-0")["weights"].peers == {"learner-0": "tcp://127.0.0.1:8002"}


def test_in_one_process_everything_is_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO_HOSTS, in_process=True)
    assert plan.ports("actor-0")["trajectories"].peers == {"learner-0": "memory://learner-0.trajectories"}
    assert plan.ports("controller-0")["progress"].binds == ("memory://controller-0.progress",)


@pytest.mark.parametrize("options", [{}, {"in_process": True}])
def test_every_end_binds_or_connects_and_every_connection_is_bound(options: dict[str, bool], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO_HOSTS, **options)
    ports = [(name, port) for name in plan.nodes for port in plan.ports(name).values()]
    bound = {address for _, port in ports for address in port.binds}
    for name, port in ports:
        assert bool(port.binds) != bool(port.peers), name
        assert set(port.peers.values()) <= bound
    with pytest.raises(KeyError):
        plan.ports("actor-9")


def test_two_hosts_compute_the_same_plan(tmp_path: Path) -> None:
    a = load_text(tmp_path, TWO_HOSTS, environ={"TMPDIR": "/tmp/a"})
    b = load_text(tmp_path, TWO_HOSTS, environ={"TMPDIR": "/var/b"})
    assert a == b
    assert a.run_id == b.run_id
    assert len(a.run_id) == 12
    far = {key: bind.far for key, bind in a.binds.items()}
    assert far == {key: bind.far for key, bind in b.binds.items()}


def test_the_run_id_follows_the_content_unless_it_is_given(tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE)
    assert load_text(tmp_path, "# the same\n" + BASE + "seed: 1\n").run_id == plan.run_id
    assert load_text(tmp_path, BASE, "seed=2").run_id != plan.run_id
    assert load_text(tmp_path, BASE + "run_id: mine\n").run_id == "mine"
    assert load_text(tmp_path, BASE + "run_id: mine\n", run_id="ours").run_id == "ours"


# ── lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        TWO_HOSTS,
        BASE.replace("impala", "impala, clip: null, lr: 1e-07") + "stop: {reward: .inf, time: 1h}\n",
        BASE + "links: {trajectories: {max_lag: 0, window: 1, on_loss: resend}, weights: {insecure: true}}\n",
        HEAD + "nodes: {evaluator: {count: 0}, b: {kind: actor, envs: 64}, a: {kind: actor}, learner: {}}\n",
    ],
)
def test_a_lock_reads_back_to_the_same_plan(text: str, tmp_path: Path) -> None:
    plan = load_text(tmp_path, text)
    again = load_text(tmp_path, plan.lock(), environ={})
    assert again == plan
    assert again.binds == plan.binds
    assert again.lock() == plan.lock()
    assert load_text(tmp_path, plan.lock(), in_process=True) == dataclasses.replace(plan, in_process=True)


scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@settings(max_examples=80, deadline=None)
@given(kwargs=st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_a_lock_keeps_whatever_the_environment_is_given(
    kwargs: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("lock")
    plan = load_text(tmp_path, BASE)
    env = plan.env.model_copy(update={"kwargs": kwargs})
    plan = dataclasses.replace(plan, env=env)
    assert load_text(tmp_path, plan.lock()) == plan


@pytest.mark.parametrize("text", ["3e-4", "1_000", "null", "${X}", "$${X}", "\u2028\x85\x7f\ufeff", "a: b # c", "\t "])
def test_a_lock_quotes_what_would_be_read_otherwise(text: str, tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE)
    plan = dataclasses.replace(plan, env=plan.env.model_copy(update={"kwargs": {"v": text, text: 1}}))
    assert load_text(tmp_path, plan.lock()).env.kwargs == {"v": text, text: 1}


# ── reference files, figures, schema ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["quickstart", "impala", "two-hosts"])
def test_reference_topologies_load(name: str) -> None:
    plan = load(TOPOLOGIES / f"{name}.yaml", catalog=CATALOG, environ=ENVIRON)
    assert plan.name == name
    assert set(plan.links) == {"trajectories", "weights", "control", "progress"}


def test_two_hosts_is_refused_without_its_line_on_security() -> None:
    path = TOPOLOGIES / "two-hosts.yaml"
    assert all(link.insecure for link in load(path, catalog=CATALOG, environ=ENVIRON).links.values())
    with pytest.raises(SecurityError):
        load(path, catalog=CATALOG, environ=ENVIRON, overrides=["insecure=false"])


def test_text_shows_nodes_by_host_and_links_with_their_ends(tmp_path: Path) -> None:
    lines = show.text(plan_of(tmp_path, TWO_HOSTS)).splitlines()
    assert lines[0] == "t  run r  algorithm impala  env CartPole-v1  seed 1"
    assert lines[2:5] == [
        "host a (10.0.0.1)",
        "  actor-1          actor       envs=32",
        "  learner-0        learner     device=auto  publish_every=1",
    ]
    at = lines.index("  trajectories     actor → learner  queue, window 2, on_loss count, insecure")
    assert lines[at + 2] == "    learner-0 binds tcp://10.0.0.1:7079"


def test_mermaid_draws_groups_per_host_and_links_between_them(tmp_path: Path) -> None:
    assert show.mermaid(plan_of(tmp_path, TWO_HOSTS)) == (
        "flowchart LR\n"
        '  subgraph h0["a (10.0.0.1)"]\n'
        '    n1["actor"]\n    n2["learner"]\n    n4["controller"]\n'
        "  end\n"
        '  subgraph h1["b (10.0.0.2)"]\n'
        '    n0["actor × 2"]\n    n3["evaluator"]\n'
        "  end\n"
        '  n0 -- "trajectories: queue, window 2" --> n2\n'
        '  n1 -- "trajectories: queue, window 2" --> n2\n'
        '  n2 -- "weights: latest" --> n0\n'
        '  n2 -- "weights: latest" --> n1\n'
        '  n2 -- "weights: latest" --> n3\n'
    )


def test_the_json_schema_describes_every_key(tmp_path: Path) -> None:
    schema = json_schema(CATALOG)
    assert set(schema["properties"]) >= {"name", "extends", "env", "algo", "nodes", "links", "hosts", "insecure"}
    assert set(schema["properties"]["nodes"]["properties"]) == set(KINDS)
    (impala,) = schema["properties"]["algo"]["anyOf"]
    assert impala["properties"]["name"] == {"const": "impala"}
    assert impala["properties"]["lr"]["description"] == "Adam's step size."
    assert schema["$defs"]["ActorOptions"]["properties"]["envs"]["description"].startswith("Environments per actor")
    references = {part.partition('"')[0] for part in str(schema).replace("'", '"').split("#/$defs/")[1:]}
    assert references <= set(schema["$defs"])
