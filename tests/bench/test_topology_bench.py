"""A real run, and books in which the answer is known."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

import ddrl_bus
from ddrl_bus.bench import topology
from ddrl_bus.errors import UsageError
from ddrl_bus.transport.ledger import Ledger

CLOSING = {"env_steps": 1000, "steps_per_s": 500.0, "updates": 20, "ledger": {"lost": 0}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command finds this checkout."""
    path = os.pathsep.join(filter(None, (str(Path(ddrl_bus.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)


def test_a_real_run(here: None) -> None:
    overrides = ["nodes.evaluator.count=0", "stop.steps=60000"]
    rows = {row.name: row for row in topology.measure("quickstart", overrides, seconds=200)}
    assert {"actor", "learner", "trajectories", "weights", "quickstart"} <= rows.keys()
    for group in ("actor", "learner"):
        values = {name: figure.median for name, figure in rows[group].figures.items()}
        derived = ("overhead", "overhead, busy", "back-pressure")
        assert sum(share for name, share in values.items() if name not in derived) == pytest.approx(100)
        assert 0 < values["overhead"] <= values["overhead, busy"] < 100
    assert rows["trajectories"].figures["a message"].median > 20 * 32 * 4 * 4  # rows × environments × floats
    assert rows["quickstart"].figures["env steps"].median > 0


def test_where_a_node_spends_its_time(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "meta.json").write_text('{"name": "made-up", "seed": 1}')
    for name, times in {
        "actor-0@0000000100000001": {"env": 60, "pack": 10, "send": 10, "send_wait": 20},
        "actor-1@0000000100000001": {"env": 100},
    }.items():
        ledger = Ledger(tmp_path / "ledger" / f"{name}.page")
        for what, percent in times.items():
            ledger.counter("time", what).add(percent * 10**9)
        ledger.counter("trajectories", f"{name}>learner-0@1", "produced").add(10)
        ledger.counter("trajectories", "bytes_out").add(1000)
        ledger.counter("trajectories", "bytes_raw_out").add(4000)
        ledger.close()
    run = topology.Run(tmp_path, CLOSING)
    assert run.groups == ["actor"]
    times = run.times["actor"]
    assert (times["env"], times["pack"], times["send"], times["send_wait"]) == pytest.approx((80, 5, 5, 10))
    assert (times["overhead"], times["back-pressure"], times["overhead, busy"]) == pytest.approx((10, 10, 12.5))
    assert run.links == {
        "trajectories": {"messages": 10, "on the wire": 1, "before codec": 4, "a message": 100},  # within two seconds
    }


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
