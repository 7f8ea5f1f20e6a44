"""What a file may say, and what comes of it: scalars, units, variables, overrides, `extends`, defaults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest

from ddrl_bus.errors import TopologyError
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.topology import Catalog, load
from ddrl_bus.topology.plan import most_columns
from ddrl_bus.topology.schema import (
    ActorOptions,
    EvaluatorOptions,
    InferenceOptions,
    LearnerOptions,
    ReplayOptions,
    Size,
    split_address,
)
from ddrl_bus.topology.show import terms
from ddrl_bus.topology.tree import came, resolve

from .fakes import (
    A3C,
    APEX,
    BASE,
    CATALOG,
    GA3C,
    GORILA,
    GORILA_GLOBAL,
    HEAD,
    SEED,
    SEED_R2D2,
    TOPOLOGIES,
    WIRING,
    Config,
    load_text,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("6e-4", 6e-4),
        ("1E5", 1e5),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("+7", 7),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_0.2_5", 10.25),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("22:22", "22:22"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("nan", "nan"),
        ("1.2.3", "1.2.3"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars_are_typed_as_people_expect(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2ms", 0.002), ("500us", 0.0005), ("1s", 1.0), ("1.5 s", 1.5), ("5m", 300.0), ("1h", 3600.0), ("7", 7.0)],
)
def test_durations_are_seconds(text: str, seconds: float, tmp_path: Path) -> None:
    assert load_text(tmp_path, BASE + f"grace: {text}\n").grace == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "size"), [("64MiB", 64 << 20), ("2 GiB", 2 << 30), ("1.5KiB", 1536), ("7B", 7), (123, 123)]
)
def test_sizes_are_bytes(value: object, size: int) -> None:
    assert pydantic.TypeAdapter(Annotated[Size, pydantic.Strict()]).validate_python(value) == size


@pytest.mark.parametrize("value", ["64MB", "-1KiB", "0.3B", "", True, None, -1])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(Annotated[Size, pydantic.Strict()]).validate_python(value)


def test_defaults(tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE)
    assert (plan.seed, plan.port, plan.grace) == (1, 7077, 10.0)
    assert (plan.checkpoint.every, plan.checkpoint.keep) == (60.0, 3)
    assert (plan.stop.reward, plan.stop.steps, plan.stop.time) == (None, None, None)
    assert plan.env.vectorization == "auto"
    assert plan.algo == Config()
    assert list(plan.nodes) == ["actor-0", "actor-1", "learner-0", "evaluator-0", "controller-0"]
    assert plan.nodes["evaluator-0"].options == EvaluatorOptions(host=("local",))
    assert {node.host for node in plan.nodes.values()} == {"local"}


def test_algorithm_settings_become_its_own_config(tmp_path: Path) -> None:
    text = BASE.replace("impala", "impala, lr: 3e-4, hidden: [32], reduction: mean, clip: null, anneal: true")
    plan = load_text(tmp_path, text)
    assert plan.algo == Config(lr=3e-4, hidden=(32,), reduction="mean", clip=None, anneal=True)
    assert type(plan.algo) is Config


def test_groups_may_have_names_of_their_own(tmp_path: Path) -> None:
    nodes = "nodes: {fast: {kind: actor, envs: 64}, slow: {kind: actor, count: 2}, learner: }\n"
    plan = load_text(tmp_path, HEAD + nodes)
    assert [n for n in plan.nodes if plan.nodes[n].kind == "actor"] == ["fast-0", "slow-0", "slow-1"]
    assert plan.links["trajectories"].sources == ("fast", "slow")
    assert plan.links["weights"].targets == ("fast", "slow", "evaluator")


def test_links_may_name_groups_or_their_kind(tmp_path: Path) -> None:
    nodes = "nodes: {fast: {kind: actor, envs: 64}, slow: {kind: actor}, learner: {}}\n"
    written = "links: {trajectories: {from: actor, window: 3}, weights: {to: [evaluator, slow, fast]}}\n"
    plan = load_text(tmp_path, HEAD + nodes + written)
    assert plan.links["trajectories"].sources == ("fast", "slow")
    assert plan.links["trajectories"].window == 3
    assert plan.links["weights"].targets == ("fast", "slow", "evaluator")


def test_the_algorithms_wiring_is_used_when_links_are_left_out(tmp_path: Path) -> None:
    written = "links:\n  trajectories: {kind: queue, from: actor, to: learner, window: 2}\n"
    written += "  weights: {kind: latest, from: learner, to: [actor, evaluator]}\n"
    assert load_text(tmp_path, BASE) == load_text(tmp_path, BASE + written)
    assert list(load_text(tmp_path, BASE).links) == ["trajectories", "weights", "progress", "control"]


def test_an_evaluator_is_left_out_by_a_count_of_zero(tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE, "nodes.evaluator.count=0")
    assert "evaluator-0" not in plan.nodes
    assert plan.links["weights"].targets == ("actor",)


def test_lock_step_fits_when_one_round_is_one_batch(tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE, "links.trajectories={window: 1, max_lag: 0}")
    assert (plan.links["trajectories"].window, plan.links["trajectories"].max_lag) == (1, 0)


def test_a_file_picks_its_links_among_the_ports(tmp_path: Path) -> None:
    """What it writes replaces the algorithm's wiring; at an end that it leaves out is whoever may be there."""
    plan = load_text(tmp_path, SEED)
    ends = {name: (link.kind, link.sources, link.targets) for name, link in plan.links.items()}
    del ends["progress"], ends["control"]
    assert ends == {
        "act": ("request", ("actor",), ("inference",)),
        "trajectories": ("queue", ("inference",), ("learner",)),
        "weights": ("latest", ("learner",), ("inference", "evaluator")),
    }
    assert plan.links["trajectories"].window == 2
    assert plan.groups["inference"] == InferenceOptions(host=("local",))


def test_a_file_that_writes_its_links_takes_nothing_from_the_algorithms(tmp_path: Path) -> None:
    wiring = {"trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 1, "max_lag": 0}}
    entry = dataclasses.replace(CATALOG.algorithms["impala"], wiring={**WIRING, **wiring})
    catalog = Catalog({"impala": entry})
    assert load_text(tmp_path, BASE, catalog=catalog).links["trajectories"].max_lag == 0
    plan = load_text(tmp_path, GA3C, catalog=catalog)
    assert (plan.links["trajectories"].window, plan.links["trajectories"].max_lag) == (2, None)
    assert load_text(tmp_path, plan.lock(), catalog=catalog) == plan


def test_overrides_may_add_a_link_to_those_of_a_file_or_an_algorithm(tmp_path: Path) -> None:
    changes = ("nodes.inference={}", "links.act={}", "links.weights.to=[inference, evaluator]")
    assert load_text(tmp_path, BASE, *changes).links.keys() == load_text(tmp_path, GA3C).links.keys()
    written = "links: {trajectories: {from: actor}, weights: {}}\n"
    assert load_text(tmp_path, BASE + written, *changes).links.keys() == load_text(tmp_path, GA3C).links.keys()


def test_central_inference_fills_any_batch(tmp_path: Path) -> None:
    """How many columns its unrolls have is not the actors' to say."""
    assert load_text(tmp_path, SEED, "algo.batch=4096").algo.batch == 4096


@pytest.mark.parametrize("value", [3, "auto"])
def test_predictors_and_trainers_are_counted_or_found(value: Any, tmp_path: Path) -> None:
    nodes = (f"nodes.inference={{predictors: {value}, wait: 2ms}}", f"nodes.learner.trainers={value}")
    plan = load_text(tmp_path, GA3C, *nodes)
    assert plan.groups["inference"] == InferenceOptions(predictors=value, wait=0.002, host=("local",))
    assert plan.groups["learner"] == LearnerOptions(trainers=value, delay=0, host=("local",))


# ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [BASE, SEED])
def test_several_learners_are_replicas_of_one_another(text: str, tmp_path: Path) -> None:
    plan = load_text(tmp_path, text, "nodes.learner.count=2", "nodes.learner.deadline=2500ms")
    sync = plan.links["sync"]
    assert (sync.kind, sync.sources, sync.targets, sync.insecure) == ("latest", ("learner",), ("learner",), False)
    assert plan.groups["learner"] == LearnerOptions(count=2, deadline=2.5, host=("local",))
    assert load_text(tmp_path, text, "nodes.learner.count=2", "insecure=true").links["sync"].insecure


def test_ppo_with_learners_that_share_actors_is_refused_with_a_way_out() -> None:
    with pytest.raises(TopologyError, match=r"each of 2 learners plays with actors of its own: give .* one bundle"):
        load(TOPOLOGIES / "ppo.yaml", overrides=["nodes.learner.count=2"], catalog=catalog(), environ={})


def test_ddppo_is_ppo_with_replicas() -> None:
    plan = load(
        TOPOLOGIES / "ddppo.yaml", overrides=["nodes.learner.count=3", "nodes.actor.count=3"], catalog=catalog()
    )
    assert (plan.algo_name, plan.algo.preempt, plan.algo.preempt_after) == ("ppo", 0.6, 0.25)
    assert plan.links["trajectories"].max_lag == 0
    assert [node.process for node in plan.nodes.values()][:6] == [f"worker-{n}" for n in (0, 1, 2, 0, 1, 2)]


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "trajectories", "weights"),
    [
        (APEX, ("actor",), ("actor", "evaluator")),
        (SEED_R2D2, ("inference",), ("inference", "evaluator")),
        (GORILA, ("actor",), ("actor",)),
        (GORILA_GLOBAL, ("actor",), ("actor",)),
    ],
    ids=["apex", "seed_r2d2", "gorila", "gorila, global replay"],
)
def test_replay_stands_between_those_who_play_and_those_who_learn(
    text: str, trajectories: tuple[str, ...], weights: tuple[str, ...], tmp_path: Path
) -> None:
    links = load_text(tmp_path, text).links
    assert (links["trajectories"].sources, links["trajectories"].targets) == (trajectories, ("replay",))
    assert (links["samples"].kind, links["samples"].sources, links["samples"].targets) == (
        "request",
        ("learner",),
        ("replay",),
    )
    assert (links["weights"].sources, links["weights"].targets) == (("learner",), weights)


def test_a_rule_that_replays_is_wired_to_a_replay(tmp_path: Path) -> None:
    head, _, _ = APEX.partition("links:")
    assert load_text(tmp_path, head) == load_text(tmp_path, APEX)


@pytest.mark.parametrize(
    ("text", "count"), [(A3C.replace("param_server: {}", "param_server: {count: 4}"), 4), (GORILA, 2)]
)
def test_parameters_may_have_several_servers(text: str, count: int, tmp_path: Path) -> None:
    plan = load_text(tmp_path, text)
    servers = [f"param_server-{shard}" for shard in range(count)]
    assert list(plan.ports("learner-1")["gradients"].peers) == servers
    assert list(plan.ports("evaluator-0")["parameters"].peers) == servers


def test_a_replay_keeps_a_ratio(tmp_path: Path) -> None:
    change = (
        "nodes.replay={count: 2, capacity: 50_000, min_size: 500, samples_per_insert: 8, slack: 672.0, save: false}"
    )
    plan = load_text(tmp_path, APEX, change)
    assert plan.groups["replay"] == ReplayOptions(
        count=2, capacity=50_000, min_size=500, samples_per_insert=8, slack=672, save=False, host=("local",)
    )


@pytest.mark.parametrize(("text", "columns"), [(APEX, 8), (SEED_R2D2, 4), (GORILA, 8)])
def test_an_unroll_has_the_columns_of_an_actor_or_of_a_part_that_asks(text: str, columns: int, tmp_path: Path) -> None:
    plan = load_text(tmp_path, text.replace("nodes: {", "nodes: {none: {kind: actor, envs: 64, count: 0}, "))
    assert most_columns(plan.groups, plan.links) == columns


def test_a_replay_fills_any_batch(tmp_path: Path) -> None:
    assert load_text(tmp_path, APEX, "algo.batch=4096", "links.trajectories.window=1").algo.batch == 4096


@pytest.mark.parametrize(("written", "rate"), [("10MiB", 10 << 20), ("1.5KiB", 1536), ("1000", 1000)])
def test_a_queue_may_bound_what_each_sender_puts_on_it(tmp_path: Path, written: str, rate: int) -> None:
    assert load_text(tmp_path, BASE).links["trajectories"].rate is None
    plan = load_text(tmp_path, BASE, f"links.trajectories.rate={written}")
    assert plan.links["trajectories"].rate == rate
    assert f"rate: {rate}" in plan.lock()


def test_a_publisher_may_be_bound_too(tmp_path: Path) -> None:
    plan = load_text(tmp_path, BASE, "links.weights.rate=10MiB")
    assert plan.links["weights"].rate == 10 << 20
    assert "rate 10MiB/s" in terms(plan.links["weights"])
    assert load_text(tmp_path, plan.lock()).links["weights"].rate == 10 << 20


def test_a_link_may_name_its_codec(tmp_path: Path) -> None:
    assert load_text(tmp_path, BASE).links["trajectories"].codec == "auto"
    assert load_text(tmp_path, BASE, "links.trajectories.codec=lz4").links["trajectories"].codec == "lz4"
    assert load_text(tmp_path, BASE, "links.weights.codec=delta").links["weights"].codec == "delta"


# ── variables ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "environ", "value"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("'${A}'", {"A": "3"}, 3),
        ("${A}", {"A": "3e-4"}, 3e-4),
        ("${A}", {"A": "[1, 2]"}, "[1, 2]"),
        ("${A}", {"A": "${B}", "B": "x"}, "${B}"),
        ("v${A}", {"A": "3"}, "v3"),
        ("'${A}${B}'", {"A": "1", "B": "2"}, "12"),
        ("${A:-7}", {}, 7),
        ("${A:-7}", {"A": ""}, 7),
        ("${A:-7}", {"A": "8"}, 8),
        ("${A:-a:-b}", {}, "a:-b"),
        ("'${A:?say it}'", {"A": "x"}, "x"),
        ("$${A}", {}, "${A}"),
        ("$$${A}", {"A": "x"}, "$${A}"),
        ("$A $", {}, "$A $"),
    ],
)
def test_variables(text: str, environ: dict[str, str], value: object, tmp_path: Path) -> None:
    plan = load_text(
        tmp_path, f"{BASE}".replace("{id: CartPole-v1}", f"\n  id: x\n  kwargs:\n    v: {text}"), environ=environ
    )
    assert plan.env.kwargs["v"] == value
    assert type(plan.env.kwargs["v"]) is type(value)


def test_an_overridden_variable_need_not_be_set(tmp_path: Path) -> None:
    assert load_text(tmp_path, BASE + "seed: ${SEED:?which}\n", "seed=4").seed == 4


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides_reach_every_section(tmp_path: Path) -> None:
    plan = load_text(
        tmp_path,
        BASE + "stop: {reward: 475}\n",
        "seed=7",
        "algo.lr=3e-4",
        "algo.hidden=[32, 32]",
        "nodes.actor.count=4",
        "nodes.evaluator.every=2ms",
        "links.trajectories.window=3",
        "stop.reward=",
        "checkpoint.every=5m",
        "env.kwargs={sutton_barto_reward: true}",
        "name=a=b",
        "name=other",
    )
    assert plan.seed == 7
    assert plan.algo == Config(lr=3e-4, hidden=(32, 32))
    assert plan.nodes["actor-3"].options == ActorOptions(count=4, envs=32, host=("local",))
    assert plan.groups["evaluator"] == EvaluatorOptions(every=0.002, host=("local",))
    assert (plan.links["trajectories"].window, plan.links["weights"].targets) == (3, ("actor", "evaluator"))
    assert plan.stop.reward is None
    assert plan.checkpoint.every == 300
    assert plan.env.kwargs == {"sutton_barto_reward": True}
    assert plan.name == "other"


# ── extends ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "root.yaml").write_text(BASE + "stop: {steps: 5}\nseed: 2\n")
    (tmp_path / "base" / "mid.yaml").write_text("extends: root.yaml\nalgo: {hidden: [1, 2, 3], lr: 1.0}\n")
    plan = load_text(
        tmp_path,
        "extends: base/${MID}.yaml\nseed: 3\nnodes: {actor: {count: 3}}\nalgo: {hidden: [9]}\nstop: {time: 1h}\n",
        environ={"MID": "mid"},
    )
    assert plan.seed == 3
    assert plan.algo == Config(lr=1.0, hidden=(9,))
    assert plan.groups["actor"] == ActorOptions(count=3, envs=32, host=("local",))
    assert (plan.stop.steps, plan.stop.time) == (5, 3600)


def test_a_file_may_be_named_by_a_symlink_and_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    plan = load_text(tmp_path, b"\xef\xbb\xbf" + BASE.encode())
    (tmp_path / "link.yaml").symlink_to("t.yaml")
    assert load(tmp_path / "link.yaml", catalog=CATALOG, environ={}) == plan


# ── small parts ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("10.0.0.1", ("10.0.0.1", None)),
        ("10.0.0.1:7100", ("10.0.0.1", 7100)),
        ("localhost", ("127.0.0.1", None)),
        ("GPU0.lan", ("gpu0.lan", None)),
        ("gpu0:1", ("gpu0", 1)),
        ("::1", ("[::1]", None)),
        ("[FD00::5]:80", ("[fd00::5]", 80)),
        ("[fd00::5]", ("[fd00::5]", None)),
        ("*", None),
        ("0.0.0.0", None),
        ("[::]:1", None),
        ("224.0.0.1", None),
        ("fe80::1%eth0", None),
        ("1.2.3", None),
        ("", None),
        (":7077", None),
        ("a:0", None),
        ("a b", None),
        ("-a", None),
        ("[gpu0]", None),
        ("eth0;evil", None),
    ],
)
def test_addresses(text: str, split: Any) -> None:
    assert split_address(text) == split


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        ({}, "a mapping"),
        ((1,), "a list"),
        ("\x1b[31m", r"'\x1b[31m'"),
        ("x" * 100, f"'{'x' * 76}..."),
        ("ε", "'ε'"),
    ],
)
def test_values_are_shown_on_one_safe_line(value: object, text: str) -> None:
    assert came(value) == text
