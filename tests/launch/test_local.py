"""The supervisor over small programs in place of nodes; tests/test_cli.py has it over real ones."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from ddrl_bus.errors import UnreachableError
from ddrl_bus.launch import local
from ddrl_bus.launch.local import Supervisor
from ddrl_bus.launch.remote import Status
from ddrl_bus.launch.start import plan_of

HEAD = """
import os, pathlib, signal, subprocess, sys, time
folder, node = pathlib.Path(sys.argv[1]), sys.argv[2]
with (folder / f"{node}.pids").open("a") as pids:
    pids.write(f"{os.getpid()}\\n")
life = len((folder / f"{node}.pids").read_text().split())
def finish(): (folder / "result.json").write_text("{}")
def wait(path):
    while not (folder / path).exists(): time.sleep(0.01)
"""
UNTIL_TERM = "signal.sigwait({signal.SIGTERM})"
"""Works until it is told to go."""
ONLY_KILL = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'deaf').touch()\ntime.sleep(600)"
BLOCK = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"


async def eventually(holds: Callable[[], bool]) -> None:
    """Other processes tell us nothing: look until it `holds`."""
    async with asyncio.timeout(100):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def is_gone(pid_file: Path) -> bool:
    """Whether the process has ended; as a zombie too, where a container's first process reaps nobody."""
    stat = Path(f"/proc/{int(pid_file.read_text())}/stat")
    return not stat.exists() or ") Z " in stat.read_text()


class Notes:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def show(self, status: Status) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Programs(Supervisor):
    """Starts the Python program given for a process instead of its nodes."""

    def __init__(
        self,
        folder: Path,
        programs: dict[str, str],
        *overrides: str,
        grace: float = 0.3,
        host: str = "local",
        remotes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        (folder / "logs").mkdir()
        self.notes = Notes()
        self.folder = folder
        self.programs = programs
        changes = [f"grace={grace}", "nodes.actor.count=1", *overrides]
        plan = plan_of("quickstart", changes, probe=False, fresh=True)
        super().__init__(plan, host, folder, self.notes, remotes=remotes)

    def _command(self, name: str) -> Sequence[str]:
        program = HEAD + BLOCK + self.programs.get(name, UNTIL_TERM)
        return [sys.executable, "-c", program, str(self.folder), name]

    @property
    def has_controller(self) -> bool:
        return False  # none that could be asked

    async def run(self) -> None:
        async with asyncio.timeout(100):
            await super().run()
        assert not self._processes
        for pids in self.folder.glob("*.pids"):
            for pid in map(int, pids.read_text().split()):
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    def lives(self, node: str) -> int:
        return len((self.folder / f"{node}.pids").read_text().split())

    def started(self) -> set[str]:
        return {pids.stem for pids in self.folder.glob("*.pids")}

    def heard(self, text: str) -> bool:
        return any(text in note for note in self.notes.said)

    async def until(self, *files: str) -> None:
        await eventually(lambda: all((self.folder / file).exists() for file in files))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(local, "TERM_S", 0.3)


FINISH = "finish()"


async def test_a_finished_controller_ends_the_run(tmp_path: Path) -> None:
    supervisor = Programs(tmp_path, {"controller-0": FINISH})
    await supervisor.run()

    assert supervisor.failure is None
    assert supervisor.restarts == 0
    assert supervisor.notes.said == []


async def test_a_host_without_the_controller_ends_when_its_nodes_left(tmp_path: Path) -> None:
    everybody = ("learner-0", "controller-0", "actor-0", "evaluator-0")
    supervisor = Programs(tmp_path, dict.fromkeys(everybody, ""), grace=200)
    began = time.monotonic()
    await supervisor.run()

    assert supervisor.restarts == 0
    assert time.monotonic() - began < 100


async def test_a_crashed_node_is_started_again(tmp_path: Path) -> None:
    actor = f"if life < 3: sys.exit('life %d' % life)\n(folder / 'third').touch()\n{UNTIL_TERM}"
    supervisor = Programs(tmp_path, {"actor-0": actor, "controller-0": "wait('third'); finish()"})
    await supervisor.run()

    assert supervisor.failure is None
    assert supervisor.restarts == 2
    assert supervisor.heard("actor-0 failed with exit code 1; restart 1 of 3 in 0.05 s")
    assert supervisor.heard("actor-0 failed with exit code 1; restart 2 of 3 in 0.1 s")


async def test_a_spent_budget_ends_the_run_and_shows_the_first_exception(tmp_path: Path) -> None:
    actor = "raise ValueError('in life %d' % life)"
    supervisor = Programs(tmp_path, {"actor-0": actor})
    await supervisor.run()

    assert supervisor.lives("actor-0") == 1 + local.RESTARTS
    assert supervisor.failure is not None
    assert supervisor.failure.exit_code == 1
    assert "Traceback" in str(supervisor.failure)
    assert "ValueError: in life 1" in str(supervisor.failure)
    assert f"{tmp_path}/logs/actor-0.log" in str(supervisor.failure)


async def test_old_crashes_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WITHIN_S", 0.0)
    actor = f"if life < 8: sys.exit(1)\n(folder / 'eighth').touch()\n{UNTIL_TERM}"
    supervisor = Programs(tmp_path, {"actor-0": actor, "controller-0": "wait('eighth'); finish()"})
    await supervisor.run()

    assert supervisor.failure is None
    assert supervisor.restarts == 7


@pytest.mark.parametrize("code", sorted(local.NOT_RETRIED))
async def test_what_a_restart_cannot_mend_ends_the_run_at_once(tmp_path: Path, code: int) -> None:
    supervisor = Programs(tmp_path, {"learner-0": f"sys.exit({code})"})
    await supervisor.run()

    assert supervisor.lives("learner-0") == 1
    assert supervisor.failure is not None
    assert supervisor.failure.exit_code == code


async def test_the_exception_in_the_log_is_the_one_shown(tmp_path: Path) -> None:
    record = {"time": "t", "level": "ERROR", "node": "actor-0", "message": "m", "exception": "EnvError: whole"}
    actor = f"(folder / 'logs/actor-0.log').write_text({json.dumps(record)!r})\nprint('talk')\nsys.exit(65)"
    supervisor = Programs(tmp_path, {"actor-0": actor})
    await supervisor.run()

    assert supervisor.failure is not None
    assert supervisor.failure.traceback == "EnvError: whole"
    assert supervisor.heard("talk")


async def test_a_killed_node_is_named_by_its_signal(tmp_path: Path) -> None:
    supervisor = Programs(tmp_path, {"actor-0": "os.kill(os.getpid(), signal.SIGKILL)"})
    await supervisor.run()

    assert supervisor.heard("actor-0 was killed by SIGKILL; restart 1 of 3")
    assert supervisor.failure is not None
    assert supervisor.failure.exit_code == 70


async def test_a_node_that_left_is_wanted_back_while_the_run_goes_on(tmp_path: Path) -> None:
    learner = f"if life == 1: sys.exit(0)\n(folder / 'back').touch()\n{UNTIL_TERM}"
    supervisor = Programs(tmp_path, {"learner-0": learner, "controller-0": "wait('back'); finish()"})
    await supervisor.run()

    assert supervisor.lives("learner-0") == 2
    assert supervisor.heard("learner-0 left, but the run goes on")


async def test_a_node_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    supervisor = Programs(tmp_path, {"actor-0": ONLY_KILL, "controller-0": "wait('deaf'); finish()"})
    await supervisor.run()

    assert supervisor.failure is None


async def test_the_first_signal_drains_and_a_second_one_kills(tmp_path: Path) -> None:
    supervisor = Programs(tmp_path, {"actor-0": ONLY_KILL}, grace=200)
    running = asyncio.create_task(supervisor.run())
    await supervisor.until("deaf", "learner-0.pids")
    os.kill(os.getpid(), signal.SIGINT)
    await eventually(lambda: len(supervisor._processes) == 1)  # the others do as they are told
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(100):
        await running

    assert supervisor.failure is None
    assert supervisor.heard("stopping")
    assert supervisor.heard("killing every node")


async def test_nothing_that_a_node_started_outlives_it(tmp_path: Path) -> None:
    """Nor does a child that holds the output open keep a dead node from being noticed."""
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    child += "(folder / 'children').write_text(str(child.pid))\nsys.exit(1)"
    supervisor = Programs(tmp_path, {"actor-0": child})
    began = time.monotonic()
    await supervisor.run()

    assert supervisor.failure is not None
    assert time.monotonic() - began < 100
    await eventually(lambda: is_gone(tmp_path / "children"))


async def test_a_cancelled_supervisor_leaves_nobody_behind(tmp_path: Path) -> None:
    supervisor = Programs(tmp_path, {"actor-0": ONLY_KILL})
    running = asyncio.create_task(supervisor.run())
    await supervisor.until("deaf")
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

    await eventually(lambda: is_gone(tmp_path / "actor-0.pids"))


async def test_long_lines_and_bytes_that_are_no_text_pass(tmp_path: Path) -> None:
    actor = r"os.write(2, b'\xff' + b'x' * 200_000 + b'\nend without newline'); sys.exit(65)"
    supervisor = Programs(tmp_path, {"actor-0": actor})
    await supervisor.run()

    assert sum(note.count("x") for note in supervisor.notes.said) >= 200_000
    assert supervisor.failure is not None
    assert supervisor.failure.traceback.endswith("end without newline")
    assert len(supervisor.failure.traceback) <= local.TAIL_BYTES


def test_the_slowest_start_first_and_kinds_that_are_not_there_cost_no_time(tmp_path: Path) -> None:
    ranks = local._ranks(Programs(tmp_path, {})._plans)
    assert list(ranks.items()) == [("learner-0", 0), ("actor-0", 1), ("controller-0", 2), ("evaluator-0", 3)]


BUNDLE = ("nodes.actor.bundle=w", "nodes.learner.bundle=w")


async def test_a_bundle_is_one_process_and_any_of_its_nodes_tells_why_it_failed(tmp_path: Path) -> None:
    record = {"time": "t", "level": "ERROR", "node": "learner-0", "message": "m", "exception": "EnvError: whole"}
    program = f"(folder / 'logs/learner-0.log').write_text({json.dumps(record)!r})\nsys.exit(65)"
    supervisor = Programs(tmp_path, {"w-0": program}, *BUNDLE)
    await supervisor.run()

    assert supervisor.started() <= {"w-0", "controller-0", "evaluator-0"}
    assert supervisor.failure is not None
    assert (supervisor.failure.process, supervisor.failure.traceback) == ("w-0", "EnvError: whole")
    assert supervisor.failure.log == tmp_path / "logs/learner-0.log"


async def test_a_crashed_bundle_is_one_crash(tmp_path: Path) -> None:
    program = f"if life < 2: os.kill(os.getpid(), signal.SIGKILL)\n(folder / 'second').touch()\n{UNTIL_TERM}"
    supervisor = Programs(tmp_path, {"w-0": program, "controller-0": "wait('second'); finish()"}, *BUNDLE)
    await supervisor.run()

    assert supervisor.failure is None
    assert supervisor.restarts == 1
    assert supervisor.heard("w-0 was killed by SIGKILL; restart 1 of 3")


# ── of several hosts ─────────────────────────────────────────────────────────────────────────────────────────────

FAR = ("hosts={gpu0: 127.0.0.1:28077, cpu1: 127.0.0.1}", "nodes.actor.host=cpu1", "nodes.actor.count=2")


async def test_a_share_ends_when_a_node_leaves_and_the_head_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that started too late to be told to drain is not left alone for ever."""
    monkeypatch.setattr(local.remote.Controller.status, "__defaults__", (0.2,))
    programs = {"actor-0": "wait('both')", "actor-1": f"(folder / 'both').touch()\n{UNTIL_TERM}"}
    supervisor = Programs(tmp_path, programs, *FAR, host="cpu1")
    await supervisor.run()

    assert supervisor.failure is None
    assert supervisor.lives("actor-0") == 1


async def test_a_head_that_is_lost_ends_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"HEAD_LOST_S": 0.3, "FAR_STATUS_S": 0.05}.items():
        monkeypatch.setattr(local, name, seconds)
    answers = iter([{"phase": "run", "nodes": {}}])

    async def status(_: object, timeout_s: float = 0) -> Any:
        try:
            return next(answers)
        except StopIteration:
            raise UnreachableError("gone") from None

    monkeypatch.setattr(local.remote.Controller, "status", status)
    supervisor = Programs(tmp_path, {}, *FAR, host="cpu1")
    await supervisor.run()

    assert isinstance(supervisor.failure, UnreachableError)
    assert str(supervisor.failure) == "the head has not answered for 0 s"


FAR_SHARE = "import sys; print('here'); sys.stdout.flush(); sys.stdin.read(); print('drained')"


async def test_a_remote_share_drains_when_its_stdin_ends_and_its_words_have_its_name(tmp_path: Path) -> None:
    remotes = {"ssh cpu1": [sys.executable, "-c", FAR_SHARE]}
    supervisor = Programs(tmp_path, {"actor-0": UNTIL_TERM}, remotes=remotes)
    running = asyncio.create_task(supervisor.run())
    await eventually(lambda: supervisor.heard("ssh cpu1 | here"))
    await supervisor.until("actor-0.pids")
    os.kill(os.getpid(), signal.SIGINT)
    await running

    assert supervisor.failure is None
    assert supervisor.heard("ssh cpu1 | drained")


async def test_an_ssh_that_gets_no_connection_ends_the_run(tmp_path: Path) -> None:
    remotes = {"ssh cpu1": [sys.executable, "-c", "import sys; print('Permission denied'); sys.exit(255)"]}
    supervisor = Programs(tmp_path, {"actor-0": UNTIL_TERM}, remotes=remotes)
    await supervisor.run()

    assert supervisor.failure is not None
    assert supervisor.failure.exit_code == 69
    assert supervisor.heard("ssh cpu1 failed with exit code 255; restart 3 of 3")
    assert str(supervisor.failure).endswith("failed with exit code 255\nPermission denied")
