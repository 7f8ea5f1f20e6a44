"""What summing the gradients of replicas costs over gloo itself: `ddrl bench allreduce`.

Three ways, sum by sum in turn in one run, between the same processes, over this machine's loopback: a flat float32
tensor by `torch.distributed.all_reduce` in a group of `init_process_group("gloo")` (*bare*); the same by our
`Collective` (*sum*); and the gradients of a PPO network of that size as a learner pools them, weighted, packed into one
piece and divided (*pooled*). Before each, everybody is waited for by the same means. That all three come to the right
sum is checked first. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.ppo import Ppo, PpoConfig
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.bench.report import US, About, Row, row
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.nodes.collective import Collective, Rendezvous

RANKS: Final = (2, 4)
BYTES: Final = (1_000, 6_700_000)
"""Of about the smallest network, and of DQN's for Atari games, 1.7 million weights."""
WAYS: Final = ("bare", "sum", "pooled")
LEAST, MOST, ALTOGETHER = 20, 100, 150_000_000
"""Sums of each way in a repeat, at least and at most; bytes summed, where that is between them."""
PATIENCE_S: Final = 60.0
"""Against hangs only."""
LOOPBACK: Final = "127.0.0.1"


ABOUT: Final = About(
    bench="allreduce",
    title="What summing the gradients of replicas costs over gloo itself",
    method="""Three ways, sum by sum in turn between the same processes over this machine's loopback: a flat float32
tensor by torch.distributed.all_reduce (bare); the same by the collective that learners use (sum); and the gradients
of a network of that size as a learner pools them: weighted, packed into one piece, summed, divided (pooled). That
all three come to the right sum is checked first.""",
    reading="Microseconds a sum, as the first process saw them. Bytes are of the network's parameters.",
    baseline="bare gloo",
)
KINDS: Final = dict.fromkeys(WAYS, US)
RATIOS: Final = {"pooled ratio": ("pooled", "bare"), "sum ratio": ("sum", "bare")}


def measure(ranks: Sequence[int] = RANKS, sizes: Sequence[int] = BYTES, repeats: int = 5) -> Iterator[Row]:
    """A row for each number of processes and each size in bytes, which is met as nearly as layers allow."""
    for count in ranks:
        for size, seconds in _between_processes(count, sizes, repeats):
            times = np.median(seconds, axis=1) * 1e6  # [repeats, ways]
            found = [dict(zip(WAYS, each, strict=True)) for each in times.tolist()]
            yield row("sums", f"{count} processes, {size:,} bytes", found, KINDS, RATIOS)


Measured = tuple[int, Any]
"""How many bytes the parameters have, and seconds a sum [repeats, sums, ways], as the first process saw them."""


def _between_processes(ranks: int, sizes: Sequence[int], repeats: int) -> list[Measured]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder, ProcessPoolExecutor(ranks, spawn) as processes:
        side = partial(_side, ranks=ranks, sizes=sizes, repeats=repeats, meeting=Path(folder) / "meeting")
        first, *_ = processes.map(side, range(ranks))
        return first


# ---- in each process


def _side(rank: int, ranks: int, sizes: Sequence[int], repeats: int, meeting: Path) -> list[Measured]:
    keep_freed_memory()  # as every node does
    torch.set_num_threads(1)  # as every learner does
    dist: Any = torch.distributed
    store = dist.FileStore(str(meeting), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE_S))
    if rank == 0:
        rendezvous = Rendezvous(LOOPBACK, PATIENCE_S)
        store.set("rendezvous", rendezvous.address)
    address = store.get("rendezvous").decode()
    collective = Collective(address, 1, rank, ranks, LOOPBACK, torch.device("cpu"), PATIENCE_S)
    measured = [_timed(_algorithm(size), collective, repeats) for size in sizes]
    dist.barrier()  # the others' store is the first one's
    collective.close()
    dist.destroy_process_group()
    return measured


def _timed(algo: Ppo, collective: Collective, repeats: int) -> Measured:
    dist: Any = torch.distributed
    parameters: list[Any] = list(algo.net.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    algo.all_reduce = collective.sum
    ways: Mapping[str, Callable[[], object]] = {
        "bare": lambda: dist.all_reduce(flat),
        "sum": lambda: collective.sum(flat),
        "pooled": lambda: algo._pool_gradients(rows=1),
    }
    _check(ways, flat, parameters, collective)
    size = flat.numel() * flat.element_size()
    together = {"bare": dist.barrier, "sum": partial(collective.gather, [0]), "pooled": partial(collective.gather, [0])}
    count = min(MOST, max(LEAST, ALTOGETHER // size))
    turns = [[[_seconds(together[way], ways[way]) for way in WAYS] for _ in range(count)] for _ in range(repeats)]
    return size, np.array(turns)


def _check(ways: Mapping[str, Callable[[], object]], flat: Any, parameters: list[Any], among: Collective) -> None:
    """Leaves in `flat` zeros, which no sum makes larger, and in `parameters` a mean, which no further one changes.

    Raises:
        ValueError: a way does not sum over all.
    """
    total = among.world * (among.world + 1) / 2
    for way, value in {"bare": total, "sum": total, "pooled": total / among.world}.items():
        flat.fill_(among.rank + 1)
        for p in parameters:
            p.grad = torch.full_like(p, among.rank + 1)
        ways[way]()
        result = torch.cat([p.grad.reshape(-1) for p in parameters]) if way == "pooled" else flat
        if not bool((result == value).all()):
            raise ValueError(f"{way}: got {result.unique().tolist()}, expected {value} everywhere")
    flat.zero_()


def _seconds(together: Callable[[], object], way: Callable[[], object]) -> float:
    together()
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _algorithm(size: int) -> Ppo:
    """PPO with a network of about so many bytes."""
    width = max(1, round(math.sqrt(size / 4 + 17) - 4.5))  # w² + 9 w + 3 parameters
    config = PpoConfig(hidden=(width, width))
    return Ppo(config, Spaces((4,), "float32", "discrete", 2), seed=0)
