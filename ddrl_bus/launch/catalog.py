"""What topologies are told of algorithms and environments, and where the packaged topologies are. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import ddrl_bus
from ddrl_bus import keys
from ddrl_bus.algos import REGISTRY, Algorithm
from ddrl_bus.errors import UsageError
from ddrl_bus.topology import AlgorithmEntry, Catalog, EnvSettings, Plan, load

_PACKAGE: Final = Path(ddrl_bus.__file__).parent
_FOLDERS: Final = (_PACKAGE / "topologies", _PACKAGE.parent / "topologies")  # in a wheel, in a checkout


def catalog(*, probe: bool = False, starts: bool = True) -> Catalog:
    """All algorithms, and the keys of this machine.

    Args:
        probe: have the environment made once, so that one that cannot be is refused with its place.
        starts: nodes are to start, so that hosts need keys.
    """
    entries = {
        name: AlgorithmEntry(cls.Config, cls.wiring, cls.passes is Algorithm.passes, cls.windows, cls.acting)
        for name, cls in REGISTRY.items()
    }
    return Catalog(entries, probe_env if probe else None, keys.kinds if starts else lambda host: keys.ANY, keys.invite)


def probe_env(env: EnvSettings) -> None:
    """Raises: EnvError, where the environment cannot be made on this host."""
    from ddrl_bus import envs  # gymnasium takes a quarter of a second

    envs.describe(envs.EnvConfig(**env.model_dump()))


def load_lock(run_dir: Path, *, overrides: Sequence[str] = (), in_process: bool = False, starts: bool = True) -> Plan:
    """The plan that `run_dir` runs."""
    known = catalog(starts=starts)
    return load(run_dir / "topology.lock.yaml", catalog=known, overrides=overrides, in_process=in_process)


def packaged() -> dict[str, Path]:
    """The topologies that come with the package, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_topology(name: str) -> Path:
    """The file `name`, or the packaged topology of that name.

    Raises:
        UsageError: there is neither; names the nearest.
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path  # a file that is missing is the loader's to refuse, with its place
    known = packaged()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no file and no packaged topology {name!r}; have {', '.join(known)}{hint}")
    return known[name]
