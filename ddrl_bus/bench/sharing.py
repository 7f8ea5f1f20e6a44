"""From which size it pays that processes of a host read weights in one place: `ddrl bench sharing`.

The same value through our `latest` link over ipc, once shared in memory and once sent to each subscriber, repeat by
repeat in turn. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ddrl_bus.bench.crew import crew
from ddrl_bus.bench.ends import SHARED, Payload
from ddrl_bus.bench.links import OURS, Cell, flood_row, together
from ddrl_bus.bench.report import US, About, Row

SIZES: Final = tuple(kib << 10 for kib in (4, 16, 32, 64, 128, 256, 1024, 4096))
SUBSCRIBERS: Final = (1, 4, 16)
ABOUT: Final = About(
    bench="sharing",
    title="From which size it pays to share weights instead of sending them",
    method="""One process publishes values, others of the same host hold each before the next one comes: they copy it
to memory of their own, as an actor loads weights. Sent, each of them gets the bytes over a socket; shared, the
publisher writes them once to memory that all can read, and sends where they lie. Both over ipc, repeat by repeat in
turn.""",
    reading="""Microseconds until all subscribers hold a value, and processor time of all processes together. Below the
line sharing is quicker.""",
    baseline="sent",
)
_KINDS: Final = {"shared": US, "sent": US, "shared CPU": US, "sent CPU": US}
_RATIOS: Final = {"ratio": ("shared", "sent"), "CPU ratio": ("shared CPU", "sent CPU")}


def measure(
    sizes: Sequence[int] = SIZES, subscribers: Sequence[int] = SUBSCRIBERS, values: int = 200, repeats: int = 5
) -> Iterator[Row]:
    """A row for each number of subscribers and size in bytes; so many values in each repeat."""
    with crew(2 * (1 + max(subscribers))) as members:
        half = len(members) // 2
        ways = {"shared": (OURS, members[:half]), "sent": (OURS, members[half:])}
        for peers in subscribers:
            for size in sizes:
                weights = Payload(f"{size >> 10} KiB", "latest", {"weights": ("uint8", (size,))}, values, ())
                with together(Cell(weights, "ipc", peers), ways, {"shared": SHARED}) as groups:
                    yield flood_row(Cell(weights, "ipc", peers), groups, repeats, _KINDS, _RATIOS)
