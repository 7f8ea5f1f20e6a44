"""docs/two-hosts.md, typed into two machines.

A fenced block's words say where: `sh HOST stays` goes on beside the others; `sh HOST meanwhile` is tried until it works
while those go on; `sh HOST` begins when they have ended, and runs to its own end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cables import MISSING, Cable
from runs import ENVIRON, PATIENCE_S, command, eventually

PAGE = Path(__file__).parents[2] / "docs" / "two-hosts.md"
BLOCKS = re.findall(r"^```sh (\w+)(?: (\w+))?\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


class Terminals:
    """A home on each host, and what was typed there."""

    def __init__(self, cable: Cable, folder: Path) -> None:
        self.cable, self.folder = cable, folder
        self.going: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "bin").mkdir()
        for name, program in {"ddrl": "ddrl", "ddrl-node": "ddrl_node"}.items():
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {shlex.join(command(name=program))} "$@"\n')
            path.chmod(0o755)

    def typed(self, host: str, text: str) -> subprocess.Popen[bytes]:
        home = self.folder / host
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        environ = ENVIRON | {"TMPDIR": str(home / "tmp"), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        with (home / "screen").open("a") as screen:
            argv = [*self.cable.on(host), "sh", "-eu", "-c", text]
            return subprocess.Popen(argv, cwd=home, env=environ, stdin=subprocess.DEVNULL, stdout=screen, stderr=screen)

    def screen(self, host: str) -> str:
        return (self.folder / host / "screen").read_text()

    def works(self, host: str, text: str) -> bool:
        for other, going in self.going.items():
            assert going.poll() is None, self.screen(other)
        return self.typed(host, text).wait(PATIENCE_S) == 0

    def end(self) -> None:
        for host, going in self.going.items():
            assert going.wait(2 * PATIENCE_S) == 0, self.screen(host)
        self.going.clear()


@pytest.fixture
def terminals(cable: Cable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    terminals = Terminals(cable, tmp_path_factory.mktemp("t"))  # a short path, for the names of sockets
    yield terminals
    for going in terminals.going.values():
        going.terminate()
        going.wait(60)


def test_the_page_does_what_it_says(terminals: Terminals) -> None:
    for host, how, text in BLOCKS:
        if how == "stays":
            terminals.going[host] = terminals.typed(host, text)
        elif how == "meanwhile":
            eventually(lambda h=host, t=text: terminals.works(h, t), f"{text} on {host}")
        else:
            terminals.end()
            assert terminals.typed(host, text).wait(PATIENCE_S) == 0, terminals.screen(host)

    gpu0, cpu1 = terminals.folder / "gpu0", terminals.folder / "cpu1"
    (join,) = [text for _, _, text in BLOCKS if text.startswith("ddrl-node")]
    assert f"on cpu1:  {join}" in terminals.screen("gpu0")
    ended = json.loads((gpu0 / "runs/cartpole/latest/closing.json").read_text())
    assert (ended["reason"], ended["ledger"]["closed"]) == ("reward", True)
    assert ended["return"] >= 475
    assert {path.stem for path in (cpu1 / "runs/cartpole/latest/logs").iterdir()} == {
        "actor-0",
        "actor-1",
        "evaluator-0",
        "relay-0",
    }
    for host in ("gpu0", "cpu1"):
        assert "env steps" in terminals.screen(host)  # `ddrl status`
    assert {"cartpole.sbatch", "cartpole.k8s.yaml", "compose.yaml", "units", "cartpole.sh"} <= {
        path.name for path in gpu0.iterdir()
    }
