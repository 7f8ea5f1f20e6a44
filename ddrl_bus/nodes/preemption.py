"""Stragglers: a worker whose rollout takes longer than those of most others ends it early, and trains on what it has.

Source: Wijmans et al. 2020, "DD-PPO" (arXiv 1911.00357), with p = 60 %; that a worker has a quarter of its steps first
is from the paper's code, habitat-lab's ppo_trainer.py.
"""

from __future__ import annotations

SLACK = 1e-9
"""Shares are decimal fractions, which floats miss by less: .07 of 100 are 7."""


def preempted(rows: int, least: int, done: int, workers: int, share: float) -> bool:
    """Whether a worker that has played `rows` of its rollout stops there.

    Args:
        rows: steps of each of its environments so far.
        least: rows that a worker plays in any case.
        done: workers that have played theirs.
        workers: all of them.
        share: of the workers that must have played theirs; 0: nobody is ever stopped.
    """
    return share > 0 and done >= share * workers - SLACK and rows >= least
