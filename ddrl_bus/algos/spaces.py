"""What an algorithm needs to know of an environment: plain numbers, free of gymnasium and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Spaces:
    """Observation and action space of *one* environment."""

    obs_shape: tuple[int, ...]
    """shape of one observation"""
    obs_dtype: str
    """numpy dtype of an observation as actors send it (float64 spaces are sent as float32)"""
    action_kind: Literal["discrete", "continuous"]
    num_actions: int
    """number of choices of a discrete action, or components of a continuous one"""
    action_low: tuple[float, ...] | None = None
    """lower bound of each component, continuous only"""
    action_high: tuple[float, ...] | None = None
    """upper bound of each component, continuous only"""
    stack: int = 1
    """observations that the agent sees at once, the newest last; each travels once and is stacked at the receiver"""

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one recorded action: `()` int64 if discrete, `(num_actions,)` float32 if continuous."""
        return () if self.action_kind == "discrete" else (self.num_actions,)

    @property
    def action_dtype(self) -> str:
        return "int64" if self.action_kind == "discrete" else "float32"
