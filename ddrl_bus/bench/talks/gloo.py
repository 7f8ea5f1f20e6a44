"""send and recv of torch.distributed over gloo, of tensors that are there already."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from functools import lru_cache
from typing import Any

from ddrl_bus.algos.lazy import torch
from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.talks.talk import Talk, turns


class _Group:
    """Of two."""

    def __init__(self, folder: str, rank: int) -> None:
        torch.set_num_threads(1)
        self._dist: Any = torch.distributed
        self._other = 1 - rank
        store, patience = self._dist.FileStore(f"{folder}/meeting", 2), timedelta(seconds=TIMEOUT_S)
        self._dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
        self.close = self._dist.destroy_process_group

    def send(self, size: int) -> None:
        self._dist.send(_tensor(size), self._other)

    def recv(self, size: int) -> None:
        self._dist.recv(_tensor(size), self._other)


@lru_cache(1)
def _tensor(size: int) -> Any:
    return torch.zeros(size, dtype=torch.uint8)


def group(folder: str) -> AbstractContextManager[Talk]:
    return turns(_Group, (folder, 0), (folder, 1))
