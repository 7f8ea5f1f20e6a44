"""The comparison runs, and a sum that is none is not measured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from ddrl_bus.bench import allreduce
from ddrl_bus.nodes.collective import Collective, Rendezvous


def test_a_row_for_each_size() -> None:
    rows = list(allreduce.measure(ranks=(2,), sizes=(1_000, 40_000), repeats=2))
    words = [row.name.replace(",", "").split() for row in rows]
    assert [name[:2] for name in words] == [["2", "processes"]] * 2
    assert [int(name[2]) for name in words] == pytest.approx([1_000, 40_000], rel=0.03)
    for row in rows:
        bare, summed, pooled = (row.figures[way].values for way in allreduce.WAYS)
        assert len(bare) == 2
        assert min(*bare, *summed, *pooled) > 0
        assert row.figures["sum ratio"].values == pytest.approx(
            [ours / b for ours, b in zip(summed, bare, strict=True)]
        )
        assert row.figures["pooled ratio"].values == pytest.approx([p / b for p, b in zip(pooled, bare, strict=True)])


@pytest.mark.parametrize("wrong", ["", "bare", "sum", "pooled"])
def test_what_is_not_the_sum_over_all_is_refused(wrong: str) -> None:
    rendezvous = Rendezvous(allreduce.LOOPBACK, 30)

    def side(rank: int) -> None:
        among = Collective(rendezvous.address, 1, rank, 2, allreduce.LOOPBACK, torch.device("cpu"), 30)
        algo = allreduce._algorithm(1_000)
        algo.all_reduce = among.sum
        parameters = list(algo.net.parameters())
        flat = torch.zeros(10)
        ways: dict[str, Callable[[], None]] = {"bare": partial(among.sum, flat), "sum": partial(among.sum, flat)}
        ways["pooled"] = partial(algo._pool_gradients, rows=1)
        if wrong:
            ways[wrong] = lambda: None
        allreduce._check(ways, flat, parameters, among)

    with ThreadPoolExecutor(2) as threads:
        checked = [threads.submit(side, rank) for rank in (0, 1)]
        for each in checked:
            if wrong:
                with pytest.raises(ValueError, match=f"{wrong}: got .* expected .* everywhere"):
                    each.result()
            else:
                each.result()
