"""Logs: JSON lines in the run directory, warnings for people on stderr."""

from __future__ import annotations

import heapq
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

FOLDER: Final = "logs"


class NodeLog(logging.FileHandler):
    """Writes one JSON object a line; `shown` is the last exception that was written with its traceback."""

    shown: BaseException | None = None

    def __init__(self, run_dir: Path, node: str) -> None:
        super().__init__(path_of(run_dir, node), encoding="utf-8")
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "node": self._node,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1]:
            self.shown = record.exc_info[1]
            line["exception"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class OneLine(logging.Formatter):
    """`node: message`, with an exception's type and words but not its traceback: that is in the log."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        words = f"{record.getMessage()}: {type(error).__name__}: {error}" if error else record.getMessage()
        return f"{self._node}: {words}"


def path_of(run_dir: Path, node: str) -> Path:
    return run_dir / FOLDER / f"{node}.log"


@contextmanager
def attached(run_dir: Path, node: str, logger: logging.Logger) -> Iterator[NodeLog]:
    """Write `logger` to the node's log from INFO on, and to stderr from WARNING on."""
    log = NodeLog(run_dir, node)
    people = logging.StreamHandler(sys.stderr)
    people.setLevel(logging.WARNING)
    people.setFormatter(OneLine(node))
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in (log, people):
        logger.addHandler(handler)
    try:
        yield log
    finally:
        logger.setLevel(level)
        for handler in (log, people):
            logger.removeHandler(handler)
            handler.close()


def last_exception(path: Path, since: int = 0) -> str | None:
    """The traceback that the log holds last, looking from byte `since` on."""
    found = None
    for record in _records(path, since):
        found = record.get("exception", found)
    return found


def merged(run_dir: Path) -> Iterator[str]:
    """All nodes' logs of a run in order of time, as lines for people."""
    files = [_records(path) for path in sorted((run_dir / FOLDER).glob("*.log"))]
    for record in heapq.merge(*files, key=lambda record: str(record.get("time", ""))):
        yield "{time}  {level:<8} {node:<14} {message}".format_map(record)
        yield from (f"    {line}" for line in record.get("exception", "").splitlines())


def _records(path: Path, since: int = 0) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(since)
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # torn by a kill
                if isinstance(record, dict) and record.keys() >= {"time", "level", "node", "message"}:
                    yield record
    except OSError:
        return
