"""What an actor does about environments that fail: count, say so, and give up in the end."""

from __future__ import annotations

import logging
from typing import Final

from ddrl_bus.errors import EnvError
from ddrl_bus.transport.ledger import Counter

ENV_FAULTS: Final = 3
"""Faults in a row after which an actor gives up on its environment."""


class EnvFaults:
    """The faults of one vector of environments.

    Args:
        counter: all faults of this life of the actor.
    """

    def __init__(self, counter: Counter, log: logging.Logger) -> None:
        self._counter, self._log = counter, log
        self.in_a_row = 0

    def happened(self, error: EnvError) -> None:
        """Raises: `error`, if it is one too many."""
        self.in_a_row += 1
        self._counter.add()
        if self.in_a_row >= ENV_FAULTS:
            raise error
        self._log.error("rebuilding environments, fault %d of %d in a row: %s", self.in_a_row, ENV_FAULTS, error)

    def over(self) -> None:
        """They work again."""
        self.in_a_row = 0
