"""Random episodes that a policy plays, row by row, and the windows cut out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import Batch, Policy, Spaces, memory
from ddrl_bus.algos.policy import Explore

ENVS = 6


@dataclass
class Played:
    obs: NDArray[Any]
    """[T+1, N, ...]"""
    rows: dict[str, NDArray[Any]]
    """action, reward, terminated, truncated [T, N]"""
    record: dict[str, NDArray[Any]]
    states: list[memory.State]
    """what agents carried before each of T+1 rows"""
    finals: dict[tuple[int, int], NDArray[Any]]
    """(t, n) of a truncated row → the observation that its episode ended with"""

    def window(self, start: int, length: int) -> Batch:
        """Rows `start` to `start + length`, a column per environment."""
        rows = slice(start, start + length)
        finals = [(t - start, n) for t, n in self.finals if start <= t < start + length]
        shape = (0, *self.obs.shape[2:])
        return Batch(
            obs=self.obs[start : start + length + 1],
            **{name: array[rows] for name, array in self.rows.items()},
            record={},
            version=np.zeros((length, ENVS), np.int64),
            final_obs=np.array([self.finals[t + start, n] for t, n in finals], self.obs.dtype).reshape(-1, *shape[1:]),
            final_index=np.array([t * ENVS + n for t, n in finals], np.int64),
            state=self.states[start],
        )


def play(policy: Policy, spaces: Spaces, rows: int, *, seed: int = 0, ends: float = 0.1) -> Played:
    """`ends`: probability of a termination, and of a truncation, after each row. Environments explore by their places,
    from row to row."""
    rng = np.random.default_rng(seed)

    def observe() -> Any:
        drawn = 100 * np.abs(rng.normal(size=(ENVS, *spaces.obs_shape)))
        return (drawn if spaces.obs_dtype == "uint8" else drawn / 100).astype(spaces.obs_dtype)

    obs, state = [observe()], policy.initial_state(ENVS)
    states, played = [copied(state)], []
    finals: dict[tuple[int, int], NDArray[Any]] = {}
    explore = Explore(np.linspace(0, 1, ENVS, dtype=np.float32))
    for t in range(rows):
        acted = policy.act(obs[t], state, explore)
        drawn, reward, final = rng.random(ENVS), (3 * rng.normal(size=ENVS)).astype(np.float32), observe()
        terminated, truncated = drawn < ends, (drawn >= ends) & (drawn < 2 * ends)
        finals |= {(t, n): final[n] for n in np.flatnonzero(truncated).tolist()}
        played.append(
            {"action": acted.action, "reward": reward, "terminated": terminated, "truncated": truncated}
            | copied(acted.record)
        )
        state = memory.carry(acted.state, acted.action, reward, np.flatnonzero(terminated | truncated))
        states.append(copied(state))
        obs.append(observe())
    stacked = {name: np.stack([row[name] for row in played]) for name in played[0]}
    names = ("action", "reward", "terminated", "truncated")
    record = {name: array for name, array in stacked.items() if name not in names}
    return Played(np.stack(obs), {name: stacked[name] for name in names}, record, states, finals)


def copied(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: array.copy() for name, array in arrays.items()}
