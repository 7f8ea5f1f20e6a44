"""Unrolls put together where observations, actions and outcomes arrive one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddrl_bus.experience import FINAL, STATE, Unroll, Unrolls, UnrollSchema, under
from ddrl_bus.messages import Actions, Trajectory, fields_of
from ddrl_bus.transport.wire import Arena, Array

Played = tuple[Arena, dict[str, Any]]
"""An unroll and its fields, ready to be sent."""
OUTCOME: Final = ("reward", "terminated", "truncated")


class Assembler:
    """The unrolls of one vector of environments, row by row: `observed`, `acted`, `led_to`, and again."""

    def __init__(self, unrolls: Unrolls) -> None:
        self._unrolls = unrolls
        self._begin()
        self._returns: list[float] = []
        self._lengths: list[int] = []
        self._learner_epoch = -1

    def _begin(self) -> None:
        self._unroll: Unroll = self._unrolls.next()
        self.row = self._unroll.first
        """Whose action comes next."""

    @property
    def begins(self) -> bool:
        """Whether an unroll begins with the next action: what the agents carry into it is to be told then."""
        return self._unroll.begins(self.row)

    def observed(self, obs: Array) -> Played | None:
        """What the next action is taken from; returns the unroll that ends with it, if one does."""
        played = None
        if self.row == self._unroll.length:
            self._unroll.rows["obs"][self.row] = obs
            said = Trajectory(self._learner_epoch, self._returns, self._lengths, self._unroll.first)
            played = self._unroll.finish(), fields_of(said)
            self._returns, self._lengths = [], []
            self._begin()
        self._unroll.rows["obs"][self.row] = obs
        return played

    def acted(self, arrays: Mapping[str, Array], by: Actions) -> None:
        """The actions and what was recorded of them, named as in `Actions`; `state.*` counts where an unroll begins."""
        rows = self._unroll.rows
        self._unroll.carried(self.row, under(STATE, arrays))
        for name, array in arrays.items():
            if not name.startswith(STATE):
                rows[name][self.row] = array
        rows["version"][self.row] = by.version
        self._learner_epoch = by.learner_epoch
        self.row += 1

    def led_to(self, arrays: Mapping[str, Array], returns: Sequence[float], lengths: Sequence[int]) -> None:
        """What the actions led to, as in `Act`."""
        t = self.row - 1
        for name in OUTCOME:
            self._unroll.rows[name][t] = arrays[name]
        if FINAL[0] in arrays:
            self._unroll.truncated(t, *(arrays[name] for name in FINAL))
        self._returns += returns
        self._lengths += lengths

    def restart(self) -> int:
        """Begin an unroll anew, the returns of episodes excepted; returns the new rows that came to nothing."""
        lost = self.row - self._unroll.first
        self._unrolls.restart()
        self._begin()
        return lost


def new_rows(played: Played, schema: UnrollSchema) -> int:
    """Rows of an unroll that no other one brought."""
    return schema.unroll - int(played[1]["overlap"])
