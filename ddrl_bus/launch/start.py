"""Starting: a whole run on this machine, one host's share of it, or one node; and how that ended."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddrl_bus import keys
from ddrl_bus.errors import DdrlError, SecurityError, UsageError
from ddrl_bus.launch import closing, run_dir
from ddrl_bus.launch.catalog import catalog, find_topology, load_lock
from ddrl_bus.launch.display import display
from ddrl_bus.topology import Plan, load
from ddrl_bus.topology.exposure import needs_key


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. `closing` is None on a host that does not know, because the controller is elsewhere."""

    exit_code: int
    closing: dict[str, Any] | None


def plan_of(
    topology: str,
    overrides: Sequence[str] = (),
    *,
    probe: bool = True,
    in_process: bool = False,
    fresh: bool = False,
    starts: bool = True,
) -> Plan:
    """The plan of a file or packaged topology.

    Args:
        probe: make the environment once.
        fresh: give it a run id of its own. Without it the id follows from the topology, so that hosts agree on it.
        starts: it is to run, so that hosts need keys.
    """
    run_id = secrets.token_hex(6) if fresh else None
    known = catalog(probe=probe, starts=starts)
    return load(find_topology(topology), overrides=overrides, catalog=known, in_process=in_process, run_id=run_id)


def new_run(plan: Plan, words: Sequence[str], *, path: Path | None = None, started: float) -> Ended:
    """Run all of `plan` on this machine, in a new run directory.

    Args:
        words: the topology and overrides that the user gave.
    Raises:
        UsageError: it has nodes on several hosts; says what to do on each.
    """
    if len(hosts := _hosts(plan)) > 1:
        lines = "".join(f"\n    {_host_command(words, host)}" for host in hosts)
        raise UsageError(f"{plan.name} has nodes on {len(hosts)} hosts; start each one's share there:{lines}")
    return _run(plan, run_dir.create(plan, path=path, command=sys.argv, started=started), started)


def _hosts(plan: Plan) -> list[str]:
    return [host for host in plan.hosts if plan.on_host(host)]


def _host_command(words: Sequence[str], host: str) -> str:
    return shlex.join(["ddrl-node", "-t", *words, "--host", host])


def resumed_run(run: str, overrides: Sequence[str] = (), *, in_process: bool = False, started: float) -> Ended:
    """Go on with an earlier run in its own directory: same run id, new lives, from the newest checkpoint."""
    folder = run_dir.find(run)
    plan = load_lock(folder, overrides=overrides, in_process=in_process)
    if len(_hosts(plan)) > 1:
        raise UsageError(f"{folder} ran on several hosts; go on with `ddrl-node --run-dir` on each of them")
    with run_dir.held(folder, _hosts(plan)[0]):  # of a run that goes on, nothing may be written over
        run_dir.create(plan, path=folder, command=sys.argv, started=started)
    return _run(plan, folder, started)


def _run(plan: Plan, folder: Path, started: float) -> Ended:
    return (
        _in_process(plan, folder, started) if plan.in_process else _supervised(plan, _hosts(plan)[0], folder, started)
    )


def host_share(plan: Plan, host: str, words: Sequence[str], *, path: Path | None = None, started: float) -> Ended:
    """Run the nodes of one host.

    Args:
        words: the topology and overrides that the user gave.
    Raises:
        UsageError: the plan has no such host, or no node on it.
        SecurityError: the host needs a key that is not here.
    """
    if not plan.on_host(host):
        raise UsageError(f"{plan.name}: no node on host {host!r}; hosts: {', '.join(plan.hosts)}")
    _check_key(plan, host)
    folder = run_dir.create(plan, path=path, command=sys.argv, started=started)
    notes = [f"on {other}:  {_host_command(words, other)}" for other in _hosts(plan) if other != host]
    return _supervised(plan, host, folder, started, notes)


def one_process(plan: Plan, name: str, *, path: Path | None = None, started: float) -> int:
    """Run one node, or one index of a bundle, in this process; its exit code. To start it again as the same, give the
    same `path`.

    Raises:
        UsageError: the plan has no such process.
        SecurityError: its host needs a key that is not here.
    """
    from ddrl_bus.launch import node

    _check_key(plan, plan.process(name)[0].host)
    folder = run_dir.create(plan, path=path, command=sys.argv, started=started)
    run_dir.make_private(plan.ipc_dir)
    return node.run(plan, name, folder)


def _check_key(plan: Plan, host: str) -> None:
    """Rather here, in a word, than by each node.  Raises: SecurityError."""
    if not needs_key(plan, host):
        return
    public = keys.own(host).public
    if all(entry.key != public for entry in keys.allowed() if entry.name == host):
        raise SecurityError(
            f"this machine's key of {host} is not the one in its own list, which others may have too; "
            f"type `ddrl keys allow {host} {shlex.quote(public)}` on every host"
        )


def evaluated(run: str | None, episodes: int, seed: int) -> dict[str, Any]:
    """What the newest checkpoint of a run is worth.

    Raises:
        RefusedFileError: it has none that is whole; of several parameter servers each needs one.
    """
    from ddrl_bus.nodes import shards
    from ddrl_bus.nodes.evaluator import evaluate

    folder = run_dir.find(run)
    plan = load_lock(folder, starts=False)
    return evaluate(plan, shards.saved(plan, folder), episodes, seed)


# ── the two ways to run ──────────────────────────────────────────────────────────────────────────────────────────


def _supervised(plan: Plan, host: str, folder: Path, started: float, notes: Sequence[str] = ()) -> Ended:
    from ddrl_bus.launch.local import Supervisor

    with run_dir.held(folder, host), run_dir.sockets(plan):
        _forget_the_end(folder)
        with display() as shown:
            for note in (f"run {folder}", *notes):
                shown.note(note)
            supervisor = Supervisor(plan, host, folder, shown)
            asyncio.run(supervisor.run())
    failure = supervisor.failure
    if failure:
        shown.note(str(failure))
    code = failure.exit_code if failure else 0
    if not supervisor.has_controller:
        return Ended(code, None)
    reason = "failed" if failure else None if (folder / closing.RESULT).exists() else "stop"
    return Ended(code, _closed(plan, folder, started, supervisor.restarts, reason))


def _in_process(plan: Plan, folder: Path, started: float) -> Ended:
    from ddrl_bus.launch import in_process

    code, reason = 0, None
    with run_dir.held(folder, _hosts(plan)[0]):
        _forget_the_end(folder)
        with display() as shown:
            shown.note(f"run {folder}, all in this process")
            try:
                asyncio.run(in_process.run(plan, folder, shown))
            except Exception as error:
                code, reason = error.exit_code if isinstance(error, DdrlError) else DdrlError.exit_code, "failed"
                shown.note("".join(traceback.format_exception(error)))
    return Ended(code, _closed(plan, folder, started, 0, reason))


def _closed(plan: Plan, folder: Path, started: float, restarts: int, reason: str | None) -> dict[str, Any]:
    return closing.close(folder, seed=plan.seed, started=started, restarts=restarts, reason=reason)


def _forget_the_end(folder: Path) -> None:
    """A run that goes on is not over: nobody shall take its earlier end for the coming one."""
    for name in (closing.RESULT, closing.CLOSING):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
