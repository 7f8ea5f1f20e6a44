"""`ddrl bench` between two hosts, in namespaces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest
from cables import ADDRESSES, MISSING, Cable
from runs import ENVIRON, command

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]
PATIENCE_S = 120


@pytest.fixture
def serving(cable: Cable) -> Iterator[None]:
    argv = command("bench", "--serve", f"tcp://{ADDRESSES['gpu0']}:7070", prefix=cable.on("gpu0"))
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=ENVIRON) as process:
        assert process.stderr is not None
        assert "serving on" in process.stderr.readline()
        try:
            yield
        finally:
            process.terminate()


def far(cable: Cable, *words: str) -> subprocess.CompletedProcess[str]:
    argv = command(
        "bench", f"tcp://{ADDRESSES['gpu0']}:7070", "--quick", "--repeats", "1", *words, prefix=cable.on("cpu1")
    )
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRON, timeout=PATIENCE_S, check=False)


@pytest.mark.usefixtures("serving")
def test_between_two_hosts(cable: Cable) -> None:
    for peers in (1, 2):  # one after the other: it serves whoever comes
        ended = far(cable, "--peers", str(peers), "--json")
        assert ended.returncode == 0, ended.stderr
        rows = json.loads(ended.stdout)["rows"]
        word = f"tcp, {peers} peer"
        assert len(rows) == 4
        assert all(word in row["name"] and row["figures"]["ratio"]["median"] > 0 for row in rows)


def test_nobody_serves(cable: Cable) -> None:
    ended = far(cable)
    assert ended.returncode == 69
    assert "nobody answers; type there:  ddrl bench --serve" in ended.stderr
