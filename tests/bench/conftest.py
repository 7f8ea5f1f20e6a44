from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ddrl_bus
from ddrl_bus.bench import results
from ddrl_bus.bench.cases import Case

TINY = Case("tiny", "quickstart", bar=15, steps=20_000, rule="stays")  # a control: it goes on to the end of its budget


class Recorded(NamedTuple):
    case: Case
    root: Path
    """Where runs/ is."""
    folder: Path
    record: dict[str, Any]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A case of 20,000 steps, run for real once."""
    root = tmp_path_factory.mktemp("recorded")
    path = os.pathsep.join(filter(None, (str(Path(ddrl_bus.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setenv("PYTHONPATH", path)
        record = results.run(TINY, seed=1)
    return Recorded(TINY, root, (root / "runs" / "tiny" / "latest").resolve(), record)
