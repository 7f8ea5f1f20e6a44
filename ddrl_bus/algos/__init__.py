"""Learning rules and the numpy policies that act by them. Importing this package does not import torch.

Public: `algorithm(name)` and `REGISTRY`; `Algorithm` and `Batch`, `Spaces`; `make_policy`, `Policy` and `Acted`.
"""

from __future__ import annotations

import difflib
from typing import Any

from ddrl_bus.algos import memory
from ddrl_bus.algos.a2c import A2C
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.algos.appo import Appo
from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.algos.dqn import Dqn
from ddrl_bus.algos.impala import Impala
from ddrl_bus.algos.policy import Acted, Policy
from ddrl_bus.algos.ppo import Ppo
from ddrl_bus.algos.r2d2 import R2d2
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError

__all__ = ["REGISTRY", "Acted", "Algorithm", "Batch", "Policy", "Spaces", "algorithm", "make_policy", "memory"]

REGISTRY: dict[str, type[Algorithm[Any]]] = {cls.name: cls for cls in (A2C, Appo, Dqn, Impala, Ppo, R2d2)}


def algorithm(name: str) -> type[Algorithm[Any]]:
    """The algorithm of that name.  Raises: UsageError, with the nearest name."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; have {', '.join(sorted(REGISTRY))}"
        raise UsageError(f"no algorithm named {name!r}{hint}")
    return REGISTRY[name]
