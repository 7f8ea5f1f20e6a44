"""How often each byte of a message is copied: `ddrl bench copies`.

A library that the processes load first counts what memcpy and memmove copy, and what the kernel takes and gives by send
and recv: all that our code, numpy, pyzmq and libzmq do. It needs a C compiler, and glibc.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ddrl_bus.bench.crew import Member, crew
from ddrl_bus.bench.ends import PAYLOADS
from ddrl_bus.bench.links import OURS, RAW, TRANSPORTS, Cell, Group, Scope, fresh_keys, patched, together
from ddrl_bus.bench.raw_ends import ANSWER_BYTES
from ddrl_bus.bench.report import About, Kind, Repeat, Row, row
from ddrl_bus.errors import UsageError

SCOPE: Final = Scope(tuple(name for name in PAYLOADS if name != "request, 64 B"), TRANSPORTS, (1,), repeats=2, part=0.2)
COPIES: Final = Kind("", digits=2)
ABOUT: Final = About(
    bench="copies",
    title="How often each byte of a message is copied on its way",
    method="""One process sends, another receives; through our links, and through bare sockets of pyzmq. A library that
both load first counts the bytes that memcpy and memmove copy, from 256 at once, and those that send and recv hand to
the kernel and take from it; both divided by the bytes of the messages (of a request: question and answer). Nobody
writes anything into a message here, and only weights are copied to where they would be used, on both ways alike.""",
    reading="""link, raw: how often our code, numpy, pyzmq and libzmq together copy each byte. kernel: how often it is
copied into a socket and out of one. Parts of one are copies of parts: headers, and what is at the end of a read
buffer.""",
)


_KINDS: Final = dict.fromkeys(("link", "raw", "link kernel", "raw kernel"), COPIES)
_COUNTERS: Final = struct.Struct("3l")  # as in copies.c


def measure(scope: Scope = SCOPE) -> Iterator[Row]:
    """A row for each cell.

    Raises:
        UsageError: nothing here compiles C.
    """
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name, fresh_keys():
        folder = Path(name)
        with _counting(folder), crew(4) as members:
            ends = {"link": (OURS, members[:2]), "raw": (RAW, members[2:])}
            for cell in scope.cells():
                with together(cell, ends) as groups:
                    found = [
                        {
                            name: copies
                            for way, group in groups.items()
                            for name, copies in _copied(cell, way, group, ends[way][1], folder).items()
                        }
                        for _ in range(scope.repeats)
                    ]
                yield row("copies of each byte", str(cell), found, _KINDS)


def _copied(cell: Cell, way: str, group: Group, members: Sequence[Member], folder: Path) -> Repeat:
    before = _counted(folder, members)
    group.flood(way)
    user, sent, received = (after - was for after, was in zip(_counted(folder, members), before, strict=True))
    size = cell.payload.frame_bytes + (ANSWER_BYTES if cell.payload.link == "request" else 0)
    moved = size * group.flood_order.total
    return {way: user / moved, f"{way} kernel": (sent + received) / moved}


def _counted(folder: Path, members: Sequence[Member]) -> list[int]:
    """Bytes so far: by code, into sockets, out of them."""
    counters = (_COUNTERS.unpack((folder / str(member.pid)).read_bytes()) for member in members)
    return [sum(each) for each in zip(*counters, strict=True)]


@contextmanager
def _counting(folder: Path) -> Iterator[None]:
    """Processes that are started meanwhile count into files of their own here."""
    library, source = folder / "copies.so", Path(__file__).with_name("copies.c")
    if (compiler := shutil.which("cc")) is None:
        raise UsageError("ddrl bench copies: no C compiler cc on the PATH; install one, as by: apt install gcc")
    # Left to itself the compiler would make calls of memcpy out of the loops that are memcpy here.
    subprocess.run(
        [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            "-fno-builtin",
            "-fno-tree-loop-distribute-patterns",
            "-o",
            library,
            source,
        ],
        check=True,
    )
    with patched({"LD_PRELOAD": str(library), "DDRL_COPIES": str(folder)}):
        yield
