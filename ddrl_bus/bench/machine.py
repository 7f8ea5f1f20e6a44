"""The machine that a benchmark runs on, as far as its figures depend on it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import msgpack
import numpy as np
import zmq

from ddrl_bus import __version__
from ddrl_bus.launch import loop

_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def load_average() -> float:
    """Processes that want a core, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def facts() -> dict[str, str]:
    import psutil

    return {
        "processor": _cpu_model(),
        "cores": str(cores()),
        "governor": _first_line(_CPU) or "unknown",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "event loop": loop.name(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions_of(libraries: Iterable[str] = ()) -> dict[str, str]:
    """Of what is loaded, and of `libraries`: distributions of Python or programs, as far as they are installed."""
    found = {
        "ddrl_bus": __version__,
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
        "numpy": np.__version__,
    }
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)
    return found | {name: version for name in libraries if (version := _version_of(name))}


def _version_of(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    if shutil.which(name) is None:
        return ""
    said = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10).stdout
    number = re.search(r"\d+(\.\d+)+", said)
    return number[0] if number else "unknown"


def _cpu_model() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _first_line(path: Path) -> str:
    return _text(path).partition("\n")[0]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
