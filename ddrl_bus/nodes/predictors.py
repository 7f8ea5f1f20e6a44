"""Policies that answer for many groups at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from ddrl_bus.algos.policy import Explore, Policy
from ddrl_bus.messages import Actions, Weights, parse
from ddrl_bus.nodes.groups import Group
from ddrl_bus.transport.shared import read
from ddrl_bus.transport.wire import Message


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
        self._env_steps = 0

    def answer(self, groups: Sequence[Group], newest: Message) -> None:
        """Have the policy act once for all `groups`, by the newest weights."""
        if newest is not self._loaded:
            with self._unpack:
                loaded = read(newest, lambda message: self.policy.load(message.arrays))
                weights = parse(Weights, loaded)
                self._loaded, self._by = newest, Actions(weights.updates, loaded.epoch)
                self._env_steps = weights.env_steps
        with self._record:
            obs = np.concatenate([group.obs for group in groups])
            state = {name: np.concatenate([group.state[name] for group in groups]) for name in groups[0].state}
            explore = Explore(np.concatenate([group.places for group in groups]), self._env_steps)
        with self._forward:
            acted = self.policy.act(obs, state, explore)
        with self._record:
            end = 0
            for group in groups:
                rows = slice(end, end := end + len(group.obs))
                record = {name: array[rows] for name, array in acted.record.items()}
                carried = {name: array[rows] for name, array in acted.state.items()}
                group.acted(acted.action[rows], record, carried, self._by)
