"""From a name to N environments in the normal form."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from ddrl_bus.envs.backends import Backend, Sync
from ddrl_bus.envs.config import EnvConfig
from ddrl_bus.envs.memory_tasks import TASKS
from ddrl_bus.envs.presets import PRESETS, Preset, find
from ddrl_bus.errors import EnvError

# Prefix of an id (or part of its entry point) -> the extra of this package that brings it.
EXTRAS = {
    "ALE/": "atari",
    "MinAtar/": "minatar",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "box2d": "box2d",
    "mujoco": "mujoco",
}


class Made(NamedTuple):
    backend: Backend
    stack: int
    """observations that the agent sees at once"""


def make(config: EnvConfig, n: int) -> Made:
    """`n` environments, native or one by one.

    Raises: EnvError, naming the id, and what to do where that is known.
    """
    try:
        preset = find(config.preset)
        if config.id in TASKS:
            return Made(_task(config, n), 1)
        spec = _find(config.id)
        if not preset.fits(spec):
            raise EnvError(f"preset {config.preset!r} is for {preset.family}{_fitting(spec)}")
        kwargs = dict(config.kwargs)
        limit = preset.max_episode_steps if config.max_episode_steps is None else config.max_episode_steps
        if limit is not None:
            kwargs["max_episode_steps"] = limit
        return Made(preset.view(spec, _backend(config.vectorization, spec, preset, n, kwargs)), preset.stack)
    except EnvError as error:
        raise EnvError(f"{config.id}: {error}") from error.__cause__


def _backend(vectorization: str, spec: EnvSpec, preset: Preset, n: int, kwargs: dict[str, Any]) -> Backend:
    if vectorization != "sync":
        try:
            return preset.many(spec, n, **kwargs)
        except Exception as error:  # whatever a vector class of somebody else's does
            if vectorization == "native":
                reason = f"vectorization 'native' is not possible: {error}; use 'auto' or 'sync'"
                raise EnvError(reason) from error
    try:
        return Sync([preset.one(spec, **kwargs) for _ in range(n)])
    except Exception as error:
        raise EnvError(f"cannot be made: {error}{_remedy(spec, error)}") from error


def _task(config: EnvConfig, n: int) -> Backend:
    if config.preset is not None:
        raise EnvError(f"preset {config.preset!r} is for {PRESETS[config.preset].family}")
    if config.vectorization == "sync":
        raise EnvError("vectorization 'sync' is not possible: it exists as a vector alone; use 'auto' or 'native'")
    try:
        backend: Backend = TASKS[config.id](n, max_episode_steps=config.max_episode_steps, **config.kwargs)
    except (TypeError, ValueError) as error:
        raise EnvError(f"cannot be made: {error}") from error
    return backend


# ---- finding


@contextlib.contextmanager
def _without_plots() -> Iterator[None]:
    """minatar imports pyplot and seaborn for a window that nobody opens here: a second and 30 MB in each actor. It runs
    without them, and says so on the root logger."""
    hidden = {name: sys.modules.get(name) for name in ("matplotlib", "seaborn")}
    silence, root = (lambda _: False), logging.getLogger()
    handler = logging.NullHandler()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
    root.addFilter(silence)
    root.addHandler(handler)  # without any, logging.warning adds one that stays
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(silence)
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _register_minatar() -> None:
    with _without_plots():
        importlib.import_module("minatar.gym").register_envs()


def _importing(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


# Prefixes that gymnasium learns of only when their package is imported, and how.
REGISTER: dict[str, Callable[[], object]] = {
    "ALE/": _importing("ale_py"),
    "MinAtar/": _register_minatar,
    "MiniGrid-": _importing("minigrid"),
    "BabyAI-": _importing("minigrid"),
}


def _find(id: str) -> EnvSpec:
    for prefix, register in REGISTER.items():
        if id.startswith(prefix) and not any(known.startswith(prefix) for known in gym.registry):
            try:
                register()
            except ImportError as error:
                raise EnvError(f"{error}; pip install 'ddrl-bus[{EXTRAS[prefix]}]'") from error
    module, _, name = id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module of somebody else's does
            raise EnvError(f"no such environment; cannot import {module!r}: {error}") from error
    try:
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(id, [*gym.registry, *TASKS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else str(error)
        raise EnvError(f"no such environment; {hint}") from error


# ---- what to do about it


def _remedy(spec: EnvSpec, error: Exception) -> str:
    if isinstance(error, EnvError):
        return _fitting(spec)
    entry = str(spec.entry_point)
    extras = [extra for part, extra in EXTRAS.items() if spec.id.startswith(part) or f".{part}" in entry]
    missing = isinstance(error, ImportError | gym.error.DependencyNotInstalled)
    return f"; pip install 'ddrl-bus[{extras[0]}]'" if extras and missing else ""


def _fitting(spec: EnvSpec) -> str:
    fitting = [name for name, preset in PRESETS.items() if preset.fits(spec)]
    return f"; preset {fitting[0]!r} fits it" if fitting else ""
