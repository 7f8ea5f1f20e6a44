"""The machine that a benchmark runs on, as far as its figures depend on it."""

from __future__ import annotations

import os
import platform
import sys
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


def versions_loaded() -> dict[str, str]:
    """Of what is loaded."""
    found = {
        "ddrl_bus": __version__,
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
        "numpy": np.__version__,
    }
    return found | ({"torch": str(sys.modules["torch"].__version__)} if "torch" in sys.modules else {})


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
