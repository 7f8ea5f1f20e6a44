"""The process of one node."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddrl_bus.errors import EnvError, FencedError
from ddrl_bus.launch import node, run_dir
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan
from ddrl_bus.transport.memory import MemoryHub


@pytest.fixture
def plan() -> Plan:
    return plan_of("quickstart", ["grace=2"], probe=False, fresh=True)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    return run_dir.create(plan, path=tmp_path / "run", command=["test"], started=0.0)


def run_with(serve: Any, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "actor-0") -> int:
    """The exit code of a process whose nodes' work is `serve`."""
    import ddrl_bus.nodes.base

    monkeypatch.setattr(ddrl_bus.nodes.base, "serve", serve)
    return node.run(plan, name, folder)


def records(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "logs" / f"{name}.log").read_text().splitlines()]


@pytest.mark.parametrize(
    ("error", "code"), [(EnvError("broken"), 65), (FencedError("old"), 75), (ValueError("a bug"), 70)]
)
def test_exit_code_and_log_of_a_failure(
    error: Exception, code: int, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*_: Any, **__: Any) -> None:
        raise error

    assert run_with(serve, plan, folder, monkeypatch) == code
    (record,) = map(json.loads, (folder / "logs" / "actor-0.log").read_text().splitlines())
    assert record["message"] == "failed"
    assert f"{type(error).__name__}: {error}" in record["exception"]


def test_a_failure_that_the_node_logged_is_not_logged_twice(
    plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*_: Any, **__: Any) -> None:
        try:
            raise EnvError("broken")
        except EnvError:
            logging.getLogger("ddrl_bus.actor-0").exception("failed")
            raise

    assert run_with(serve, plan, folder, monkeypatch) == 65
    assert len((folder / "logs" / "actor-0.log").read_text().splitlines()) == 1


def test_the_first_signal_sets_stop(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: Any, epoch: int, stop: asyncio.Event, **__: Any) -> None:
        assert epoch >> 32 == 1
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await stop.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)  # the deadline is the test runner's too

    assert run_with(serve, plan, folder, monkeypatch) == 0


# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bundle() -> Plan:
    overrides = ["grace=2", "nodes.actor.count=1", "nodes.actor.bundle=w", "nodes.learner.bundle=w"]
    return plan_of("quickstart", overrides, probe=False, fresh=True)


def test_the_nodes_of_a_bundle_share_a_loop_and_a_hub_and_each_has_its_log(
    bundle: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_dir.create(bundle, path=tmp_path / "run", command=["test"], started=0.0)
    served: dict[str, Any] = {}

    async def serve(plan: Plan, name: str, *, hub: MemoryHub, inline: bool, epoch: int, **_: Any) -> None:
        assert not inline  # each has a thread of its own
        logging.getLogger(f"ddrl_bus.{name}").info("here")
        served[name] = (hub, asyncio.get_running_loop(), epoch >> 32)

    assert run_with(serve, bundle, folder, monkeypatch, "w-0") == 0
    assert list(served) == ["actor-0", "learner-0"]
    assert served["actor-0"] == served["learner-0"]
    for name in served:
        assert [(record["node"], record["message"]) for record in records(folder, name)] == [(name, "here")]


def test_one_failure_ends_a_bundle_with_its_error(
    bundle: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_dir.create(bundle, path=tmp_path / "run", command=["test"], started=0.0)

    async def serve(plan: Plan, name: str, **_: Any) -> None:
        if name == "actor-0":
            await asyncio.Event().wait()
        try:
            raise EnvError("broken")
        except EnvError:
            logging.getLogger(f"ddrl_bus.{name}").exception("failed")
            raise

    assert run_with(serve, bundle, folder, monkeypatch, "w-0") == 65
    assert records(folder, "actor-0") == []
    assert [record["message"] for record in records(folder, "learner-0")] == ["failed"]


def test_a_node_in_a_bundle_is_not_started_alone(bundle: Plan, tmp_path: Path) -> None:
    folder = run_dir.create(bundle, path=tmp_path / "run", command=["test"], started=0.0)
    with start(folder) as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 64
    assert output == "actor-0: quickstart: actor-0 runs in process w-0 beside learner-0; start w-0\n"


# ── real processes ───────────────────────────────────────────────────────────────────────────────────────────────


def start(folder: Path, code: str = "", *arguments: str) -> subprocess.Popen[str]:
    """A node's process; `code` replaces its work."""
    program = f"import asyncio, time, sys\nimport ddrl_bus.nodes.base as base\n{code}\n"
    program += "from ddrl_bus.launch import node\nsys.exit(node.main())"
    options = ["--topology", str(folder / run_dir.LOCK_FILE), "--name", "actor-0", "--run-dir", str(folder)]
    command = [sys.executable, "-c", program, *options, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SERVING = """
async def serve(*_, stop, **__):
    print("serving", flush=True)
    {}
base.serve = serve
"""


def heard(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    assert word in process.stdout.readline()


def test_sigterm_drains(folder: Path) -> None:
    with start(folder, SERVING.format("await stop.wait(); print('drained', flush=True)")) as process:
        heard(process, "serving")
        process.send_signal(signal.SIGTERM)
        heard(process, "drained")
        assert process.wait(10) == 0


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with start(
        folder, SERVING.format("await stop.wait(); print('draining', flush=True); await asyncio.sleep(60)")
    ) as p:
        heard(p, "serving")
        p.send_signal(signal.SIGINT)
        heard(p, "draining")
        p.send_signal(signal.SIGINT)
        assert p.wait(10) == 128 + signal.SIGINT


def test_a_drain_that_hangs_ends_after_grace_even_with_a_blocked_loop(folder: Path) -> None:
    with start(folder, SERVING.format("await stop.wait(); print('hanging', flush=True); time.sleep(60)")) as process:
        heard(process, "serving")
        process.send_signal(signal.SIGTERM)
        heard(process, "hanging")
        assert process.wait(10) == -signal.SIGALRM


def test_a_node_whose_parent_is_gone_already_does_not_start(folder: Path) -> None:
    with start(folder, SERVING.format("print('worked', flush=True)"), "--parent", "1") as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert "worked" not in output


def test_a_node_drains_when_its_parent_dies(folder: Path) -> None:
    """Even when the parent had no chance to say goodbye."""
    parent_program = "import os, subprocess, sys; print(subprocess.Popen([*sys.argv[1:], '--parent', str(os.getpid())])"
    parent_program += ".pid, flush=True); import time; time.sleep(60)"
    serving = SERVING.format("await stop.wait(); print('drained', flush=True)")
    program = f"import asyncio, sys\nimport ddrl_bus.nodes.base as base\n{serving}\n"
    program += "from ddrl_bus.launch import node\nsys.exit(node.main())"
    options = ["--topology", str(folder / run_dir.LOCK_FILE), "--name", "actor-0", "--run-dir", str(folder)]
    command = [sys.executable, "-c", parent_program, sys.executable, "-c", program, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline().strip().isdigit()
        heard(parent, "serving")
        parent.kill()
        heard(parent, "drained")


def test_a_node_waits_for_the_name_that_it_binds_and_says_so(tmp_path: Path) -> None:
    hosts = "hosts={gpu0: gpu0.invalid, cpu1: 198.51.100.2}"
    plan = plan_of("quickstart", [hosts, "nodes.actor.host=cpu1", "insecure=true"], probe=False)
    folder = run_dir.create(plan, path=tmp_path / "run", command=["test"], started=0.0)
    code = "import ddrl_bus.launch.node as node; node.NAMED_AFTER_S = 0.01" + SERVING.format("")
    with start(folder, code, "--name", "learner-0") as process:
        heard(process, "gpu0.invalid has no address on this machine yet; if it is wrong, correct `hosts:`")
        process.send_signal(signal.SIGTERM)
        assert "serving" not in process.communicate(timeout=20)[0]
        assert process.returncode == 0


def test_a_missing_topology_is_refused_in_words(folder: Path) -> None:
    missing = [sys.executable, "-m", "ddrl_bus.launch.node", "--topology", "none.yaml", "--name", "x", "--run-dir", "."]
    result = subprocess.run(missing, capture_output=True, text=True, timeout=60, cwd=folder, check=False)

    assert result.returncode == 64
    assert result.stderr == "x: none.yaml: cannot read 'none.yaml': No such file or directory\n"
