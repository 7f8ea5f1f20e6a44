"""What a bad network costs a run, and how soon it is over: `ddrl bench faults`.

A real run for each fault: two-hosts.yaml with one actor beside the learner and one on the other host. Partitions, loss
and a narrow cable are those of two network namespaces (`cable.py`); delay, silence and resets are those of a proxy
(`proxy.py`) between two shares on this machine. What is counted is read from ledgers: nobody needs to answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddrl_bus.bench.cable import ADDRESSES, MISSING, Cable, enter, ip, plugged_in
from ddrl_bus.bench.links import fresh_keys
from ddrl_bus.bench.proxy import Proxy, proxy
from ddrl_bus.bench.report import COUNT, About, Kind, Row, S, row
from ddrl_bus.errors import RemoteError, UnreachableError, UsageError
from ddrl_bus.launch import remote
from ddrl_bus.nodes.controller import DEAD_S
from ddrl_bus.transport import ledger

NEAR, BETWEEN, FAR = "127.0.0.1", "127.0.0.2", "127.0.0.3"
BESIDE = "10.77.0.3"
PORT, PORTS = 27_077, 6
WORDS: Final = (
    *("two-hosts", "run_id=faults", "stop.reward=null", "stop.steps=null"),
    *("algo.hidden=[16]", "algo.batch=8", "nodes.evaluator.count=0"),
    *("nodes.actor.count=2", "nodes.actor.host=[gpu0, cpu1]", "nodes.actor.envs=8"),
)
QUIET_S = 5.0
"""Before the fault, to know how fast it goes without."""
POLL_S, ASK_S = 5e-3, 0.1
PATIENCE_S: Final = 120.0
"""Against hangs only."""

Do = Callable[[Callable[[Proxy], object]], object]
"""Calls something with the proxy, in its event loop."""


@dataclass(frozen=True)
class Fault:
    name: str
    lasts_s: float
    cable: Callable[[Cable], AbstractContextManager[None]] | None = None
    proxy: Callable[[Do], AbstractContextManager[None]] | None = None
    leaky: bool = False
    """It lets something through."""


@contextmanager
def _half_open(do: Do) -> Iterator[None]:
    do(lambda line: line.mute(True))
    yield
    do(lambda line: line.mute(False))


@contextmanager
def _reset(do: Do) -> Iterator[None]:
    do(Proxy.cut)
    yield


@contextmanager
def _late(do: Do) -> Iterator[None]:
    do(lambda line: setattr(line, "delay_s", 0.2))
    yield
    do(lambda line: setattr(line, "delay_s", 0.0))


def faults(partition_s: Sequence[float], others_s: float = 10.0) -> list[Fault]:
    """Each of its length; those that are none of a partition last `others_s`."""
    return [
        *(Fault("partition", seconds, Cable.silent) for seconds in partition_s),
        Fault("the far host is deaf", others_s, lambda cable: cable.deaf("cpu1")),
        Fault("the near host is deaf", others_s, lambda cable: cable.deaf("gpu0")),
        Fault("cable pulled", others_s, Cable.unplugged),
        Fault("half-open", others_s, proxy=_half_open),
        Fault("reset", 0.0, proxy=_reset),
        Fault("200 ms each way", others_s, proxy=_late, leaky=True),
        Fault("5 % packet loss", others_s, lambda cable: cable.lossy(5), leaky=True),
        Fault("1 MiB/s each way", others_s, lambda cable: cable.narrow(1 << 20), leaky=True),
    ]


ABOUT: Final = About(
    bench="faults",
    title="How soon training goes on after a network was bad, and what that lost",
    method="""A real run for each fault: a learner with one actor beside it, the near one, and one on another host,
the far one. Partitions, loss and a narrow cable are those of two network namespaces; delay, silence and resets are
those of a proxy between two shares of the run on this machine. Deaf is a host at which nothing arrives, while what it
sends does. What is counted is read from the nodes' ledgers.""",
    reading=f"""Goes on: how long after the fault's end the learner takes an unroll of the far actor; where something
comes through all the time, the longest gap between two of them. Noticed: after which the controller takes the far
actor for dead; left out if it never does. Near and far: unrolls of either meanwhile, as a share of those in the
{QUIET_S:g} s before. Unrolls and lost: of the whole run, in whose books they should add up: open books 0.""",
)
_KINDS: Final = {
    "noticed": S,
    "goes on": S,
    "longest gap": S,
    "near": Kind("%", "more", 0),
    "far": Kind("%", "more", 0),
    "unrolls": COUNT,
    "lost": COUNT,
    "open books": COUNT,
}


def measure(chosen: Sequence[Fault], encrypted: bool = False) -> Iterator[Row]:
    """A row for each fault, in a run of its own.

    Args:
        encrypted: links that leave their host go by keys, made for these runs.

    Raises:
        UsageError: this machine cannot make namespaces.
    """
    if MISSING and (encrypted or any(fault.cable for fault in chosen)):
        raise UsageError(f"bench faults: {MISSING}")
    with fresh_keys(list(ADDRESSES) if encrypted else []):
        for fault in chosen:
            with (
                tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder,
                _ground(fault, Path(folder), encrypted) as (run, inject),
            ):
                yield _row(fault, run, inject)


def _row(fault: Fault, run: Run, inject: AbstractContextManager[None]) -> Row:
    run.wait(lambda: run.taken(1) > 20, "unrolls of the far actor")
    before = run.watch(QUIET_S)
    with inject:
        meanwhile = run.watch(fault.lasts_s)
    after = run.watch(PATIENCE_S, until_far=True)
    run.watch(QUIET_S)
    return row_of(fault, before, meanwhile, after, run.end())


def row_of(fault: Fault, before: Seen, meanwhile: Seen, after: Seen, balance: ledger.Balance) -> Row:
    pairs = zip(("near", "far"), meanwhile.rates, before.rates, strict=True)
    found = {who: 100 * during / usual for who, during, usual in pairs if fault.lasts_s and usual}
    found |= {} if meanwhile.noticed_s is None else {"noticed": meanwhile.noticed_s}
    found |= {"longest gap": meanwhile.pause_s} if fault.leaky else {"goes on": after.pause_s}
    found |= {"unrolls": balance.produced, "lost": balance.lost, "open books": int(not balance.closed)}
    kinds = {name: kind for name, kind in _KINDS.items() if name in found}
    name = f"{fault.name}, {fault.lasts_s:g} s" if fault.lasts_s else fault.name
    section, main = ("a bad line", "longest gap") if fault.leaky else ("a dead line", "goes on")
    return row(section, name, [found], kinds, main=main)


@dataclass(frozen=True, slots=True)
class Seen:
    rates: list[float]
    """Unrolls a second of either actor that the learner took."""
    pause_s: float
    """Longest time without one of the far actor."""
    noticed_s: float | None
    """After which it was taken for dead."""


class Run:
    """Both hosts' shares of one run; the near one is told the first address of the head, the far one the second."""

    def __init__(
        self, folder: Path, words: Sequence[str], prefixes: Sequence[Sequence[str]], heads: Sequence[str], far: str
    ) -> None:
        self._folder = folder
        self._shares = []
        for host, prefix, head in zip(ADDRESSES, prefixes, heads, strict=True):
            own = folder / host
            own.mkdir()
            environ = os.environ | {"GPU0": head, "CPU1": far, "TMPDIR": str(own)}
            options = ["-t", *WORDS, *words, "--run-dir", str(own / "run")]
            code = "from ddrl_bus.cli import ddrl_node; ddrl_node()"
            argv = [*prefix, sys.executable, "-c", code, *options, "--host", host]
            with (own / "said").open("w") as said:
                self._shares.append(subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stderr=said))

    def taken(self, actor: int) -> int:
        """Unrolls of an actor that the learner took."""
        pages = [ledger.read(page) for page in self._pages("gpu0", "learner-0@*.page")]
        lane = f"/actor-{actor}@"
        return sum(n for page in pages for name, n in page.items() if lane in name and name.endswith("/taken"))

    def _pages(self, host: str, pattern: str) -> Iterator[Path]:
        return (self._folder / host / "run" / "ledger").glob(pattern)

    def watch(self, seconds: float, until_far: bool = False) -> Seen:
        """What happens in that time, or until an unroll of the far actor is taken."""
        began, starts = time.monotonic(), [self.taken(0), self.taken(1)]
        passed = asked = came = pause = 0.0
        far, noticed = starts[1], None
        while passed < seconds and not (until_far and far > starts[1]):
            time.sleep(POLL_S)
            passed, taken = time.monotonic() - began, self.taken(1)
            pause = max(pause, passed - came)
            if taken > far:
                far, came = taken, passed
            if noticed is None and passed - asked > ASK_S:
                asked = passed
                noticed = passed if self._silent_s() >= DEAD_S else None
        return Seen([(self.taken(n) - starts[n]) / passed if passed else 0.0 for n in (0, 1)], pause, noticed)

    def _silent_s(self) -> float:
        with suppress(UnreachableError, RemoteError):
            status = asyncio.run(remote.status_of(self._folder / "gpu0" / "run"))
            return float(status["nodes"]["actor-1"].get("silent_s", 0.0))
        return 0.0

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > deadline or any(share.poll() is not None for share in self._shares):
                said = [(self._folder / host / "said").read_text() for host in ADDRESSES]
                raise RuntimeError("\n".join([f"no {what}", *said]))
            time.sleep(POLL_S)

    def end(self) -> ledger.Balance:
        """Have it drained; the books of both hosts."""
        self._shares[0].send_signal(signal.SIGTERM)
        for share in self._shares:
            share.wait(PATIENCE_S)
        pages = [ledger.read(page) for host in ADDRESSES for page in self._pages(host, "*.page")]
        return ledger.audit(pages)["trajectories"]

    def close(self) -> None:
        """A supervisor that is terminated takes its nodes along."""
        for share in self._shares:
            share.terminate()
        for share in self._shares:
            share.wait(PATIENCE_S)


@contextmanager
def _ground(fault: Fault, folder: Path, encrypted: bool) -> Iterator[tuple[Run, AbstractContextManager[None]]]:
    """What stays on loopback is never encrypted: then the proxy, too, stands between namespaces."""
    words = [f"insecure={str(not encrypted).lower()}"]
    with ExitStack() as undo:
        if fault.proxy is not None and not encrypted:
            do = undo.enter_context(between(NEAR, BETWEEN, range(PORT, PORT + PORTS)))
            run = Run(folder, words, [(), ()], [f"{NEAR}:{PORT}", f"{BETWEEN}:{PORT}"], FAR)
            inject = fault.proxy(do)
        else:
            cable, heads = undo.enter_context(plugged_in()), [ADDRESSES["gpu0"]] * 2
            if fault.cable is not None:
                inject = fault.cable(cable)
            else:
                assert fault.proxy is not None
                inject = fault.proxy(undo.enter_context(between_hosts(cable, range(PORT, PORT + PORTS))))
                heads[1] = BESIDE
            prefixes = [cable.on(host) for host in ADDRESSES]
            run = Run(folder, words, prefixes, [f"{head}:{PORT}" for head in heads], ADDRESSES["cpu1"])
        undo.callback(run.close)
        yield run, inject


def between_hosts(cable: Cable, ports: Sequence[int]) -> AbstractContextManager[Do]:
    """A proxy on the near host, which the far one reaches at an address of its own, BESIDE."""
    ip("-n", cable.namespaces["gpu0"], "addr", "add", f"{BESIDE}/24", "dev", cable.ends["gpu0"])
    return between(ADDRESSES["gpu0"], BESIDE, ports, cable.namespaces["gpu0"])


@contextmanager
def between(near: str, far: str, ports: Sequence[int], namespace: str | None = None) -> Iterator[Do]:
    """A proxy in a thread of its own, in that network namespace if any, that listens at `far` and dials `near`."""
    loop, over, lines = asyncio.new_event_loop(), asyncio.Event(), []
    ready = threading.Event()

    async def serve() -> None:
        try:
            if namespace is not None:
                enter(namespace)
            async with proxy({(far, port): (near, port) for port in ports}) as line:
                lines.append(line)
                ready.set()
                await over.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield lambda what: loop.call_soon_threadsafe(what, lines[0])
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
