"""The event loop of nodes, and of whatever is measured in their place: uvloop's where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

T = TypeVar("T")


def runner() -> asyncio.Runner:
    """Of the loop that nodes run in."""
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner(debug=False)
    return asyncio.Runner(debug=False, loop_factory=uvloop.new_event_loop)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in that loop."""
    with runner() as running:
        return running.run(main)


def name() -> str:
    """`uvloop 0.23.0`, or `asyncio`."""
    try:
        return f"uvloop {version('uvloop')}"
    except PackageNotFoundError:
        return "asyncio"
