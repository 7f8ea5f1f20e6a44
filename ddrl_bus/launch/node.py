"""What a process of one node, or of one index of a bundle, is:

    python -m ddrl_bus.launch.node --topology LOCK --name N --run-dir D

Six of these start at once on two cores: nothing here imports torch, rich or click.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from ddrl_bus.errors import DdrlError, first
from ddrl_bus.launch import files, logs, loop, malloc, run_dir
from ddrl_bus.topology import Plan
from ddrl_bus.transport.memory import MemoryHub

INTERNAL: Final = DdrlError.exit_code
NAMED_AFTER_S: Final = 5.0
"""A host name without an address is named then, and again each time that it has taken twice as long."""
RESOLVE_AGAIN_S: Final = 0.5
MEND: Final = "correct `hosts:`, or enter it in /etc/hosts"
_PR_SET_PDEATHSIG: Final = 1


def run(plan: Plan, name: str, folder: Path, *, parent: int | None = None) -> int:
    """One life of each node of the process `name`, to its end; the exit code of the process.

    Args:
        parent: pid whose death ends these nodes too; they drain then.
    Raises:
        UsageError: the plan has no such process.
    """
    names = [node.name for node in plan.process(name)]
    malloc.keep_freed_memory()
    if parent is not None:
        die_with(parent)
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(logs.attached(folder, node, _logger(node, names))) for node in names]
        try:
            files.raise_limit(plan, names)
            loop.run(_serve(plan, names, folder, supervised=parent is not None))
        except Exception as error:
            if not any(log.shown is error for log in written):
                logging.getLogger(f"ddrl_bus.{names[0]}").critical("failed", exc_info=error)
            return error.exit_code if isinstance(error, DdrlError) else INTERNAL
    return 0


def _logger(node: str, names: Sequence[str]) -> logging.Logger:
    """Whose records go to the node's log: everybody's where it has the process to itself."""
    return logging.getLogger(f"ddrl_bus.{node}" if len(names) > 1 else None)


async def serve_all(
    plan: Plan, names: Iterable[str], folder: Path, stop: asyncio.Event, *, hub: MemoryHub, inline: bool = False
) -> None:
    """Run nodes in this event loop, each to its end. When one fails, the others are cancelled.

    Raises:
        Exception: what a node raised first, as it was.
    """
    from ddrl_bus.nodes.base import serve

    try:
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                epoch = run_dir.next_epoch(folder, name)
                node = serve(plan, name, run_dir=folder, epoch=epoch, hub=hub, inline=inline, stop=stop)
                tasks.create_task(node, name=name)
    except BaseExceptionGroup as group:
        raise first(group) from None


async def _serve(plan: Plan, names: Sequence[str], folder: Path, *, supervised: bool) -> None:
    stop = asyncio.Event()

    def signalled(number: int) -> None:
        if stop.is_set():
            if supervised:  # the kernel tells of our parent's death once for each of its threads
                return
            os._exit(128 + number)
        stop.set()
        # The kernel keeps this deadline, so a blocked event loop cannot miss it.
        signal.setitimer(signal.ITIMER_REAL, max(plan.grace, 0.001))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, signalled, number)
    if await _have_addresses(plan, names, stop):
        await serve_all(plan, names, folder, stop, hub=MemoryHub())


async def _have_addresses(plan: Plan, names: Collection[str], stop: asyncio.Event) -> bool:
    """Wait until the host names that these nodes bind are known here, as for a peer: for as long as it takes. False if
    `stop` was set first."""
    loop, again = asyncio.get_running_loop(), NAMED_AFTER_S
    began, log = loop.time(), logging.getLogger(f"ddrl_bus.{next(iter(names))}")
    for bind in {bind.address: bind for (name, _), bind in plan.binds.items() if name in names and bind.far}.values():
        while not await _resolves(bind.address.strip("[]")):
            if stop.is_set():
                return False
            if (waited := loop.time() - began) >= again:
                again *= 2
                where = f"cannot bind {bind.far} for {waited:.0f} s"
                log.warning("%s: %s has no address on this machine yet; if it is wrong, %s", where, bind.address, MEND)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESOLVE_AGAIN_S):
                    await stop.wait()
    return True


async def _resolves(name: str) -> bool:
    try:
        return bool(await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return False


def die_with(parent: int) -> None:
    """Get SIGTERM when `parent` is gone, however it went (Linux; elsewhere its supervisor has to end it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ddrl_bus.launch.node", description="One process of a run. Use ddrl-node.")
    parser.add_argument("--topology", type=Path, required=True, help="expanded topology")
    parser.add_argument("--name", required=True, help="process: a node, or an index of a bundle, such as worker-0")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, help="pid whose death ends this node")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # until the loop runs there is nothing to drain

    from ddrl_bus.launch.catalog import catalog
    from ddrl_bus.topology import load

    try:
        # Who is let in may have changed since the run began: that ends connections, not the run.
        plan = load(options.topology, catalog=catalog(starts=False))
        plan.process(options.name)
    except DdrlError as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return error.exit_code
    return run(plan, options.name, options.run_dir, parent=options.parent)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # waits for no thread, and for no library to take itself apart
