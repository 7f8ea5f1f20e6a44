"""A real run with its control, and books in which the answer is known."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import ddrl_bus
from ddrl_bus.bench import alone, limits, topology
from ddrl_bus.bench.books import Books, Lives
from ddrl_bus.bench.report import Row
from ddrl_bus.errors import UsageError
from ddrl_bus.launch.start import plan_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command finds this checkout."""
    path = os.pathsep.join(filter(None, (str(Path(ddrl_bus.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)


def test_a_real_run(here: None) -> None:
    rows: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in topology.measure("quickstart", ["nodes.evaluator.count=0"], seconds=1):
        rows[row.section][row.name] = row
    times, links = rows["time of a node, %"], rows["a link"]
    for group in ("actor", "learner"):
        values = {name: figure.median for name, figure in times[group].figures.items()}
        derived = ("overhead", "overhead, busy", "back-pressure", "busy")
        assert sum(share for name, share in values.items() if name not in derived) == pytest.approx(100)
        assert 0 < values["overhead"] <= values["overhead, busy"] < 100
    assert links["trajectories"].figures["a message"].median > 20 * 32 * 4 * 4  # rows × environments × floats
    assert links["weights"].figures["on the wire"].median > 0
    assert {"actors (env)", "learner"} <= rows[limits.SECTION].keys()
    (whole,), (against,) = rows["the run"].values(), rows["env steps, with and without a bus"].values()
    over, without, ratio = (figure.median for figure in against.figures.values())
    assert over == whole.figures["env steps"].median > 0
    assert ratio == over / without > 0


@pytest.mark.parametrize("name", ["apex", "r2d2", "seed"])
def test_the_loop_without_a_bus(name: str) -> None:
    """Whoever the nodes are, and whether or not they replay."""
    torch.set_num_threads(1)
    plan = plan_of(name, ["nodes.replay.min_size=60"] if name != "seed" else [], probe=False)
    loop = alone.training(plan)
    before = loop.learner.weights()
    for _ in range(3):
        loop.update()
    loop.close()
    assert loop.learner.updates == 3
    assert loop.learner.env_steps > 0
    assert any((before[name] != array).any() for name, array in loop.learner.weights().items())


LANE = "actor-0@0000000100000001>learner-0@1"
BEFORE: Lives = {"actor-0@0000000100000001": {"time/weights_wait": 90 * 10**9, "trajectories/bytes_out": 500}}
AFTER: Lives = {
    "actor-0@0000000100000001": {
        **{f"time/{what}": s * 10**9 for what, s in {"env": 6, "pack": 1, "send": 1, "send_wait": 2}.items()},
        "time/weights_wait": 90 * 10**9,
        f"trajectories/{LANE}/produced": 20,
        "trajectories/bytes_out": 2500,
        "trajectories/bytes_raw_out": 8000,
        "trajectories/encode_ns": 10**8,
        "trajectories/send_wait_ns": 2 * 10**9,
        "env_steps": 50,
    },
    "actor-1@0000000100000001": {"time/env": 10 * 10**9, "env_steps": 50},
    "learner-0@0000000100000001": {
        "time/learn": 8 * 10**9,
        "time/queue_wait": 2 * 10**9,
        f"trajectories/{LANE}/taken": 10,
        "trajectories/queue_wait_ns": 10**9,
        "trajectories/wire_ns": 2 * 10**9,
        "trajectories/decode_ns": 10**9,
    },
}


@pytest.fixture
def books() -> Books:
    """Ten seconds of two actors and a learner."""
    return Books(BEFORE, AFTER, seconds=10)


def test_where_a_node_spends_its_time(books: Books) -> None:
    assert books.groups == ["actor", "learner"]
    time = books.time("actor")
    assert (time["env"], time["pack"], time["send"], time["send_wait"]) == pytest.approx((80, 5, 5, 10))
    assert (time["overhead"], time["back-pressure"], time["overhead, busy"]) == pytest.approx((10, 10, 12.5))
    assert time["busy"] == pytest.approx(90)
    assert books.count("env_steps") == 100


def test_what_a_link_carries_and_how_long_it_takes(books: Books) -> None:
    assert dict(books.links()) == {
        "trajectories": {
            "messages": 2,
            "on the wire": 0.2,
            "before codec": 0.8,
            "a message": 100,
            "encode": 5e3,
            "send-wait": 1e5,
            "wire": 2e5,
            "queue-wait": 1e5,
            "decode": 1e5,
        }
    }


def test_what_binds(books: Books) -> None:
    used = limits.used(plan_of("quickstart", probe=False), books, cpu_s=10 * limits.cores() * 0.45)
    assert (used.actors, used.actor_busy) == (2, pytest.approx(90))
    assert used.of["learner"] == pytest.approx(80)
    assert used.full_at("learner") == pytest.approx(2 * 0.9 / 0.8)
    assert used.full_at(f"cores ({limits.cores()})") == pytest.approx(4)
    assert used.of["codec"] == pytest.approx(10)
    order = [row.name.partition(" (")[0] for row in limits.rows(plan_of("quickstart", probe=False), [(books, 9.0)])]
    assert order[:2] == ["actors", "learner"]


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [("quickstat", [], "did you mean 'quickstart'"), ("quickstart", ["algo.lrr=1"], "algo.lrr: unknown key")],
)
def test_what_is_refused(here: None, name: str, overrides: list[str], words: str) -> None:
    with (
        contextlib.closing(topology.measure(name, overrides, seconds=1)) as rows,
        pytest.raises(UsageError, match=words),
    ):
        next(rows)
