"""Who binds what where, the same from every host; and the lock that says it all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ddrl_bus.errors import SecurityError, TopologyError, UsageError
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.topology import Plan, load, show
from ddrl_bus.topology.schema import KINDS, PORTS, json_schema

from .fakes import (
    A3C,
    APEX,
    BASE,
    CATALOG,
    DDPPO,
    GA3C,
    GORILA,
    GORILA_GLOBAL,
    HEAD,
    SEED,
    SEED_R2D2,
    TOPOLOGIES,
    load_text,
)

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
    assert [n.name for n in plan.on_host("b")] == ["actor-0", "actor-2", "evaluator-0", "relay-0"]
    assert plan.nodes["controller-0"].host == "a"
    binds = {f"{name}.{link}": bind.addresses for (name, link), bind in plan.binds.items()}
    assert binds == {
        "controller-0.progress": (f"{root}/controller-0.progress", "tcp://10.0.0.1:7077"),
        "controller-0.control": (f"{root}/controller-0.control", "tcp://10.0.0.1:7078"),
        "learner-0.trajectories": (f"{root}/learner-0.trajectories", "tcp://10.0.0.1:7079"),
        "learner-0.weights": (f"{root}/learner-0.weights", "tcp://10.0.0.1:7081"),  # credits are on 7080
        "relay-0.weights": (f"{root}/relay-0.weights.learner-0",),
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


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize("text", [TWO_HOSTS, A3C, SEED, APEX, GORILA, GORILA_GLOBAL, DDPPO])
def test_every_end_binds_or_connects_and_every_connection_is_bound(text: str, in_process: bool, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of(tmp_path, text), in_process=in_process)
    ports = [(name, port) for name in plan.nodes for port in plan.ports(name).values()]
    bound = {address for _, port in ports for address in port.binds}
    for name, port in ports:
        relays = plan.nodes[name].kind == "relay" and port.link.relay
        assert bool(port.binds) != bool(port.peers) or port.link.mutual or relays, name
        assert set(port.peers.values()) <= bound
    with pytest.raises(KeyError):
        plan.ports("actor-9")


# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"in_process": True}])
def test_inside_a_bundle_links_are_memory_between_nodes_of_one_index(options: dict[str, bool], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, A3C, **options)
    for index in range(2):
        actor, learner = plan.ports(f"actor-{index}"), plan.ports(f"learner-{index}")
        assert learner["trajectories"].binds == (f"memory://learner-{index}.trajectories",)
        assert actor["trajectories"].peers == {f"learner-{index}": f"memory://learner-{index}.trajectories"}
        assert actor["weights"].peers == {f"learner-{index}": f"memory://learner-{index}.weights"}
        assert list(learner["gradients"].peers) == ["param_server-0"]
    scheme = "memory" if options else "ipc"
    assert plan.ports("param_server-0")["gradients"].binds[0].startswith(f"{scheme}:")


def test_a_bundle_replays_what_it_played_unless_the_replay_is_outside(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GORILA)
    assert plan.ports("learner-1")["samples"].peers == {"replay-1": "memory://replay-1.samples"}
    assert plan.ports("actor-1")["trajectories"].peers == {"replay-1": "memory://replay-1.trajectories"}
    assert [node.name for node in plan.processes["w-1"]] == ["actor-1", "replay-1", "learner-1"]
    plan = plan_of(tmp_path, GORILA_GLOBAL)
    for port in (plan.ports("learner-1")["samples"], plan.ports("actor-1")["trajectories"]):
        assert list(port.peers) == ["replay-0", "replay-1", "replay-2"]
        assert all(address.startswith("ipc:") for address in port.peers.values())
    assert plan.ports("actor-1")["weights"].peers == {"learner-1": "memory://learner-1.weights"}


def test_the_nodes_of_one_index_of_a_bundle_are_one_process(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, A3C)
    assert {process: [node.name for node in nodes] for process, nodes in plan.processes.items()} == {
        "w-0": ["actor-0", "learner-0"],
        "w-1": ["actor-1", "learner-1"],
        "param_server-0": ["param_server-0"],
        "evaluator-0": ["evaluator-0"],
        "controller-0": ["controller-0"],
    }
    assert plan.process("w-1") == plan.processes["w-1"]
    with pytest.raises(UsageError, match="actor-1 runs in process w-1 beside learner-1; start w-1"):
        plan.process("actor-1")
    with pytest.raises(UsageError, match="no node 'w-2'; have w-0, w-1, param_server-0"):
        plan.process("w-2")


def test_a_link_that_leaves_a_bundle_has_one_backend_and_joins_its_members_by_index(tmp_path: Path) -> None:
    """The evaluator is outside, so weights are on ipc for the actor of the same process too."""
    plan = plan_of(tmp_path, HEAD + "nodes: {actor: {envs: 64, bundle: w}, learner: {bundle: w}}\n")
    assert plan.ports("learner-0")["trajectories"].binds == ("memory://learner-0.trajectories",)
    (address,) = plan.ports("learner-0")["weights"].binds
    assert address.startswith("ipc:")
    assert plan.ports("actor-0")["weights"].peers == plan.ports("evaluator-0")["weights"].peers
    assert plan.ports("evaluator-0")["weights"].peers == {"learner-0": address}

    asked = GA3C.replace("inference: {}", "inference: {count: 2, bundle: v}").replace("32}", "32, bundle: v}")
    asked = asked.replace("learner: {}", "learner: {}, out: {kind: actor}").replace(
        "{from: actor}", "{from: [actor, out]}"
    )
    plan = plan_of(tmp_path, asked)
    assert list(plan.ports("actor-1")["act"].peers) == ["inference-1"]
    assert list(plan.ports("out-0")["act"].peers) == ["inference-0", "inference-1"]


def test_members_of_a_bundle_need_no_port_for_each_other_on_other_hosts(tmp_path: Path) -> None:
    text = A3C.replace("bundle: w", "bundle: w, host: [a, b]").replace("param_server: {}", "param_server: {host: a}")
    plan = plan_of(tmp_path, text + "hosts: {a: 10.0.0.1, b: 10.0.0.2}\ninsecure: true\n")
    far = {f"{name}.{link}": bind.far for (name, link), bind in plan.binds.items() if bind.far}
    assert far == {
        "controller-0.progress": "tcp://10.0.0.1:7077",
        "controller-0.control": "tcp://10.0.0.1:7078",
        "param_server-0.gradients": "tcp://10.0.0.1:7079",
    }
    assert [node.process for node in plan.on_host("b")] == ["w-1", "w-1"]


# ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [DDPPO, DDPPO.replace("  sync: {from: learner, to: learner}\n", "")])
@pytest.mark.parametrize("count", [2, 3])
def test_each_replica_hears_all_others_and_counts_for_its_own_actor(text: str, count: int, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, text.replace("count: 2", f"count: {count}"))
    root = f"ipc:///run/x/ddrl-{os.getuid()}/r"
    assert plan.links["sync"].mutual
    for index in range(count):
        learner, actor = plan.ports(f"learner-{index}"), plan.ports(f"actor-{index}")
        others = [other for other in range(count) if other != index]
        assert learner["sync"].binds == (f"{root}/learner-{index}.sync",)
        assert learner["sync"].peers == {f"learner-{n}": f"{root}/learner-{n}.sync" for n in others}
        assert learner["tally"].binds == (f"memory://learner-{index}.tally",)
        assert actor["tally"].peers == {f"learner-{index}": f"memory://learner-{index}.tally"}
        assert list(actor["weights"].peers) == [f"learner-{index}"]
    assert list(plan.ports("evaluator-0")["weights"].peers) == [f"learner-{n}" for n in range(count)]


def test_replicas_in_groups_of_their_own_hear_one_another(tmp_path: Path) -> None:
    groups = "nodes: {actor: {envs: 64}, a: {kind: learner, count: 2}, b: {kind: learner}}\n"
    plan = plan_of(tmp_path, HEAD + groups)
    assert plan.links["sync"].sources == plan.links["sync"].targets == ("a", "b")
    for name, others in {"a-0": ["a-1", "b-0"], "a-1": ["a-0", "b-0"], "b-0": ["a-0", "a-1"]}.items():
        assert list(plan.ports(name)["sync"].peers) == others
    assert list(plan.ports("actor-0")["weights"].peers) == ["a-0", "a-1", "b-0"]


def test_replicas_on_two_hosts_hear_each_other_over_tcp(tmp_path: Path) -> None:
    """The first two hear each other over ipc as well; what stays in a bundle needs no port."""
    text = DDPPO.replace("count: 2", "count: 3").replace("bundle: w", "bundle: w, host: [a, b]")
    plan = plan_of(tmp_path, text + "hosts: {a: 10.0.0.1, b: 10.0.0.2}\ninsecure: true\n")
    root = f"ipc:///run/x/ddrl-{os.getuid()}/r"
    binds = {name: plan.binds[name, "sync"] for name in ("learner-0", "learner-1", "learner-2")}
    assert all(bind.far and bind.far.startswith("tcp://10.0.0.") for bind in binds.values())
    assert plan.ports("learner-0")["sync"].peers == {
        "learner-1": binds["learner-1"].far,
        "learner-2": f"{root}/learner-2.sync",
    }
    assert plan.ports("learner-1")["sync"].peers == {
        "learner-0": binds["learner-0"].far,
        "learner-2": binds["learner-2"].far,
    }
    assert not any(bind.far for (_, link), bind in plan.binds.items() if link in ("trajectories", "tally"))


def test_one_learner_has_nobody_to_hear(tmp_path: Path) -> None:
    assert "sync" not in plan_of(tmp_path, BASE).links
    assert "sync" not in plan_of(tmp_path, A3C).links
    alone = plan_of(tmp_path, BASE + "links: {trajectories: {}, weights: {}, sync: {}}\n").ports("learner-0")["sync"]
    assert (len(alone.binds), alone.peers) == (1, {})


# ── relays ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_host_with_several_subscribers_gets_one_copy_by_a_relay(tmp_path: Path) -> None:
    """Whoever is on the learner's host hears it as before, and everything but weights goes its own way."""
    plan = plan_of(tmp_path, TWO_HOSTS)
    here = f"ipc:///run/x/ddrl-{os.getuid()}/r/relay-0.weights.learner-0"
    relay = plan.nodes["relay-0"]
    assert (relay.kind, relay.group, relay.host, relay.process) == ("relay", "relay", "b", "relay-0")
    ports = plan.ports("relay-0")
    assert ports.keys() == {"weights", "progress", "control"}
    assert (ports["weights"].binds, ports["weights"].peers) == ((here,), {"learner-0": "tcp://10.0.0.1:7081"})
    for name in ("actor-0", "actor-2", "evaluator-0"):
        assert plan.ports(name)["weights"].peers == {"learner-0": here}
    assert plan.ports("actor-1")["weights"].peers["learner-0"].endswith("/learner-0.weights")
    assert [guest.name for guest in plan.guests("learner-0", "weights")] == ["relay-0"]
    assert [guest.name for guest in plan.guests("learner-0", "trajectories")] == ["actor-0", "actor-2"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        (BASE, ()),
        (TWO_HOSTS, ("b",)),
        (TWO_HOSTS + "links: {trajectories: {}, weights: {relay: false}}\n", ()),
        (TWO_HOSTS.replace("count: 3, ", ""), ("b",)),  # an actor and the evaluator
        (TWO_HOSTS.replace("count: 3, ", "").replace("evaluator: {", "evaluator: {count: 0, "), ()),
        (TWO_HOSTS.replace("learner: {host: a}", "learner: {host: b}"), ()),  # one actor is elsewhere
        (TWO_HOSTS.replace("count: 3", "count: 7").replace("[b, a]", "[b, a, c]").replace("b: 1", "c: c, b: 1"), "cb"),
        (TWO_HOSTS.replace("learner: {host: a}", "learner: {host: [a, b], count: 2}"), ("b",)),
    ],
)
def test_relays_are_where_they_save_copies(text: str, hosts: Sequence[str], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, text)
    assert [node.host for node in plan.nodes.values() if node.kind == "relay"] == list(hosts)
    assert [host for host, _ in plan.relays] == list(hosts)


def test_several_nodes_of_one_process_need_no_relay(tmp_path: Path) -> None:
    text = TWO_HOSTS.replace("count: 3, envs: 32, host: [b, a]", "envs: 64, host: b, bundle: w")
    assert "relay-0" in plan_of(tmp_path, text).nodes
    assert "relay-0" not in plan_of(tmp_path, text.replace("{host: b}", "{host: b, bundle: w}")).nodes


def test_of_several_learners_each_has_an_address_at_the_relay(tmp_path: Path) -> None:
    """One in the own host is heard without it; whoever leads is followed, wherever it is."""
    text = TWO_HOSTS.replace("learner: {host: a}", "learner: {host: [a, b, a], count: 3}")
    plan = plan_of(tmp_path, text)
    root = f"ipc:///run/x/ddrl-{os.getuid()}/r"
    far = {name: plan.binds[name, "weights"].far for name in ("learner-0", "learner-2")}
    here = {name: f"{root}/relay-0.weights.{name}" for name in far}
    port = plan.ports("relay-0")["weights"]
    assert (port.binds, port.peers) == (tuple(here.values()), far)
    assert plan.ports("actor-0")["weights"].peers == here | {"learner-1": f"{root}/learner-1.weights"}
    assert plan.ports("actor-1")["weights"].peers["learner-1"].startswith("tcp:")  # the only one of its host


def test_what_a_file_says_of_relays_gives_way(tmp_path: Path) -> None:
    """So that a run may go on with other nodes than its lock has."""
    plan = load_text(tmp_path, TWO_HOSTS)
    assert "relay" in plan.groups
    lock = plan.lock()
    assert "relay" not in load_text(tmp_path, lock, "links.weights.relay=false").groups
    gone = load_text(tmp_path, lock, "nodes.actor.host=[a]", "nodes.evaluator.host=[a]")
    assert not gone.relays
    assert "relay" not in gone.links["control"].targets + gone.links["progress"].sources
    moved = load_text(tmp_path, lock, "nodes.learner.host=[b]", "nodes.actor.host=[a]")
    assert moved.nodes["relay-0"].host == "a"


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
        BASE + "links: {trajectories: {codec: none}, weights: {codec: delta}}\n",
        A3C,
        GA3C.replace("inference: {}", "inference: {predictors: auto, wait: 2ms}"),
        SEED,
        APEX.replace("replay: {", "replay: {samples_per_insert: 8, save: false, "),
        SEED_R2D2,
        GORILA,
        DDPPO,
        BASE.replace("learner: {}", "learner: {count: 3, deadline: 500ms}"),
        TWO_HOSTS + "links: {trajectories: {}, weights: {relay: false}}\n",
        TWO_HOSTS.replace("learner: {host: a}", "learner: {host: [a, b], count: 2}"),
    ],
)
def test_a_lock_reads_back_to_the_same_plan(text: str, tmp_path: Path) -> None:
    plan = load_text(tmp_path, text)
    again = load_text(tmp_path, plan.lock(), environ={})
    assert again == plan
    assert again.binds == plan.binds
    assert again.lock() == plan.lock()
    if "sync" not in plan.links:
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


IMPALA = {"trajectories", "weights"}
REFERENCE = dict.fromkeys(["quickstart", "impala", "two-hosts", "a2c", "appo", "ppo", "torchbeast_mono"], IMPALA)
REFERENCE |= dict.fromkeys(["ga3c", "seed", "torchbeast_poly"], IMPALA | {"act"})
REFERENCE |= {"a3c": IMPALA | {"gradients", "parameters"}}
REFERENCE |= {"apex": IMPALA | {"samples"}, "r2d2": IMPALA | {"samples"}, "seed_r2d2": IMPALA | {"samples", "act"}}
REFERENCE |= {"ddppo": IMPALA | {"sync", "tally"}}
REFERENCE |= {"gorila": IMPALA | {"samples", "gradients", "parameters"}}


@pytest.mark.parametrize("path", sorted(TOPOLOGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_reference_topologies_load_and_spell_their_links_out(path: Path) -> None:
    plan = load(path, catalog=catalog(), environ=ENVIRON)
    assert plan.name == path.stem
    assert set(plan.links) == REFERENCE[path.stem] | {"control", "progress"}
    spelt = {name: {"kind", "from", "to"} for name in REFERENCE[path.stem]}
    tree = YAML(typ="safe").load(path)
    assert (
        "extends" in tree
        or {name: link.keys() & {"kind", "from", "to"} for name, link in tree["links"].items()} == spelt
    )


@pytest.mark.parametrize("path", sorted(TOPOLOGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_weights_are_halves_where_the_rule_takes_them(path: Path) -> None:
    """Not where a gradient is of the very policy that acted, nor where workers hand on what a server holds."""
    plan = load(path, catalog=catalog(), environ=ENVIRON)
    exact = {"a2c", "a3c", "ga3c", "gorila"}
    assert plan.links["weights"].precision == ("float32" if path.stem in exact else "float16")
    assert {link.precision for link in plan.links.values() if link.name != "weights"} == {"float32"}
    whole = load(path, catalog=catalog(), environ=ENVIRON, overrides=["links.weights.precision=float32"])
    assert whole.links["weights"].precision == "float32"
    assert f"latest, {plan.links['weights'].precision}" in show.text(plan)
    if path.stem in exact:
        with pytest.raises(TopologyError, match=r"links\.weights\.precision: got float16, expected float32: "):
            load(path, catalog=catalog(), environ=ENVIRON, overrides=["links.weights.precision=float16"])


def test_two_hosts_is_refused_without_its_line_on_security() -> None:
    path = TOPOLOGIES / "two-hosts.yaml"
    assert all(link.insecure for link in load(path, catalog=CATALOG, environ=ENVIRON).links.values())
    with pytest.raises(SecurityError):
        load(path, catalog=CATALOG, environ=ENVIRON, overrides=["insecure=false"])


def test_text_shows_nodes_by_host_and_links_with_their_ends(tmp_path: Path) -> None:
    lines = show.text(plan_of(tmp_path, TWO_HOSTS)).splitlines()
    assert lines[0] == "t  run r  algorithm impala  env CartPole-v1  seed 1"
    assert lines[2:4] == ["host a (10.0.0.1)", "  actor-1          actor       envs=32"]
    assert lines[4].startswith("  learner-0        learner     device=auto  publish_every=1")
    at = lines.index("  trajectories     actor → learner  queue, window 2, on_loss count, insecure")
    assert lines[at + 2] == "    learner-0 binds tcp://10.0.0.1:7079"
    assert "  relay-0          relay" in lines
    assert "    relay-0 binds ipc:///run/x" in "\n".join(lines)


def test_mermaid_draws_groups_per_host_and_links_between_them(tmp_path: Path) -> None:
    assert show.mermaid(plan_of(tmp_path, TWO_HOSTS)) == (
        "flowchart LR\n"
        '  subgraph h0["a (10.0.0.1)"]\n'
        '    n1["actor"]\n    n2["learner"]\n    n4["controller"]\n'
        "  end\n"
        '  subgraph h1["b (10.0.0.2)"]\n'
        '    n0["actor × 2"]\n    n3["evaluator"]\n    n5["relay"]\n'
        "  end\n"
        '  n0 -- "trajectories: queue, window 2" --> n2\n'
        '  n1 -- "trajectories: queue, window 2" --> n2\n'
        '  n2 -- "weights: latest" --> n5\n'
        '  n5 -- "weights: latest" --> n0\n'
        '  n2 -- "weights: latest" --> n1\n'
        '  n5 -- "weights: latest" --> n3\n'
    )


def test_bundles_are_shown(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, A3C)
    assert "  actor-1          actor       envs=16  process=w-1" in show.text(plan).splitlines()
    assert "prefetch" not in show.text(plan)
    assert "  learner-0        learner     device=auto  publish_every=1  delay=0  trainers=1  prefetch=2" in show.text(
        plan_of(tmp_path, APEX)
    )
    assert "  inference-0      inference   " in show.text(asked := plan_of(tmp_path, SEED))
    assert "  actor-1          actor       envs=32  groups=2" in show.text(asked).splitlines()
    assert show.mermaid(plan) == (
        "flowchart LR\n"
        '  subgraph h0["local (127.0.0.1)"]\n'
        '    subgraph h0_w["w × 2"]\n'
        '      n0["actor"]\n      n1["learner"]\n'
        "    end\n"
        '    n2["param_server"]\n    n3["evaluator"]\n    n4["controller"]\n'
        "  end\n"
        '  n0 -- "trajectories: queue, window 1" --> n1\n'
        '  n1 -- "weights: latest" --> n0\n'
        '  n1 -- "gradients: request" --> n2\n'
        '  n2 -- "parameters: latest" --> n3\n'
    )


def test_the_json_schema_describes_every_key(tmp_path: Path) -> None:
    schema = json_schema(CATALOG)
    assert set(schema["properties"]) >= {"name", "extends", "env", "algo", "nodes", "links", "hosts", "insecure"}
    assert set(schema["properties"]["nodes"]["properties"]) == set(KINDS)
    assert set(schema["properties"]["links"]["properties"]) == {*PORTS, "control", "progress"}
    impala, _ = schema["properties"]["algo"]["anyOf"]
    assert impala["properties"]["name"] == {"const": "impala"}
    assert impala["properties"]["lr"]["description"] == "Adam's step size."
    assert schema["$defs"]["ActorOptions"]["properties"]["envs"]["description"].startswith("Environments per actor")
    references = {part.partition('"')[0] for part in str(schema).replace("'", '"').split("#/$defs/")[1:]}
    assert references <= set(schema["$defs"])
