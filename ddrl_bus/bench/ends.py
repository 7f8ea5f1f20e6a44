"""What both ways of a link benchmark share: payloads, orders, and what an end answers.

A *cell* is one payload over one transport between one *hub*, which binds, and some *spokes*, which connect: senders to
a receiver (`queue`), subscribers to a publisher (`latest`), clients to a server (`request`). Each end carries out
orders: move so many messages as fast as may be, or at moments that were set in advance.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.transport.wire import Layout, Spec

LinkKind = Literal["queue", "latest", "request"]
Transport = Literal["memory", "ipc", "ipc+shared", "tcp", "tcp+CURVE"]
SHARED: Final = "ipc+shared"
"""Of weights: one copy in shared memory, which all processes of the host read; ipc says where it lies."""
LINK: Final = "bench"
HUB: Final = "learner-0"
TIMEOUT_S: Final = 30.0
"""Of one message, against hangs only."""


def spoke(index: int) -> str:
    """Its node's name."""
    return f"actor-{index}"


@dataclass(frozen=True)
class Payload:
    """What travels, over which kind of link, and how much of it is measured.

    `flood` messages of all spokes together as fast as may be; then at each of `rates` a second.
    """

    name: str
    link: LinkKind
    specs: Mapping[str, Spec]
    flood: int
    rates: tuple[int, ...]
    window: int = 16

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in self.specs.values())

    @property
    def frame_bytes(self) -> int:
        """Of a frame of ours: what is sent through bare sockets is as long."""
        fields = {"due": time.monotonic_ns()}
        return len(Layout("bench", self.specs).arena().encode(spoke(0), 1, 1, fields))


_PIXELS: Final[dict[str, Spec]] = {
    "obs": ("uint8", (20, 84, 84, 4)),
    "action": ("int64", (20,)),
    "reward": ("float32", (20,)),
    "terminated": ("bool", (20,)),
    "truncated": ("bool", (20,)),
    "logits": ("float32", (20, 6)),
}
PAYLOADS: Final = {
    payload.name: payload
    for payload in (
        Payload("small unroll, 320 B", "queue", {"obs": ("float32", (20, 4))}, 20_000, (1_000, 5_000), window=64),
        Payload("pixel unroll, 567 KB", "queue", _PIXELS, 1_000, (100, 400)),
        Payload("weights, 6.7 MB", "latest", {"weights": ("float32", (1_675_000,))}, 20, (10,)),
        Payload("request, 64 B", "request", {"obs": ("uint8", (64,))}, 2_000, (500, 2_000)),
        Payload("request, 64 KB", "request", {"obs": ("uint8", (65_536,))}, 1_000, (200, 1_000)),
    )
}


@dataclass(frozen=True, slots=True)
class Setup:
    """A cell as each of its ends is told of it."""

    payload: Payload
    transport: Transport
    peers: int
    address: str
    acks: str
    """Where subscribers say over a bare socket, on either way, which value they hold."""
    curve: tuple[bytes, bytes] = (b"", b"")
    """Public and secret key of bare sockets."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one end is to do: of each spoke `messages` after `warm_up`, at moments if there is a `rate`."""

    messages: int
    warm_up: int = 0
    rate: float | None = None
    phase: float = 0.0
    """Part of an interval by which this spoke is late."""

    @property
    def total(self) -> int:
        return self.messages + self.warm_up


@dataclass(frozen=True, slots=True)
class Answer:
    """What an end saw: seconds for the messages after the warm-up (0: it cannot say), and how late each one was."""

    seconds: float = 0.0
    latencies: NDArray[np.float64] | Sequence[float] = ()
