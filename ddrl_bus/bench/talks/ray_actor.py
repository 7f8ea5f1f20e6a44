"""Calls of a Ray actor's methods."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.talks.talk import Talk, trips


class _Calls:
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def stream(self, size: int, count: int) -> float:
        """Calls of one caller are answered in order: the last answer is that of all."""
        message = np.zeros(size, np.uint8)
        began = time.perf_counter()
        answers = [self._actor.take.remote(message) for _ in range(count)]
        self._ray.get(answers[-1], timeout=TIMEOUT_S)
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        message = np.zeros(size, np.uint8)
        return trips(count, lambda: self._ray.get(self._actor.echo.remote(message), timeout=TIMEOUT_S))


class _Actor:
    def take(self, message: Any) -> None:
        pass

    def echo(self, message: Any) -> Any:
        return message


@contextmanager
def calls(folder: str) -> Iterator[Talk]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
    try:
        actor = ray.remote(_Actor).remote()
        ray.get(actor.take.remote(b""))
        yield _Calls(ray, actor)
    finally:
        ray.shutdown()
