"""What is installed here, as far as two hosts of one run may disagree about it."""

from __future__ import annotations

import importlib.metadata
import platform

from ddrl_bus import __version__

_PACKAGES = ("torch", "gymnasium", "numpy", "pyzmq")
_SKEWS = ("ddrl_bus", "python", "torch", "gymnasium")


def versions() -> dict[str, str | None]:
    """Name → version; None for what is not installed. Imports none of it."""
    return {"ddrl_bus": __version__, "python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def skew(here: dict[str, str | None], there: dict[str, str | None]) -> dict[str, tuple[str | None, str | None]]:
    """Name → version (here, there), of what the nodes of one run should have alike and have not.

    Of Python the patch does not count.
    """

    def pair(name: str) -> tuple[str | None, str | None]:
        return here.get(name), there.get(name)

    def counts(name: str, version: str | None) -> str | None:
        return version.rpartition(".")[0] if name == "python" and version else version

    return {name: pair(name) for name in _SKEWS if len({counts(name, version) for version in pair(name)}) > 1}
