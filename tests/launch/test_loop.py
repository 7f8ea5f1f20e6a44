"""What a report says of the event loop is what nodes run in."""

from __future__ import annotations

import asyncio
import sys

import pytest

from ddrl_bus.launch import loop


async def _library() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_it_is_called_what_it_is() -> None:
    assert loop.name().split()[0] == loop.run(_library())


def test_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # importing it fails
    assert loop.run(_library()) == "asyncio"
