"""One small network per test. Whatever reaches the loop's exception handler fails the test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from harness import Net


@pytest.fixture(params=["memory", "ipc", "tcp"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def net(scheme: str) -> AsyncIterator[Net]:
    net = Net(scheme)
    yield net
    await net.close()
    assert net.unhandled == []
