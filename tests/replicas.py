"""Runs of replicated learners, from outside: which groups they form, and that they train."""

from __future__ import annotations

import re
from typing import NamedTuple

from runs import Run


class Formed(NamedTuple):
    generation: int
    ranks: tuple[int, ...]
    """Workers."""
    updates: int
    """That its members had made."""


def groups(run: Run, worker: int) -> list[Formed]:
    """That this worker was in, over all its lives."""
    log = run.folder / "logs" / f"learner-{worker}.log"
    found = re.findall(r'"generation=(\d+) of=(\S+) updates=(\d+)"', log.read_text() if log.exists() else "")
    return [Formed(int(g), tuple(int(name[8:]) for name in names.split(",")), int(n)) for g, names, n in found]


def forms(run: Run, *ranks: int, after: int = 0) -> Formed:
    """The first group above generation `after` of exactly these, once the last of them is in it."""

    def formed() -> Formed | None:
        found = (each for each in groups(run, ranks[-1]) if each.generation > after and each.ranks == ranks)
        return next(found, None)

    group: Formed = run.until(formed, f"a group of {ranks} after generation {after}")
    return group


def updates(run: Run, worker: int) -> int:
    """That all lives of it made."""
    return run.counters(f"learner-{worker}").get("trajectories/trained", 0)


def train(run: Run, *those: int) -> None:
    """Wait until each of them has made some updates more."""
    before = {worker: updates(run, worker) for worker in those}
    run.until(lambda: all(updates(run, worker) > before[worker] + 5 for worker in those), f"updates of {those}")
