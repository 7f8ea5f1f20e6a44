"""Starting: a whole run on this machine, one host's share of it, or one node; and how that ended."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch import closing, run_dir
from ddrl_bus.launch.catalog import catalog, find_topology, load_lock
from ddrl_bus.launch.display import display
from ddrl_bus.launch.hosts import check_keys, command_of, guest_host, head_of, hosts_of, this_host
from ddrl_bus.launch.ssh import Far
from ddrl_bus.messages import Join
from ddrl_bus.topology import Plan, load
from ddrl_bus.topology.exposure import head_address
from ddrl_bus.versions import versions


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


def new_run(
    plan: Plan, words: Sequence[str], *, path: Path | None = None, started: float, far: Far | None = None
) -> Ended:
    """Run `plan` in a new run directory: all of it, or of several hosts the share of the one that this machine is.

    Args:
        words: the topology and overrides that the user gave.
        far: starts the other hosts' shares from here.
    Raises:
        UsageError: this machine is none of its hosts, or for `far` not the right one.
    """
    if far is None and (plan.in_process or len(hosts_of(plan)) == 1):
        return _run(plan, run_dir.create(plan, path=path, command=sys.argv, started=started), started)
    plan = plan_of(words[0], words[1:], probe=False)  # with the run id that every host gives it
    host = this_host(plan)
    remotes = far.remotes(plan, host) if far else None
    return host_share(plan, host, words, remotes=remotes, path=path, started=started)


def resumed_run(
    run: str, overrides: Sequence[str] = (), *, in_process: bool = False, started: float, far: Far | None = None
) -> Ended:
    """Go on with an earlier run in its own directory: same run id, new lives, from the newest checkpoint. Of several
    hosts only the head has it; the others join.

    Raises:
        UsageError: this machine is not the head.
    """
    folder = run_dir.find(run)
    plan = load_lock(folder, overrides=overrides, in_process=in_process)
    if far is not None or (len(hosts_of(plan)) > 1 and not in_process):
        if (host := this_host(plan)) != head_of(plan):
            raise UsageError(f"{folder}: a run is resumed on its head, {head_of(plan)}; this machine is {host}")
        with run_dir.held(folder, host):
            pass
        remotes = far.remotes(plan, host) if far else None
        lock = [str(folder / run_dir.LOCK_FILE), *overrides]
        return host_share(plan, host, lock, remotes=remotes, path=folder, started=started)
    with run_dir.held(folder, hosts_of(plan)[0]):  # of a run that goes on, nothing may be written over
        run_dir.create(plan, path=folder, command=sys.argv, started=started)
    return _run(plan, folder, started)


def _run(plan: Plan, folder: Path, started: float) -> Ended:
    if plan.in_process:
        return _in_process(plan, folder, started)
    return _supervised(plan, hosts_of(plan)[0], folder, started)


def host_share(
    plan: Plan,
    host: str,
    words: Sequence[str] = (),
    *,
    remotes: Mapping[str, Sequence[str]] | None = None,
    path: Path | None = None,
    started: float,
) -> Ended:
    """Run the nodes of one host.

    Args:
        words: the topology and overrides that the user gave.
        remotes: name → command of what runs other hosts' shares from here.
    Raises:
        UsageError: the plan has no such host, or no node on it; or it is being run.
        SecurityError: the host needs a key that is not here.
    """
    if not plan.on_host(host):
        raise UsageError(f"{plan.name}: no node on host {host!r}; hosts: {', '.join(plan.hosts)}")
    check_keys(plan, host)
    with run_dir.alone(plan, host):  # else the newest run, which commands take by default, would be one that never was
        folder = run_dir.create(plan, path=path, command=sys.argv, started=started, host=host)
    lines = {other: command_of(plan, other, words) for other in hosts_of(plan) if other != host}
    return _supervised(plan, host, folder, started, {} if remotes else lines, remotes)


def joined_share(
    address: str, host: str, *, modules: Sequence[str] = (), path: Path | None = None, started: float
) -> Ended:
    """Run the nodes of one host of the run whose head is at `address`, with an environment of these `modules`."""
    plan, folder = _joined(address, Join(versions(), host=host), modules, path, started)
    return _supervised(plan, host, folder, started)


def joined_process(
    address: str, name: str, *, modules: Sequence[str] = (), path: Path | None = None, started: float
) -> int:
    """Run one process of the run whose head is at `address`; its exit code."""
    plan, folder = _joined(address, Join(versions(), process=name), modules, path, started)
    return _alone(plan, name, folder)


def added(
    run: str,
    group: str,
    count: int,
    host: str | None = None,
    modules: Sequence[str] = (),
    *,
    path: Path | None = None,
    started: float,
) -> Ended:
    """Add so many nodes to a group of a run that goes on, and run them here until it ends, or this does.

    Args:
        run: tcp://HEAD:PORT, or on the head's machine the run as `run_dir.find` takes it.
        host: name of this machine; default: that in the topology, or its own.
        modules: the head may have its environment imported from.
    Raises:
        UsageError: the run takes no more into that group, or none from here.
    """
    from ddrl_bus.launch import join

    folder: Path | None = None
    if run.startswith("tcp://"):
        plan, address, host = _run_there(run, group, host, modules)
    else:
        folder, plan, address = _run_here(run)
        if path is not None or host not in (None, head_of(plan)):
            raise UsageError(f"{folder} is of this machine, {head_of(plan)}: no --host or --run-dir beside it")
        host = head_of(plan)
    if reason := plan.why_fixed(group):
        raise UsageError(f"{plan.name}: {reason}")
    names = asyncio.run(join.granted(address, group, count, host))
    folder = folder or run_dir.create(plan, path=path, command=sys.argv, started=started, host=host)
    return _added(plan, names, host, folder)


def _run_there(run: str, group: str, host: str | None, modules: Sequence[str]) -> tuple[Plan, str, str]:
    """Plan of a run whose head is elsewhere, the address of its controller, and what this machine is called in it."""
    from ddrl_bus.launch import join

    address = join.address_of(run)
    plan = asyncio.run(join.topology_of(address, _say, modules))
    host = host or guest_host(plan)
    if host == head_of(plan):
        raise UsageError(f"{host} is the head: type there  ddrl-node --join RUN --add {group}, or name another --host")
    check_keys(plan, host)
    return plan, address, host


def _run_here(run: str) -> tuple[Path, Plan, str]:
    """Directory and plan of a run whose head this machine is, and the address of its controller."""
    folder = run_dir.find(run)
    plan, told = load_lock(folder), str(run_dir.meta(folder).get("status_address"))
    address = run_dir.status_address(plan)
    if told == head_address(plan):
        raise UsageError(f"{folder}: its head is elsewhere; type  ddrl-node --join {told} --add GROUP")
    if told != address:
        raise UsageError(f"{folder}: the run answers at {told}, from here it would be {address}; is TMPDIR the same?")
    return folder, plan, address


def _added(plan: Plan, names: Sequence[str], host: str, folder: Path) -> Ended:
    from ddrl_bus.launch.local import Supervisor

    run_dir.make_private(plan.ipc_dir)
    with display() as shown:
        shown.note(f"run {folder}: adding {', '.join(names)}; Ctrl-C takes them out again")
        supervisor = Supervisor(plan, host, folder, shown, added=names)
        asyncio.run(supervisor.run())
    if supervisor.failure:
        shown.note(str(supervisor.failure))
    return Ended(supervisor.failure.exit_code if supervisor.failure else 0, None)


def _joined(address: str, wanted: Join, modules: Sequence[str], path: Path | None, started: float) -> tuple[Plan, Path]:
    from ddrl_bus.launch import join

    joined = asyncio.run(join.join(join.address_of(address), wanted, _say, modules))
    check_keys(joined.plan, joined.host)
    folder = run_dir.create(joined.plan, path=path, command=sys.argv, started=started, host=joined.host)
    run_dir.outlive(folder, joined.lives)
    return joined.plan, folder


def _say(note: str) -> None:
    print(note, file=sys.stderr, flush=True)


def one_process(plan: Plan, name: str, *, path: Path | None = None, started: float) -> int:
    """Run one node, or one index of a bundle, in this process; its exit code. To start it again as the same, give the
    same `path`.

    Raises:
        UsageError: the plan has no such process.
        SecurityError: its host needs a key that is not here.
    """
    (host,) = {node.host for node in plan.process(name)}
    return _alone(plan, name, run_dir.create(plan, path=path, command=sys.argv, started=started, host=host))


def _alone(plan: Plan, name: str, folder: Path) -> int:
    from ddrl_bus.launch import node

    check_keys(plan, plan.process(name)[0].host)
    run_dir.make_private(plan.ipc_dir)
    return node.run(plan, name, folder)


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


def _supervised(
    plan: Plan,
    host: str,
    folder: Path,
    started: float,
    lines: Mapping[str, str] | None = None,
    remotes: Mapping[str, Sequence[str]] | None = None,
) -> Ended:
    """Args: `lines` and `remotes` are as of the supervisor."""
    from ddrl_bus.launch.local import Supervisor

    with run_dir.held(folder, host), run_dir.sockets(plan, host):
        _forget_the_end(folder)
        with display() as shown:
            for note in (f"run {folder}", *(f"on {other}:  {line}" for other, line in (lines or {}).items())):
                shown.note(note)
            supervisor = Supervisor(plan, host, folder, shown, lines=lines, remotes=remotes)
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
    with run_dir.held(folder, hosts_of(plan)[0]):
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
