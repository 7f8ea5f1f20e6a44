import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddrl_bus.errors import EnvError
from ddrl_bus.launch import logs


@contextmanager
def logger_to(tmp_path: Path) -> Iterator[tuple[logging.Logger, logs.NodeLog]]:
    (tmp_path / "logs").mkdir(exist_ok=True)
    logger = logging.Logger("test")
    with logs.attached(tmp_path, "actor-0", logger) as log:
        yield logger, log
    assert not logger.handlers


def fail(logger: logging.Logger) -> Exception:
    try:
        raise EnvError("no such\nenv")
    except EnvError as error:
        logger.exception("failed")
        return error


def records(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in logs.path_of(tmp_path, "actor-0").read_text().splitlines()]


def test_a_record_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger_to(tmp_path) as (logger, _):
        logger.info("state=%s", "running")
        logger.debug("not this")

    (record,) = records(tmp_path)
    assert record.pop("time").endswith("Z")
    assert record == {"level": "INFO", "node": "actor-0", "logger": "test", "message": "state=running"}
    assert capsys.readouterr().err == ""


def test_an_exception_is_whole_in_the_log_and_short_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger_to(tmp_path) as (logger, log):
        error = fail(logger)

    assert "Traceback" in records(tmp_path)[0]["exception"]
    assert "EnvError: no such\nenv" in records(tmp_path)[0]["exception"]
    assert capsys.readouterr().err == "actor-0: failed: EnvError: no such\nenv\n"
    assert log.shown is error


def test_last_exception_of_a_life(tmp_path: Path) -> None:
    path = logs.path_of(tmp_path, "actor-0")
    with logger_to(tmp_path) as (logger, _):
        fail(logger)
        size = path.stat().st_size
        logger.info("started again")

    assert "EnvError" in (logs.last_exception(path) or "")
    assert logs.last_exception(path, size) is None
    assert logs.last_exception(tmp_path / "none") is None


def test_logs_are_merged_by_time_and_torn_lines_left_out(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()

    def line(time: str, node: str) -> str:
        return json.dumps({"time": time, "level": "INFO", "node": node, "message": "m", "exception": "a\nb"}) + "\n"

    (tmp_path / "logs" / "b.log").write_text(line("2026-01-01", "b") + line("2026-01-03", "b"))
    (tmp_path / "logs" / "c.log").write_text(line("2026-01-02", "c") + '{"time": "2026')

    lines = list(logs.merged(tmp_path))
    assert [text.split()[:3] for text in lines[::3]] == [
        ["2026-01-01", "INFO", "b"],
        ["2026-01-02", "INFO", "c"],
        ["2026-01-03", "INFO", "b"],
    ]
    assert lines[1:3] == ["    a", "    b"]
