"""All nodes of a run in one event loop over `memory://`: for breakpoints, and for runs that repeat exactly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from ddrl_bus.errors import RemoteError, UnreachableError, first
from ddrl_bus.launch import logs, remote, run_dir
from ddrl_bus.launch.display import Display
from ddrl_bus.launch.local import SIGNALS, STATUS_S
from ddrl_bus.launch.node import serve_all
from ddrl_bus.topology import Plan
from ddrl_bus.transport.memory import MemoryHub


async def run(plan: Plan, folder: Path, display: Display) -> None:
    """Returns when every node is done.  Raises: what a node raised first, as it was."""
    stop, hub = asyncio.Event(), MemoryHub()
    with contextlib.ExitStack() as stack:
        for name in plan.nodes:
            stack.enter_context(logs.attached(folder, name, logging.getLogger(f"ddrl_bus.{name}")))
        controller = stack.enter_context(remote.controller(run_dir.status_address(plan), hub=hub))
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(_watch(controller, display), name="watch")
                with _signals(tasks, controller, stop, display):
                    await serve_all(plan, plan.nodes, folder, stop, hub=hub, inline=True)
                watch.cancel()
        except BaseExceptionGroup as group:
            raise first(group) from None


async def _watch(controller: remote.Controller, display: Display) -> None:
    while True:
        with contextlib.suppress(UnreachableError, RemoteError):
            display.show(await controller.status())
        await asyncio.sleep(STATUS_S)


@contextlib.contextmanager
def _signals(
    tasks: asyncio.TaskGroup, controller: remote.Controller, stop: asyncio.Event, display: Display
) -> Iterator[None]:
    """The first signal has the controller drain everybody, a second one ends the process."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    async def ask() -> None:
        try:
            await controller.stop()
        except (UnreachableError, RemoteError):
            stop.set()

    def signalled(number: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + number)
        display.note("stopping; once more to end at once")
        asked.set()
        tasks.create_task(ask(), name="ask")

    for number in SIGNALS:
        loop.add_signal_handler(number, signalled, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
