"""Unrolls put together where observations, actions and outcomes arrive one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddrl_bus.experience import FINAL, STATE, Unroll
from ddrl_bus.messages import Actions, Trajectory, fields_of
from ddrl_bus.transport.wire import Arena, Array, Layout

Played = tuple[Arena, dict[str, Any]]
"""An unroll and its fields, ready to be sent."""
OUTCOME: Final = ("reward", "terminated", "truncated")


class Assembler:
    """The unrolls of one vector of environments, row by row: `observed`, `acted`, `led_to`, and again.

    Args:
        layout: of an unroll of as many environments.
        rows: T
    """

    def __init__(self, layout: Layout, rows: int) -> None:
        self.row = 0
        """Whose action comes next."""
        self._layout, self._rows = layout, rows
        self._unroll = Unroll(layout)
        self._returns: list[float] = []
        self._lengths: list[int] = []
        self._learner_epoch = -1

    def observed(self, obs: Array) -> Played | None:
        """What the next action is taken from; returns the unroll that ends with it, if one does."""
        played = None
        if self.row == self._rows:
            self._unroll.rows["obs"][self.row] = obs
            said = fields_of(Trajectory(self._learner_epoch, self._returns, self._lengths))
            played = self._unroll.finish(), said
            self._returns, self._lengths = [], []
            self.restart()
        self._unroll.rows["obs"][self.row] = obs
        return played

    def acted(self, arrays: Mapping[str, Array], by: Actions) -> None:
        """The actions and what was recorded of them, named as in `Actions`; `state.*` counts in row 0 only."""
        rows = self._unroll.rows
        for name, array in arrays.items():
            if not name.startswith(STATE):
                rows[name][self.row] = array
            elif self.row == 0:
                rows[name][...] = array
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
        """Begin an unroll anew, the returns of episodes excepted; returns the rows that came to nothing."""
        lost, self.row = self.row, 0
        self._unroll = Unroll(self._layout)
        return lost
