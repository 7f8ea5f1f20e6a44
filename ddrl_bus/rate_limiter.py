"""How often an item is drawn: a ratio of samples to inserts, and who waits to keep it. Pure arithmetic.

The rule is that of Reverb's `SampleToInsertRatio` (arXiv 2102.04736, 3.4): with i items inserted and s drawn,
`samples_per_insert`·(i - min_size) - s stays within ±slack.
"""

from __future__ import annotations

from collections.abc import Mapping

from ddrl_bus.errors import UsageError


def least_slack(samples_per_insert: float, insert: int, batch: int) -> float:
    """The least slack with which one side may always go on, where `insert` items come and `batch` are drawn at once."""
    return (samples_per_insert * insert + batch) / 2


class RateLimiter:
    """Counts items in and out, and says who has to wait.

    Args:
        min_size: items inserted before any is drawn; until then inserts never wait.
        samples_per_insert: None lets nobody wait but for `min_size`.
        slack: drawn items that either side may be ahead by; default: twice the least.
        insert, batch: the most items that come, and that are drawn, at once.

    Raises: UsageError for a slack that leaves both sides waiting for each other.
    """

    def __init__(
        self, min_size: int, samples_per_insert: float | None, slack: float | None, *, insert: int, batch: int
    ) -> None:
        self.inserts = self.samples = 0
        self.min_size = min_size
        self.samples_per_insert = samples_per_insert
        least = least_slack(samples_per_insert or 0.0, insert, batch)
        self.slack = 2 * least if slack is None else slack
        if samples_per_insert is not None and self.slack < least:
            raise UsageError(
                f"slack {self.slack:g} is too small: {insert} items come at once, {batch} are drawn at once, and with "
                f"samples_per_insert {samples_per_insert:g} both would wait for ever; expected at least {least:g}"
            )

    @property
    def ratio(self) -> float:
        """Samples per insert since sampling could begin; 0 before."""
        counted = self.inserts - self.min_size
        return self.samples / counted if counted > 0 else 0.0

    def inserted(self, items: int) -> None:
        self.inserts += items

    def sampled(self, items: int) -> None:
        self.samples += items

    def may_insert(self, items: int) -> bool:
        if self.samples_per_insert is None or self.inserts < self.min_size:
            return True
        return self._owed + self.samples_per_insert * items <= self.slack

    def may_sample(self, items: int) -> bool:
        if self.inserts < self.min_size:
            return False
        return self.samples_per_insert is None or items - self._owed <= self.slack

    def insert_waits(self, items: int) -> str:
        """What `items` wait for before they may be inserted; "" if they may."""
        if self.samples_per_insert is None or self.may_insert(items):
            return ""
        return (
            f"inserts wait for samples: {items:,} items more would be "
            f"{self._owed + self.samples_per_insert * items:,.0f} samples ahead at {self.samples_per_insert:g} per "
            f"insert, of at most {self.slack:,.0f}"
        )

    def sample_waits(self, items: int) -> str:
        """What `items` wait for before they may be drawn; "" if they may."""
        if self.may_sample(items):
            return ""
        if self.inserts < self.min_size:
            return f"samples wait for inserts: {self.inserts:,} of {self.min_size:,} items needed before sampling"
        return (
            f"samples wait for inserts: {items:,} more would be {items - self._owed:,.0f} ahead of "
            f"{self.samples_per_insert:g} per insert, of at most {self.slack:,.0f}"
        )

    def state(self) -> dict[str, int]:
        return {"inserts": self.inserts, "samples": self.samples}

    def load(self, state: Mapping[str, int]) -> None:
        self.inserts, self.samples = state["inserts"], state["samples"]

    @property
    def _owed(self) -> float:
        """Samples that may still be drawn for what was inserted; negative: drawn too many."""
        return (self.samples_per_insert or 0.0) * (self.inserts - self.min_size) - self.samples
