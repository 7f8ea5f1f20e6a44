"""Who waits for whom, and for how long."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Final

PATIENCE_S: Final = 5.0
"""A wait that takes longer is named in the log, once."""


class Waiting:
    """One side's waits for another. Who waits says so again and again: nothing else looks at the clock."""

    def __init__(self, log: logging.Logger) -> None:
        self.words = ""
        """What it waits for now; "" for nothing."""
        self._log = log
        self._over = self._since = 0.0
        self._named = False

    def waits(self, words: str) -> None:
        """It waits for this; "" for nothing any more."""
        if words and not self.words:
            self._since, self._named = monotonic(), False
        if self.words and not words:
            self._over = self.seconds
        self.words = words
        if words and not self._named and monotonic() - self._since >= PATIENCE_S:
            self._named = True
            self._log.warning("for %.0f s %s", PATIENCE_S, words)

    @property
    def seconds(self) -> float:
        """Of all waits so far."""
        return self._over + (monotonic() - self._since if self.words else 0.0)
