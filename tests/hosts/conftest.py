from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cables import ADDRESSES, Cable, ddrl_keys, plugged_in


@pytest.fixture
def cable() -> Iterator[Cable]:
    with plugged_in() as cable:
        yield cable


RUNS = ("actor", "evaluator")
"""Kinds of node on the second host, beside the relay that comes along with them."""


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Host → its folder of keys, after each has allowed the other."""
    folders = {host: tmp_path / f"keys-{host}" for host in ADDRESSES}
    public = {host: ddrl_keys(folder, "new", host) for host, folder in folders.items()}
    ddrl_keys(folders["gpu0"], "allow", "cpu1", public["cpu1"], *(f"--role={kind}" for kind in RUNS))
    ddrl_keys(folders["cpu1"], "allow", "gpu0", public["gpu0"])
    return folders
