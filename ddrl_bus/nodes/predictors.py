"""Policies that answer for many groups at once, and how many of them are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

import numpy as np

from ddrl_bus.algos.policy import Policy
from ddrl_bus.messages import Actions, Weights, parse
from ddrl_bus.nodes.groups import Group
from ddrl_bus.transport.wire import Message

BETTER: Final = 1.05
"""By this factor one more or one fewer has to be faster: rates of equal numbers differ by some per cent too."""


class Predictor:
    """A policy and the weights it acts by; used by one thread at a time.

    Args:
        clocks: count the time of loading weights (`unpack`), of the policy (`forward`), and of what is around it
            (`record`).
    """

    def __init__(self, policy: Policy, clocks: Mapping[str, AbstractContextManager[None]]) -> None:
        self.policy = policy
        self._unpack, self._forward, self._record = (clocks[name] for name in ("unpack", "forward", "record"))
        self._loaded: Message | None = None
        self._by = Actions(-1, -1)

    def answer(self, groups: Sequence[Group], newest: Message) -> None:
        """Have the policy act once for all `groups`, by the newest weights."""
        if newest is not self._loaded:
            with self._unpack:
                self.policy.load(newest.arrays)
                self._loaded, self._by = newest, Actions(parse(Weights, newest).updates, newest.epoch)
        with self._record:
            obs = np.concatenate([group.obs for group in groups])
            state = {name: np.concatenate([group.state[name] for group in groups]) for name in groups[0].state}
        with self._forward:
            acted = self.policy.act(obs, state)
        with self._record:
            end = 0
            for group in groups:
                rows = slice(end, end := end + len(group.obs))
                record = {name: array[rows] for name, array in acted.record.items()}
                carried = {name: array[rows] for name, array in acted.state.items()}
                group.acted(acted.action[rows], record, carried, self._by)


class HillClimb:
    """Finds the number that makes the highest rate: tries one more or one fewer, and keeps what is faster.

    It measures anew before each trial, so that rates from other times of a run are not compared.

    Args:
        most: the highest number there may be; the lowest is 1.
    """

    def __init__(self, most: int) -> None:
        self.number = 1
        """To be used now."""
        self._most, self._step = most, 1
        self._kept: tuple[int, float] | None = None

    def measured(self, rate: float) -> int:
        """The number to use next, now that `number` has made this rate."""
        if self._kept is not None:
            kept, was = self._kept
            self._kept = None
            if rate < was * BETTER:
                self._step = -self._step
                self.number = kept
                return self.number
        if not 1 <= self.number + self._step <= self._most:
            self._step = -self._step
        if 1 <= self.number + self._step <= self._most:
            self._kept = self.number, rate
            self.number += self._step
        return self.number
