"""`torch`, imported when one of its names is first used.

Importing torch takes seconds and hundreds of megabytes; the command line, the catalogue of algorithms and actors with
a numpy policy never need it. (`importlib.util.LazyLoader` would do, but it lists the module in `sys.modules` at once,
where other libraries take it for a loaded torch.)
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # looking at the stand-in (inspect, copy) loads nothing
            raise AttributeError(name)
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # the next use finds it without coming here
        return value


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")


def library(array: Any) -> Any:
    """numpy or torch, whichever `array` belongs to: for functions of both whose operations are not methods."""
    return np if isinstance(array, np.ndarray) else torch
