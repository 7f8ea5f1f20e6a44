"""The supervisor of one host's share of a run: a process per node, spawned, restarted, and none left behind.

Nodes of one index of a bundle share a process, and with it their fate. One that crashes is started again after
FIRST_DELAY_S, which doubles with each crash, until it crashed more than RESTARTS times within WITHIN_S; then everybody
is stopped and its first exception is shown. What a restart cannot mend (NOT_RETRIED) ends the run at once. One that
left by itself although the run goes on is started again after the grace time.

    the controller finished    others may drain for `grace`, then SIGTERM, then after TERM_S SIGKILL
    SIGINT, SIGTERM, SIGHUP    the controller is asked to drain everybody, then as above; where none answers: SIGTERM
    the same a second time     SIGKILL
    a node cannot go on        SIGTERM, after `grace` SIGKILL
    the controller elsewhere   has finished or is gone when a node leaves: as if it had finished here; silent for
                               HEAD_LOST_S: SIGTERM
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddrl_bus.errors import DdrlError, EnvError, FencedError, RemoteError, SecurityError, UnreachableError, UsageError
from ddrl_bus.launch import closing, logs, remote, run_dir
from ddrl_bus.launch.display import Display
from ddrl_bus.launch.hosts import Missing, head_of
from ddrl_bus.launch.node import INTERNAL
from ddrl_bus.topology import NodePlan, Plan

RESTARTS: Final = 3
WITHIN_S: Final = 60.0
FIRST_DELAY_S: Final = 0.5
NOT_RETRIED: Final = frozenset(e.exit_code for e in (UsageError, EnvError, FencedError, SecurityError))
SAID: Final = frozenset(e.exit_code for e in (UsageError, SecurityError))
"""Errors whose words say it all: where they were raised is in the log."""
STAGGER_S: Final = 0.4  # between kinds: all at once they would slow down the one that everybody waits for
TERM_S: Final = 3.0
STATUS_S: Final = 1.0
FAR_STATUS_S: Final = 5.0
HEAD_LOST_S: Final = 600.0
"""A share without the controller ends when that has not answered for so long, once it had."""
ADDED_LOST_S: Final = 60.0
"""The same for nodes that were added to a run, which can be added again."""
START_ORDER: Final[Sequence[str]] = (  # the slowest to start first
    "param_server",
    "learner",
    "replay",
    "inference",
    "actor",
    "controller",
    "relay",
    "evaluator",
)
SSH_FAILED: Final = 255
"""How ssh ends where there is no connection, or a signal ended what it started; our own processes never end so."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_BYTES: Final = 8192


@dataclass(frozen=True, slots=True)
class Failure:
    """How a life of a process ended that should not have."""

    process: str
    code: int
    """As of `subprocess`: negative for a signal."""
    traceback: str
    log: Path | None
    """None of another host's share: its nodes' logs are there."""
    at: float

    @property
    def exit_code(self) -> int:
        if self.code == SSH_FAILED:
            return UnreachableError.exit_code
        return self.code if self.code > 0 else INTERNAL

    def __str__(self) -> str:
        log = f"; its log is {self.log}" if self.log else ""
        return f"{self.process} on {platform.node()} {how(self.code)}{log}\n{self.traceback}".rstrip()


def how(code: int) -> str:
    return f"failed with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


class Supervisor:
    """Runs the nodes of one host.

    After `run`, `failure` is why the run was given up, if it was, and `restarts` counts the lives beyond each first.

    Args:
        lines: other host → what to type there.
        added: names of nodes that are added to the run, and all that this one runs.
        remotes: name → command of a process that runs another host's share, until its stdin ends (`launch/ssh.py`).
    """

    def __init__(
        self,
        plan: Plan,
        host: str,
        folder: Path,
        display: Display,
        *,
        lines: Mapping[str, str] | None = None,
        remotes: Mapping[str, Sequence[str]] | None = None,
        added: Sequence[str] = (),
    ) -> None:
        self.failure: Failure | UnreachableError | None = None
        self.restarts = 0
        self._plan = plan
        self._folder = folder
        self._display = display
        names = added or [node.process for node in plan.on_host(host)]
        self._plans: Mapping[str, Sequence[NodePlan]] = {name: plan.process(name) for name in names}
        self._host = host
        self._is_head = head_of(plan) == host and not added
        self._patience_s = ADDED_LOST_S if added else HEAD_LOST_S
        self._lines, self._remotes = lines or {}, remotes or {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._left: set[str] = set()
        self._ending = asyncio.Event()
        self._asked = False

    @property
    def has_controller(self) -> bool:
        return any(node.kind == "controller" for nodes in self._plans.values() for node in nodes)

    async def run(self) -> None:
        """Returns when every node of this host is gone."""
        with self._signals():
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch(), name="watch")
                ranks = dict.fromkeys(self._remotes, 0) | _ranks(self._plans)
                keepers = [tasks.create_task(self._keep(name, STAGGER_S * ranks[name]), name=name) for name in ranks]
                await self._ending.wait()
                await self._end(keepers)
                watch.cancel()

    # ── one process ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self, name: str, delay: float) -> None:
        """Life after life of one process, until the run ends; the first begins after `delay` seconds."""
        crashes: deque[Failure] = deque()
        if await self._ends_within(delay):
            return
        while True:
            failure = await self._live(name)
            if self._ending.is_set():
                if failure is not None and failure.code > 0 and self.failure is None:
                    self._display.note(f"while the run ended: {failure}")
                return
            if failure is None:
                if await self._is_over(name):
                    return
                self._display.note(f"{name} left, but the run goes on; starting it again")
            else:
                crashes.append(failure)
                while crashes[0].at < failure.at - WITHIN_S:
                    crashes.popleft()
                if failure.code in NOT_RETRIED or len(crashes) > RESTARTS:
                    self.failure = crashes[0]
                    self._ending.set()
                    return
                delay = FIRST_DELAY_S * 2 ** (len(crashes) - 1)
                self._display.note(f"{name} {how(failure.code)}; restart {len(crashes)} of {RESTARTS} in {delay} s")
                if await self._ends_within(delay):
                    return
            self.restarts += 1

    async def _is_over(self, name: str) -> bool:
        """Whether the run ends too, now that a process drained."""
        self._left.add(name)
        nodes = self._plans.get(name, ())
        finished = any(node.kind == "controller" for node in nodes) and (self._folder / closing.RESULT).exists()
        if finished or self._left >= self._plans.keys() or await self._head_ended():
            self._ending.set()
        over = await self._ends_within(self._plan.grace)
        self._left.discard(name)
        return over

    async def _head_ended(self) -> bool:
        """Whether a run whose controller is elsewhere is over: one that is not there any more told nodes to leave."""
        if self._is_head:
            return False
        try:
            with remote.controller(run_dir.status_address(self._plan, self._host), self._host) as controller:
                status = await controller.status()
        except (UnreachableError, RemoteError):
            return True
        return bool(status["phase"] == "drain")

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return False
        return True

    async def _live(self, name: str) -> Failure | None:
        """One life of a process, from its start to its end."""
        paths = [logs.path_of(self._folder, node.name) for node in self._plans.get(name, ())]
        began = {log: log.stat().st_size if log.exists() else 0 for log in paths}
        far = name in self._remotes
        with _Talk(self._display, f"{name} | " if far else "") as talk:
            process = await asyncio.create_subprocess_exec(
                *(self._remotes[name] if far else self._command(name)),
                stdin=asyncio.subprocess.PIPE if far else asyncio.subprocess.DEVNULL,
                stdout=talk.ear,
                stderr=talk.ear,
                # numpy's threads wait for each other by spinning: on shared cores a product may take 20 times as long.
                env={"OPENBLAS_NUM_THREADS": "1"} | os.environ | {"PYTHONFAULTHANDLER": "1"},
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
            self._processes[name] = process
            try:
                await process.wait()
            finally:
                del self._processes[name]
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
                code = await process.wait()
        if code == 0:
            return None
        told = {log: said for log in paths if (said := logs.last_exception(log, began[log]))}
        log, said = next(iter(told.items()), (paths[0] if paths else None, talk.tail))
        if code in SAID:
            said = said[said.rfind(f"\n{DdrlError.__module__}.") + 1 :]
        return Failure(name, code, said, log, time.monotonic())

    def _command(self, name: str) -> Sequence[str]:
        command = [sys.executable, "-P", "-m", "ddrl_bus.launch.node", "--parent", str(os.getpid())]
        lock = self._folder / run_dir.LOCK_FILE
        return [*command, "--name", name, "--run-dir", str(self._folder), "--topology", str(lock)]

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _end(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Wait for the nodes to go, with growing pressure."""
        drains = self.failure is None and (not self._asked or await self._ask_controller())
        if drains:
            await asyncio.wait(keepers, timeout=self._plan.grace)
        self._signal_all(signal.SIGTERM)
        await asyncio.wait(keepers, timeout=TERM_S if drains else self._plan.grace)
        self._signal_all(signal.SIGKILL)
        await asyncio.wait(keepers)

    async def _ask_controller(self) -> bool:
        """Whether the controller is here and has heard that it shall drain everybody."""
        if not self.has_controller:
            return False
        try:
            with remote.controller(run_dir.status_address(self._plan)) as controller:
                await controller.stop()
        except (UnreachableError, RemoteError) as error:
            self._display.note(f"the controller does not drain the run ({error}); stopping each node")
            return False
        return True

    def _signal_all(self, number: signal.Signals) -> None:
        """A remote share drains when its stdin ends, and says how; its ssh is killed only with all the others."""
        for process in list(self._processes.values()):
            if process.stdin is not None:
                process.stdin.close()
            if process.stdin is None or number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._asked:
            self._signal_all(signal.SIGKILL)
            self._display.note("killing every node")
        else:
            self._asked = True
            self._ending.set()
            self._display.note("stopping; once more to kill at once")

    # ── meanwhile ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> None:
        """Show how the run goes, as long as it does, and which hosts it waits for."""
        loop = asyncio.get_running_loop()
        missing = Missing(self._plan, self._host, self._lines, loop.time())
        heard: float | None = None
        with remote.controller(run_dir.status_address(self._plan, self._host), self._host) as controller:
            while True:
                status = None
                with contextlib.suppress(UnreachableError, RemoteError):  # starting, or on its way back
                    status = await controller.status()
                if status is not None:
                    heard = loop.time()
                    if self.has_controller:
                        self._display.show(status)
                elif not self._is_head and heard is not None and loop.time() - heard > self._patience_s:
                    self.failure = UnreachableError(f"the head has not answered for {self._patience_s:.0f} s")
                    self._ending.set()
                    return
                for note in missing.notes(status, loop.time()):
                    self._display.note(note)
                await asyncio.sleep(STATUS_S if self._is_head else FAR_STATUS_S)


def _ranks(plans: Mapping[str, Sequence[NodePlan]]) -> dict[str, int]:
    """Process -> its turn to start, in that order; kinds that are not here cost no time."""
    kinds = {node.kind for nodes in plans.values() for node in nodes}
    order = [kind for kind in START_ORDER if kind in kinds]
    ranks = {name: min(order.index(node.kind) for node in nodes) for name, nodes in plans.items()}
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


class _Talk:
    """What a process and all it starts say on stdout and stderr: shown as it comes; `tail` is the end of it.

    Not asyncio's pipes: with those, a process is over only when nobody holds its output open any more.
    """

    def __init__(self, display: Display, prefix: str = "") -> None:
        self.tail = ""
        self._display = display
        self._prefix = prefix
        self._mouth, self.ear = os.pipe()
        os.set_blocking(self._mouth, False)
        self._rest = b""

    def __enter__(self) -> _Talk:
        asyncio.get_running_loop().add_reader(self._mouth, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._mouth)
        os.close(self.ear)
        while self._hear():
            pass
        self._say(self._rest)
        os.close(self._mouth)

    def _hear(self) -> bool:
        """Whether there was anything."""
        try:
            heard = os.read(self._mouth, TAIL_BYTES)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + heard).split(b"\n")
        if len(self._rest) > TAIL_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        self._say(b"\n".join(lines))
        return bool(heard)

    def _say(self, words: bytes) -> None:
        text = words.decode(errors="replace")
        if text.strip():
            self.tail = f"{self.tail}\n{text}"[-TAIL_BYTES:].lstrip("\n")
            self._display.note("\n".join(f"{self._prefix}{line}" for line in text.split("\n")))
