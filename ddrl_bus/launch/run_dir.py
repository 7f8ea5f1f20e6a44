"""A run's directory, which is its user's alone where we make it.

runs/<name>/<UTC time>-s<seed>/
    topology.lock.yaml    the expanded topology; every node reads it
    meta.json             command, versions, hosts, times; where `ddrl status` asks
    lives                 one line per start of a node: name, epoch, pid (0 on another host or before), time
    added                 names that the controller gave to nodes that were added
    metrics.jsonl         written by the controller
    result.json           written by the controller when the run is over
    closing.json          what `ddrl run --json` printed
    logs/<node>.log       JSON lines
    ledger/               one page per life
    checkpoints/
    checkpoints-<node>/   of replay nodes, and of parameter servers where there are several
runs/<name>/latest        the newest of them
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ddrl_bus
from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.topology import Plan
from ddrl_bus.topology.exposure import head_address
from ddrl_bus.versions import versions

ROOT: Final = Path("runs")
LOCK_FILE: Final = "topology.lock.yaml"
CHECKPOINTS: Final = "checkpoints"


def create(
    plan: Plan, *, path: Path | None = None, command: Sequence[str], started: float, host: str | None = None
) -> Path:
    """A run directory for `plan`: a new one under `runs/`, or `path`, which may exist and then goes on.

    Args:
        started: seconds since 1970 at which the user gave the command.
        host: whose share of the run it is for; default: the controller's.
    Raises:
        UsageError: it cannot be made here, or `path` holds another run.
    """
    try:
        run_dir = path or _new(ROOT / plan.name, plan.seed)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_lock(run_dir, plan)
        for folder in ("logs", "ledger", CHECKPOINTS):
            (run_dir / folder).mkdir(exist_ok=True)
        write_meta(run_dir, plan, command, started, host)
    except OSError as error:
        raise UsageError(f"cannot make a run directory: {error}") from error
    return run_dir


def _new(parent: Path, seed: int) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-s{seed}"
    path, number = parent / name, 1
    while True:
        try:
            path.mkdir(mode=0o700)
            break
        except FileExistsError:
            number += 1
            path = parent / f"{name}-{number}"
    link = parent / f".latest-{secrets.token_hex(4)}"
    link.symlink_to(path.name)
    link.replace(parent / "latest")  # the only way to change a symlink without a moment in which there is none
    return path


def write_lock(run_dir: Path, plan: Plan) -> None:
    """Keep the expanded topology.

    Raises:
        UsageError: the directory holds another run; its ledgers and checkpoints would mix with this one's.
    """
    other = meta(run_dir).get("run_id", plan.run_id)
    if other != plan.run_id:
        raise UsageError(f"{run_dir} holds run {other}, not {plan.run_id}; give another --run-dir, or use --resume")
    write(run_dir / LOCK_FILE, plan.lock())


def write_meta(run_dir: Path, plan: Plan, command: Sequence[str], started: float, host: str | None = None) -> None:
    """Describe this start of the run; what was said of earlier ones is kept under `before`."""
    earlier = meta(run_dir)
    before = [*earlier.pop("before", []), earlier] if earlier else []
    record = {
        "command": list(command),
        "started": started,
        "host": platform.node(),
        "pid": os.getpid(),
        "hosts": dict(plan.hosts),
        "name": plan.name,
        "run_id": plan.run_id,
        "seed": plan.seed,
        "status_address": status_address(plan, host),
        "share": host,
        "git": _git_sha(),
        "versions": versions(),
        "before": before,
    }
    write(run_dir / "meta.json", json.dumps(record, indent=2) + "\n")


def meta(run_dir: Path) -> dict[str, Any]:
    """What `write_meta` wrote; {} if nothing yet."""
    return read_json(run_dir / "meta.json") or {}


def status_address(plan: Plan, host: str | None = None) -> str:
    """Where the controller answers people on this host; default: on its own."""
    controller = plan.controller
    far = head_address(plan) if host not in (None, controller.host) else None
    return far or plan.binds[controller.name, "progress"].addresses[0]


def _git_sha() -> str | None:
    """Commit of the checkout that this package runs from, if it runs from one."""
    checkout = Path(ddrl_bus.__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ── finding runs ─────────────────────────────────────────────────────────────────────────────────────────────────


def find(run: str | None = None) -> Path:
    """The directory of RUN: a path, or a topology's name for its latest run; the newest run of all without one.

    Raises:
        UsageError: there is no such run.
    """
    if run is None:
        runs = [path.resolve() for path in ROOT.glob("*/latest") if (path / LOCK_FILE).exists()]
        if not runs:
            raise UsageError(f"no run under {ROOT.absolute()}; name one, or start one with `ddrl run`")
        return _short(max(runs, key=lambda path: (path / LOCK_FILE).stat().st_mtime))
    for path in (Path(run), ROOT / run, Path(run) / "latest", ROOT / run / "latest"):
        if (path / LOCK_FILE).exists():
            return _short(path.resolve())
    known = ", ".join(sorted(path.parent.name for path in ROOT.glob("*/latest"))) or "none"
    raise UsageError(f"no run {run!r}: expected a run directory, or a name under {ROOT}/ (there: {known})")


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


# ── lives ────────────────────────────────────────────────────────────────────────────────────────────────────────


def next_epoch(run_dir: Path, node: str) -> int:
    """The epoch of a new life of `node`: its starts counted in this run, then 32 random bits. Higher means later."""
    with (run_dir / "lives").open("a+") as lives:
        fcntl.flock(lives, fcntl.LOCK_EX)
        lives.seek(0)
        earlier = (line.split()[1] for line in lives if line.split(" ", 1)[0] == node)
        starts = 1 + max((int(epoch, 16) >> 32 for epoch in earlier), default=0)
        epoch = starts << 32 | secrets.randbits(32)
        lives.write(f"{node} {epoch:016x} {os.getpid()} {time.time():.3f}\n")
    return epoch


def outlive(run_dir: Path, epochs: Mapping[str, int]) -> None:
    """Let the next lives of these nodes come after these ones, which were not counted here."""
    with (run_dir / "lives").open("a") as lives:
        fcntl.flock(lives, fcntl.LOCK_EX)
        lives.writelines(f"{node} {epoch:016x} 0 {time.time():.3f}\n" for node, epoch in epochs.items())


@contextmanager
def held(run_dir: Path, host: str) -> Iterator[None]:
    """Keep others from running this host's share of the run meanwhile. The lock goes with the process.

    Raises:
        UsageError: somebody does.
    """
    with _locked(run_dir / f".{host}.lock", f"{run_dir} is being run already; `ddrl stop {run_dir}` ends it"):
        yield


@contextmanager
def _locked(path: Path, held: str) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(held) from None
        yield


# ── sockets ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def sockets(plan: Plan, host: str) -> Iterator[None]:
    """Keep the folder of the run's ipc sockets, for as long as nodes of this host may use it.

    Raises:
        UsageError: as `alone`.
    """
    from ddrl_bus.transport import shared  # numpy, which most commands do without

    with alone(plan, host):
        try:
            yield
        finally:
            shared.remove(plan.ipc_dir, (node.name for node in plan.nodes.values() if node.host == host))
            if len({node.host for node in plan.nodes.values()}) == 1:  # hosts may share a machine
                shutil.rmtree(plan.ipc_dir, ignore_errors=True)


@contextmanager
def alone(plan: Plan, host: str) -> Iterator[None]:
    """Keep this user from running a host's share twice at a time, in two run directories: nodes of the second would
    take over from those of the first.

    Raises:
        UsageError: it is being run here.
    """
    make_private(plan.ipc_dir)
    with _locked(
        plan.ipc_dir / f".{host}.lock",
        f"{plan.name}: {host}'s share of this topology is being run here already; `ddrl stop` ends that run, or give "
        "this one a `run_id=` and a `port=` of its own",
    ):
        yield


def make_private(folder: Path) -> None:
    """Make a folder that nobody else can enter, nor put another in its place.

    Raises:
        SecurityError: it, or the one above, is somebody else's, or others may write to it or to where both are.
    """
    where = folder.parent.parent
    if where.exists() and where.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        raise SecurityError(f"others can replace {folder.parent}; type `chmod +t {where}`, or set TMPDIR")
    for path in (folder.parent, folder):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder of the run's sockets: {error}; set TMPDIR") from error
        found = path.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022 or stat.S_ISLNK(found.st_mode):
            raise SecurityError(
                f"{path}: not ours alone, and the run's sockets would be in it; remove it or set TMPDIR"
            )
        path.chmod(0o700)  # it may be older than we are


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(path: Path, text: str) -> None:
    """Replace the file whole: a reader sees the old text or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def read_json(path: Path) -> Any:
    """What the file holds; None if there is none, or none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
