"""The counts hold what links promise: a large message is copied by the kernel alone, and in one process not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from ddrl_bus.bench import copies
from ddrl_bus.errors import UsageError


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_large_messages() -> None:
    scope = replace(
        copies.SCOPE,
        payloads=("pixel unroll, 567 KB", "weights, 6.7 MB"),
        transports=("memory", "ipc", "ipc+shared"),
        repeats=1,
        part=0.05,
    )
    found = {row.name: [round(figure.median) for figure in row.figures.values()] for row in copies.measure(scope)}
    assert found == {
        "pixel unroll, 567 KB, memory, 1 peer": [0, 0, 0, 0],
        "pixel unroll, 567 KB, ipc, 1 peer": [0, 0, 2, 2],
        "weights, 6.7 MB, memory, 1 peer": [1, 1, 0, 0],
        "weights, 6.7 MB, ipc, 1 peer": [1, 1, 2, 2],
        "weights, 6.7 MB, ipc+shared, 1 peer": [2, 1, 0, 2],
    }


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="no C compiler cc"):
        next(copies.measure())
