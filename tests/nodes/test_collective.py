"""Sums over real gloo: each rank is a thread, as it is a node's compute thread in a run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch

from ddrl_bus.errors import LostReplicaError
from ddrl_bus.nodes.collective import Collective, Rendezvous

LONG_S = 60.0
"""A deadline that is not to be reached: whoever fails before it was told, and did not wait."""
SHORT_S = 1.0
CPU = torch.device("cpu")
T = TypeVar("T")


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ADDRESSES = [
    "127.0.0.1",
    "127.0.0.2",
    pytest.param("[::1]", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
]


class Group:
    """Ranks that meet at the first one's, each on a thread of its own."""

    def __init__(self, world: int, *deadlines_s: float, address: str = "127.0.0.1") -> None:
        self.world, self.address = world, address
        self.deadlines_s = deadlines_s if len(deadlines_s) == world else (*deadlines_s, LONG_S)[:1] * world
        self.store = Rendezvous(address, LONG_S)
        self.generation = 0
        self.threads = [ThreadPoolExecutor(1) for _ in range(world)]
        self.ranks: list[Collective] = []

    def begin(self, *ranks: int) -> list[Future[Collective]]:
        """Have some of them come."""

        def join(rank: int) -> Collective:
            place = self.store.address, self.generation, rank, self.world, self.address
            return Collective(*place, CPU, self.deadlines_s[rank])

        return [self.threads[rank].submit(join, rank) for rank in ranks]

    def form(self) -> Group:
        self.generation += 1
        self.ranks = [joined.result(LONG_S) for joined in self.begin(*range(self.world))]
        return self

    def start(self, rank: int, work: Callable[[Collective, int], T]) -> Future[T]:
        return self.threads[rank].submit(work, self.ranks[rank], rank)

    def all(self, work: Callable[[Collective, int], T]) -> list[T]:
        """What `work` gives at each rank."""
        return [future.result(LONG_S) for future in [self.start(rank, work) for rank in range(self.world)]]

    def close(self) -> None:
        for thread, rank in zip(self.threads, self.ranks, strict=False):
            thread.submit(rank.close).result(LONG_S)
        for thread in self.threads:
            thread.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def group(*args: Any, **kwargs: Any) -> Group:
        made.append(Group(*args, **kwargs))
        return made[-1]

    yield group
    for each in made:
        each.close()


def lost(future: Future[Any], within_s: float) -> str:
    """What the work fails for, not later than that."""
    with pytest.raises(LostReplicaError) as caught:
        future.result(within_s)
    return str(caught.value)


def sum_of(tensor: torch.Tensor) -> Callable[[Collective, int], torch.Tensor]:
    """Each rank gives `tensor` times its number from 1."""

    def work(collective: Collective, rank: int) -> torch.Tensor:
        mine = tensor * (rank + 1)
        collective.sum(mine)
        return mine

    return work


# ── what they make together ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5]),
        torch.arange(12, dtype=torch.float64).view(3, 4) / 3,
        torch.tensor([2**53 + 1, -(2**61)]),
        torch.linspace(-1, 1, 1_000_003),
    ],
    ids=["number", "float64", "int64", "large"],
)
def test_a_sum_is_over_all_ranks(make: Callable[..., Group], world: int, tensor: torch.Tensor) -> None:
    expected = tensor * sum(range(1, world + 1))
    found = make(world).form().all(sum_of(tensor))
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-6 if tensor.is_floating_point() else 0, atol=0)
        assert torch.equal(each, found[0])  # replicas depend on it: the same bits everywhere


@pytest.mark.parametrize("world", [1, 2, 3])
def test_everybodys_numbers_by_rank(make: Callable[..., Group], world: int) -> None:
    expected = [[rank, -(2**63) + rank, 2**63 - 1 - rank] for rank in range(world)]
    assert make(world).form().all(lambda each, rank: each.gather(expected[rank])) == [expected] * world


@pytest.mark.parametrize(("world", "source"), [(1, 0), (2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_one_ranks_bytes_for_all(make: Callable[..., Group], world: int, source: int, size: int) -> None:
    """The others need not know how many there are."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    found = make(world).form().all(lambda each, rank: each.broadcast(data.copy() if rank == source else None, source))
    for array in found:
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, data)


def test_one_after_the_other(make: Callable[..., Group]) -> None:
    """Also groups: nothing of an earlier generation is left at the place where they meet."""
    group = make(2)
    for generation in (1, 2):
        group.form()

        def work(collective: Collective, rank: int) -> list[float]:
            sums = [torch.tensor([float(n + rank)]) for n in range(20)]
            for tensor in sums:
                collective.sum(tensor)
            return [float(tensor.item()) for tensor in sums]

        assert group.all(work) == [[2 * n + 1.0 for n in range(20)]] * 2, generation
        group.all(lambda each, rank: each.close())


@pytest.mark.parametrize("late", [0, 1])
def test_who_comes_late_to_the_next_group_finds_the_others_there(make: Callable[..., Group], late: int) -> None:
    """They do not take it for what it was in the one before."""
    group = make(2).form()
    group.all(lambda each, rank: each.close())
    group.generation += 1
    (first,) = group.begin(1 - late)
    assert not wait([first], 0.1).done
    (second,) = group.begin(late)
    group.ranks = [joined.result(LONG_S) for joined in ((second, first) if late == 0 else (first, second))]
    assert [t.item() for t in group.all(sum_of(torch.ones(1)))] == [3.0] * 2


def test_groups_beside_one_another_do_not_meet(make: Callable[..., Group]) -> None:
    """One process may be in several, for nothing of torch's is global."""
    one, other = make(2).form(), make(3).form()
    assert [t.item() for t in one.all(sum_of(torch.ones(1)))] == [3.0] * 2
    assert [t.item() for t in other.all(sum_of(torch.ones(1)))] == [6.0] * 3
    assert not torch.distributed.is_initialized()


# ── who does not come ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("missing", [0, 2])
def test_a_group_that_somebody_never_joins_is_given_up(make: Callable[..., Group], missing: int) -> None:
    group, began = make(3, 0.3), time.monotonic()
    for joining in group.begin(*(rank for rank in range(3) if rank != missing)):
        assert lost(joining, LONG_S).startswith("generation 0 of 3 replicas: ")
    assert time.monotonic() - began >= 0.2


def test_nobody_at_the_place_where_they_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(LostReplicaError, match=r"^generation 7 of 2 replicas: "):
        Collective(address, 7, 1, 2, "127.0.0.1", CPU, 0.3)


@pytest.mark.parametrize("meeting", [True, False])
def test_a_group_that_nobody_wants_any_more_is_not_waited_for(meeting: bool) -> None:
    """Whether the first member, at whose place they meet, is there or gone."""
    store, wanted = Rendezvous("127.0.0.1", LONG_S), threading.Event()
    address = store.address
    if not meeting:
        del store
    with ThreadPoolExecutor(1) as thread:
        joining = thread.submit(Collective, address, 1, 1, 2, "127.0.0.1", CPU, LONG_S, wanted.is_set)
        assert not wait([joining], 0.2).done
        wanted.set()
        assert lost(joining, LONG_S / 2) == "generation 1 of 2 replicas: another group is wanted"


OPERATIONS: dict[str, Callable[[Collective, int], Any]] = {
    "sum": sum_of(torch.ones(100_000)),
    "gather": lambda each, rank: each.gather([rank]),
    "broadcast": lambda each, rank: each.broadcast(np.zeros(9, np.uint8) if rank == 0 else None, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_who_does_not_come_is_lost_at_the_deadline(make: Callable[..., Group], name: str) -> None:
    group = make(2, SHORT_S).form()
    group.all(OPERATIONS[name])
    began = time.monotonic()
    assert lost(group.start(0, OPERATIONS[name]), LONG_S).startswith("generation 1 of 2 replicas: ")
    assert time.monotonic() - began >= SHORT_S / 2


@pytest.mark.parametrize("leaving", [0, 1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_who_leaves_is_lost_at_once(make: Callable[..., Group], leaving: int, name: str) -> None:
    """Those who wait for it already, and those who come later."""
    group = make(3).form()
    first, second = (rank for rank in range(3) if rank != leaving)
    waiting = group.start(first, OPERATIONS[name])
    group.start(leaving, lambda each, rank: each.close()).result(LONG_S)
    late = group.start(second, OPERATIONS[name])
    for each in (waiting, late):
        assert "replicas: " in lost(each, LONG_S / 2)


def test_a_group_that_failed_is_closed(make: Callable[..., Group]) -> None:
    """Each further use fails at once, and so the others hear of it."""
    group = make(2).form()
    group.all(lambda each, rank: each.close())
    for work in OPERATIONS.values():
        for rank in range(2):
            assert lost(group.start(rank, work), LONG_S / 2) == "generation 1 of 2 replicas: closed before"
    group.all(lambda each, rank: each.close())  # twice is once
    assert [t.item() for t in group.form().all(sum_of(torch.ones(1)))] == [3.0] * 2


def test_a_failure_closes_the_group_for_those_it_did_not_reach(make: Callable[..., Group]) -> None:
    """The first gives up at its deadline; the second is late, and need not wait for its own."""
    group = make(2, SHORT_S, LONG_S).form()
    lost(group.start(0, OPERATIONS["sum"]), LONG_S)
    lost(group.start(1, OPERATIONS["sum"]), LONG_S / 2)


# ── where they are ───────────────────────────────────────────────────────────────────────────────────────────────


def listening() -> dict[tuple[str, int], int]:
    """(address, port) of what this process listens at."""
    connections = psutil.Process().net_connections(kind="tcp")
    return {(c.laddr.ip, c.laddr.port): c.fd for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("address", ADDRESSES)
def test_it_listens_at_its_address_alone(make: Callable[..., Group], address: str) -> None:
    before = listening().keys()
    group = make(2, address=address)
    bare = address.strip("[]")
    host, _, port = group.store.address.rpartition(":")
    assert host == address
    assert listening().keys() - before == {(bare, int(port))}
    group.form()
    new = listening().keys() - before
    assert {ip for ip, _ in new} == {bare}
    assert [t.item() for t in group.all(sum_of(torch.ones(1)))] == [3.0] * 2


def test_a_rendezvous_ends_with_its_node() -> None:
    before, threads = listening().keys(), threading.active_count()
    store = Rendezvous("127.0.0.1", SHORT_S)
    assert len(listening().keys() - before) == 1
    del store
    deadline = time.monotonic() + LONG_S
    while listening().keys() - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_an_address_of_nobody_is_refused() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        Rendezvous("192.0.2.1", SHORT_S)
