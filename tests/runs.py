"""Real runs for tests: `ddrl` in processes of its own, watched from outside through the run directory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ddrl_bus
from ddrl_bus.errors import RemoteError, UnreachableError
from ddrl_bus.launch import closing, remote
from ddrl_bus.transport import ledger
from ddrl_bus.transport.ledger import Balance

PATIENCE_S = 120.0
"""Against hangs only: a busy machine takes long."""
ENVIRON = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(ddrl_bus.__file__).parents[1]), str(Path(__file__).parent)])
}
FOREVER = ("stop.reward=null", "stop.steps=null")
CALM = ("links.trajectories.rate=1MiB", "nodes.evaluator.count=0")
"""Some dozens of unrolls a second of each actor, and nobody evaluates: whoever waits leaves the cores to others."""
SMALL = ("nodes.evaluator.episodes=5", "nodes.evaluator.every=200ms")


def command(*words: str, name: str = "ddrl", prefix: Sequence[str] = ()) -> list[str]:
    return [*prefix, sys.executable, "-c", f"from ddrl_bus.cli import {name}; {name}(prog_name={name!r})", *words]


def eventually(holds: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """What `holds` returns once that is true: other processes tell us nothing."""
    deadline = time.monotonic() + patience_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}"
        time.sleep(0.02)
    return found


class Run:
    """One `ddrl run` (or one host's `ddrl-node`), from outside."""

    def __init__(self, folder: Path, argv: Sequence[str], environ: Mapping[str, str] = ENVIRON) -> None:
        self.folder = folder
        self._out, self._err = (folder.with_name(f"{folder.name}.{end}") for end in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, cwd=folder.parent
            )

    # ── who is there

    def lives(self) -> list[tuple[str, int]]:
        """(node, pid) of every life so far."""
        try:
            lines = (self.folder / "lives").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(line.split()[0], int(line.split()[2])) for line in lines]

    def pid(self, node: str, life: int = 1) -> int:
        """Of this life, once it has begun."""

        def found() -> int | None:
            pids = [pid for name, pid in self.lives() if name == node]
            return pids[life - 1] if len(pids) >= life else None

        pid: int = eventually(found, f"life {life} of {node}; said:\n{self.said}")
        return pid

    def kill(self, node: str) -> None:
        os.kill([pid for name, pid in self.lives() if name == node][-1], signal.SIGKILL)

    def alive(self) -> list[tuple[str, int]]:
        return [(node, pid) for node, pid in self.lives() if is_alive(pid)]

    # ── how it goes

    def status(self) -> dict[str, Any] | None:
        """What the controller says; None while it does not answer."""
        try:
            return asyncio.run(remote.status_of(self.folder))
        except (UnreachableError, RemoteError):
            return None

    def answers(self) -> dict[str, Any]:
        """What the controller says, once it does: on a busy machine not at once."""
        status: dict[str, Any] = self.until(self.status, "an answer of the controller")
        return status

    def counters(self, node: str) -> dict[str, int]:
        """Sum over all lives of a node, read from their pages: nobody needs to answer."""
        total: dict[str, int] = {}
        for page in (self.folder / "ledger").glob(f"{node}@*.page"):
            for name, count in ledger.read(page).items():
                total[name] = total.get(name, 0) + count
        return total

    def trained(self) -> int:
        return self.counters("learner-0").get("trajectories/trained", 0)

    def trains_on(self, messages: int = 20, what: str = "training") -> None:
        """Wait until so many unrolls more were trained on."""
        before = self.trained()
        self.until(lambda: self.trained() >= before + messages, what)

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        """`eventually`, while the run goes on."""

        def looked() -> Any:
            found = holds()
            assert found or self.process.poll() is None, f"the run ended before: {what}; said:\n{self.said}"
            return found

        return eventually(looked, f"{what}; said:\n{self.said}")

    @property
    def said(self) -> str:
        """Everything on stderr so far."""
        return self._err.read_text()

    # ── its end

    def ends(self, code: int = 0, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the end; the closing object."""
        try:
            found = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end; said:\n{self.said}") from None
        assert found == code, self.said
        text = self._out.read_text()
        return json.loads(text) if text else {}

    def books(self) -> Balance:
        """The trajectories of all lives."""
        return ledger.audit(closing.lives(self.folder))["trajectories"]

    def close(self) -> None:
        """Leave nobody behind, whatever happened."""
        for pid in [self.process.pid, *(pid for _, pid in self.lives())]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie, and one of ours."""
    process = Path(f"/proc/{pid}")
    try:
        return ") Z " not in (process / "stat").read_text() and b"ddrl" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def still(pid: int) -> bool:
    """Whether each thread of a process is stopped."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@contextmanager
def running(folder: Path, *words: str, name: str = "ddrl", topology: str = "quickstart") -> Iterator[Run]:
    """`ddrl run TOPOLOGY WORDS` in `folder`, which may hold an earlier run."""
    words = words if name != "ddrl" or "--resume" in words else (topology, "--run-dir", str(folder), *SMALL, *words)
    run = Run(folder, command(*(("run",) if name == "ddrl" else ()), "--json", *words, name=name))
    try:
        yield run
    finally:
        run.close()


def assert_closed(balance: Balance) -> None:
    """Every unroll is accounted for, exactly."""
    assert balance.closed, balance
    assert balance.produced == balance.accepted + balance.refused + balance.lost, balance
    assert balance.in_flight == 0, balance
