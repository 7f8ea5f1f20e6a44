"""`rate:` of a link: how many bytes a second one end of it may send. No clock of its own."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.1
"""What was left unused for so long may be sent at once: whoever wakes late keeps the rate all the same."""


class TokenBucket:
    """A whole message leaves as soon as the ones before it are paid for, whatever its size, and is paid for afterwards:
    over any t seconds no more than `rate * (t + BURST_S)` bytes and one message.

    Args:
        rate: bytes a second; None is no limit.
        now: seconds, of any clock that never goes back.
    """

    def __init__(self, rate: float | None, now: float) -> None:
        self._rate = rate
        self._paid_at = now - BURST_S

    def wait_s(self, now: float) -> float:
        """Seconds until a message may leave; 0 is now."""
        wait_s = self._paid_at - now
        return wait_s if wait_s > 0 else 0.0

    def spend(self, nbytes: int, now: float) -> None:
        """So many bytes leave now."""
        if self._rate is not None:
            self._paid_at = max(self._paid_at, now - BURST_S) + nbytes / self._rate
