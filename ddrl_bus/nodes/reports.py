"""How a node's `Progress` travels: with hundreds of peers its ledgers outgrow a header, so they are an array."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from ddrl_bus.errors import WireError
from ddrl_bus.messages import Progress, parse
from ddrl_bus.transport.wire import Array, Message

MAX_LEDGERS: Final = 16 << 20
"""Bytes; a full ledger has 16,384 counters, and a report brings at most two."""


def reported(progress: Progress) -> tuple[dict[str, Any], dict[str, Array]]:
    """`progress` as fields, and its ledgers as the array `ledgers` [bytes] uint8."""
    text = json.dumps([progress.counters, progress.earlier]).encode()
    return asdict(replace(progress, counters={}, earlier={})), {"ledgers": np.frombuffer(text, np.uint8)}


def report_of(message: Message) -> Progress:
    """The `Progress` in `message`.  Raises: WireError, as `parse`."""
    progress = parse(Progress, message)
    if (ledgers := message.arrays.get("ledgers")) is None:
        return progress
    if ledgers.dtype != np.uint8 or ledgers.ndim != 1 or ledgers.size > MAX_LEDGERS:
        raise WireError("fields", f"ledgers: got {ledgers.dtype.name}{list(ledgers.shape)}")
    try:
        counters, earlier = json.loads(bytes(ledgers))
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError("fields", f"ledgers: {type(error).__name__}") from None
    if not isinstance(earlier, dict) or not all(map(_is_ledger, [counters, *earlier.values()])):
        raise WireError("fields", "ledgers: expected [counters, {life: counters}]")
    return replace(progress, counters=counters, earlier=earlier)


def _is_ledger(counters: object) -> bool:
    whole = range(-(1 << 63), 1 << 63)
    return isinstance(counters, dict) and all(type(count) is int and count in whole for count in counters.values())
