import json
from pathlib import Path

import pytest

from ddrl_bus.launch import closing
from ddrl_bus.transport.ledger import Ledger

LANE = "trajectories/actor-0@01>learner-0@01"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "ledger").mkdir()
    return tmp_path


def page(run_dir: Path, life: str, **counts: int) -> None:
    ledger = Ledger(run_dir / "ledger" / f"{life}.page")
    for what, count in counts.items():
        ledger.counter(LANE, what).add(count)
    ledger.close()


def told(run_dir: Path, life: str, **counts: int) -> None:
    counters = {f"{LANE}/{what}": count for what, count in counts.items()}
    (run_dir / "ledger" / f"{life}.json").write_text(json.dumps(counters))


def test_books_close_over_pages_and_what_was_told(run_dir: Path) -> None:
    told(run_dir, "actor-0@01", produced=10)
    page(run_dir, "learner-0@01", accepted=9, taken=9, refused=1)

    books = closing.books(run_dir)
    assert books["closed"] is True
    assert books["lost"] == 0
    assert books["links"]["trajectories"]["produced"] == 10


def test_a_page_is_nearer_the_truth_than_what_was_told(run_dir: Path) -> None:
    told(run_dir, "actor-0@01", produced=10)
    page(run_dir, "actor-0@01", produced=12)
    page(run_dir, "learner-0@01", accepted=10, taken=10)

    books = closing.books(run_dir)
    assert (books["closed"], books["lost"]) == (True, 2)


def test_books_that_do_not_close(run_dir: Path) -> None:
    page(run_dir, "learner-0@01", accepted=1, taken=1)

    assert closing.books(run_dir)["closed"] is False


def test_closing_object_of_a_finished_run(run_dir: Path) -> None:
    result = {"reason": "reward", "return": 480.0, "env_steps": 200_000, "updates": 150, "steps_per_s": 6e4}
    result |= {"first_update_s": 3.5, "overhead": {"actor-0": 0.04, "learner-0": None}}
    result |= {"shares": {"actor-0": {"env": 0.96, "pack": 0.04, "send_wait": 0.1, "overhead": 0.04}}}
    (run_dir / "result.json").write_text(json.dumps(result))
    page(run_dir, "actor-0@01", produced=3)
    page(run_dir, "learner-0@01", accepted=2, taken=2)

    closed = closing.close(run_dir, seed=3, started=0.0, restarts=1)
    assert closed == json.loads((run_dir / "closing.json").read_text())
    assert closed.items() >= result.items()
    assert closed["wall_s"] > 1e9
    assert (closed["run_dir"], closed["seed"], closed["restarts"]) == (str(run_dir), 3, 1)
    text = closing.as_text(closed)
    assert "reward: return 480.0 after 200,000 env steps and 150 updates" in text
    assert "communication overhead: actor-0 4.0%\n" in text
    assert "  actor-0: pack 4.0%; env 96.0%; waiting for peers: send_wait 10.0%\n" in text
    assert "ledger of trajectories: closed; produced 3, accepted 2, lost 1, taken 2\n" in text
    assert "restarts: 1\n" in text


def test_closing_object_where_the_controller_never_said_a_word(run_dir: Path) -> None:
    closed = closing.close(run_dir, seed=1, started=0.0, restarts=0, reason="failed")

    assert closed["reason"] == "failed"
    assert closed["return"] is None
    assert closed["ledger"] == {"closed": True, "lost": 0, "links": {}}
    assert closing.as_text(closed).startswith("failed: return - after - env steps")
