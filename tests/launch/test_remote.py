from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from ddrl_bus.launch import remote
from ddrl_bus.messages import STATUS
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger


async def test_two_who_ask_from_one_process_do_not_fence_each_other(tmp_path: Path) -> None:
    """The live display asks for the status while Ctrl-C asks to stop."""
    address = f"ipc://{tmp_path}/progress"
    bus = Bus("controller-0", 1, Ledger())
    server = bus.server("progress", [address])

    async def answer() -> None:
        while True:
            request = await server.recv()
            request.answer(STATUS, arrays={"json": np.frombuffer(b'{"phase": "run"}', np.uint8)})

    answering = asyncio.create_task(answer())
    try:
        with remote.controller(address) as display, remote.controller(address) as ctrl_c:
            assert await display.status() == {"phase": "run"}
            await ctrl_c.stop()
            assert await display.status() == {"phase": "run"}
    finally:
        answering.cancel()
        bus.close()
