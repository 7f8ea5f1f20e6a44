"""Environments: vectors of them in one normal form, presets by family, two memory tasks of our own.

The only place that knows gymnasium. Packages of environments are imported when one of theirs is asked for.
"""

from ddrl_bus.envs.config import EnvConfig
from ddrl_bus.envs.vector import Step, VectorEnv, describe

__all__ = ["EnvConfig", "Step", "VectorEnv", "describe"]
