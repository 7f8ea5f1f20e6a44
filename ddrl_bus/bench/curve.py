"""What encryption costs: `ddrl bench curve`.

The same unrolls through our `queue` link over tcp on one machine, in plain text and by key, repeat by repeat in turn.
Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ddrl_bus.bench.crew import crew
from ddrl_bus.bench.ends import PAYLOADS
from ddrl_bus.bench.links import OURS, Cell, flood_row, fresh_keys, together
from ddrl_bus.bench.report import MB_PER_S, US, About, Row

CELLS: Final = tuple(
    Cell(PAYLOADS[name], "tcp", peers=1)
    for name in ("small unroll, 320 B", "pixel unroll, 567 KB", "request, 64 B", "request, 64 KB", "weights, 6.7 MB")
)
ABOUT: Final = About(
    bench="curve",
    title="What encryption costs a link",
    method="""Messages between two processes of one machine over tcp, in plain text and by CurveZMQ with keys that
are checked at each handshake and each message, repeat by repeat in turn, as fast as may be.""",
    reading="Microseconds a message (of weights: until the subscriber holds a version).",
    baseline="plain text",
)
_KINDS: Final = {"plain": US, "CURVE": US, "CURVE rate": MB_PER_S, "plain CPU": US, "CURVE CPU": US}


def measure(cells: Sequence[Cell] = CELLS, repeats: int = 5) -> Iterator[Row]:
    """A row per cell."""
    with fresh_keys(), crew(4) as members:
        ways = {"plain": (OURS, members[:2]), "CURVE": (OURS, members[2:])}
        for cell in cells:
            with together(cell, ways, {"CURVE": "tcp+CURVE"}) as groups:
                yield flood_row(cell, groups, repeats, _KINDS, {"ratio": ("CURVE", "plain")})
