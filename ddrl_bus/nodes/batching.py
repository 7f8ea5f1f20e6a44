"""Which requests are answered together, and when: without I/O, the clock is given in.

A batch is due as soon as somebody is free to answer it and it is full, or its oldest request has waited long enough, or
nobody is left who could still join it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

PRESENT_S: Final = 1.0
"""Who has not asked for this long is not waited for."""


class Batcher(Generic[K]):
    """Whole requests in the order they came, at most one of each asker.

    Args:
        batch: rows after which a batch is due at once; the request that fills it may bring more.
        wait: seconds that the oldest request waits for a fuller batch; 0 takes what is there.
    """

    def __init__(self, batch: int, wait: float) -> None:
        self.batch = batch
        self.wait = wait
        self.rows = 0
        self.waited = 0.0
        """Seconds that the oldest request of the batch taken last had waited."""
        self._waiting: dict[K, tuple[int, float]] = {}
        self._heard: dict[K, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, asker: K, rows: int, now: float) -> None:
        """Raises: ValueError if a request of this asker waits already: its rows would stand in one batch twice."""
        if asker in self._waiting:
            raise ValueError(f"{asker} asks again before it is answered")
        self._waiting[asker] = rows, now
        self._heard[asker] = now
        self.rows += rows

    def drop(self, asker: K) -> None:
        """Its request, if one waits, is of no interest any more."""
        rows, _ = self._waiting.pop(asker, (0, 0.0))
        self.rows -= rows

    @property
    def due_at(self) -> float | None:
        """When a batch is due whoever may still come; None while no request waits."""
        return next((came + self.wait for _, came in self._waiting.values()), None)

    def take(self, now: float) -> list[K]:
        """The askers of the batch that is due, or none."""
        due_at = self.due_at
        if due_at is None or not (now >= due_at or self.rows >= self.batch or self._complete(now)):
            return []
        self.waited = now - due_at + self.wait
        taken: list[K] = []
        rows = 0
        for asker, (more, _) in self._waiting.items():
            taken.append(asker)
            rows += more
            if rows >= self.batch:
                break
        for asker in taken:
            self.drop(asker)
        return taken

    def _complete(self, now: float) -> bool:
        """Whether everybody who is present waits."""
        return all(asker in self._waiting or now - heard > PRESENT_S for asker, heard in self._heard.items())
