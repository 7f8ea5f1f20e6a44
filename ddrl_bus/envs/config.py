"""Which environment, as a topology file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, and how to make many of it."""

    id: str
    """gymnasium id, `CartPole-v1`; `module:Id-v0` to import a module that registers it; or a memory task of ours"""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the environment's constructor, or of the preset where it says so"""
    vectorization: Literal["auto", "native", "sync"] = "auto"
    """native: the environment's own vector class; sync: one object per environment; auto: native where it can be
    brought to the normal form, else sync"""
    preset: str | None = None
    """a named way to make the environments of one family ready for learning: `presets.PRESETS`"""
    max_episode_steps: int | None = None
    """truncates episodes after so many steps instead of the registered limit"""
