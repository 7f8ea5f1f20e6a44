"""What a node reports arrives whole, however many peers it has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.messages import Progress, fields_of
from ddrl_bus.nodes.reports import report_of, reported
from ddrl_bus.transport import wire

PROGRESS = Progress("learner", "running", 1, "box", "0123456789ab", "0.1.0", 1.5e9, {"env_steps": 640})


def test_a_report_holds_the_ledger_of_a_node_with_thousands_of_peers() -> None:
    """A header could not."""
    life = "actor-1000@0000000100000007>learner-0@0000000100000007"
    counters = {f"trajectories/{number}-{life}/accepted": number for number in range(10_000)}
    progress = replace(PROGRESS, counters=counters, earlier={"learner-0@0000000000000001": counters})
    fields, arrays = reported(progress)
    message = wire.decode(wire.encode(Progress.KIND, "learner-0", 1, 1, fields, arrays))
    assert report_of(message) == progress


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"[{}]",
        b'[{"a": 1.5}, {}]',
        b'[{"a": 1}, {"b": 2}]',
        b"[{}, {}, {}]",
        b'[{"a": 9223372036854775808}, {}]',
        b"[" * 100_000,
    ],
)
def test_ledgers_that_are_none_are_refused(text: bytes) -> None:
    arrays = {"ledgers": np.frombuffer(text, np.uint8)}
    message = wire.decode(wire.encode(Progress.KIND, "learner-0", 1, 1, fields_of(PROGRESS), arrays))
    with pytest.raises(WireError, match="ledgers"):
        report_of(message)
