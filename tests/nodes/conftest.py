from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import FakeController, Rig, rig_of


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig_of(tmp_path) as made:
        yield made


@pytest.fixture
async def controller(rig: Rig) -> FakeController:
    return rig.fake_controller()
