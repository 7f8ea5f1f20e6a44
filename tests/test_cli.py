"""The commands, as a user gives them, in an empty folder: what trains and what stops it in processes of their own."""

import asyncio
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_ports

import ddrl_bus
from ddrl_bus import cli
from ddrl_bus.errors import DdrlError
from ddrl_bus.launch import remote

FOREVER = ["stop.reward=null", "stop.steps=null"]
SMALL = ["nodes.actor.envs=8", "algo.batch=16", "nodes.evaluator.episodes=2", "nodes.evaluator.every=100ms"]
ENVIRON = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(ddrl_bus.__file__).parents[1]), str(Path(__file__).parent / "launch")]),
    "COLUMNS": "200",
}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: str, name: str = "ddrl") -> list[str]:
    return [sys.executable, "-c", f"from ddrl_bus.cli import {name}; {name}(prog_name={name!r})", *arguments]


def ddrl(*arguments: str, name: str = "ddrl") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, name=name), capture_output=True, text=True, timeout=150, env=ENVIRON, check=False
    )


def called(capsys: pytest.CaptureFixture[str], *arguments: str, name: str = "ddrl") -> tuple[int, str, str]:
    """The same in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        getattr(cli, name)(arguments, prog_name=name)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


# ── without a run ────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_is_quick() -> None:
    """Processor time of the best of five: a busy machine slows the others down."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ddrl("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.15


@pytest.mark.parametrize("name", ["run", "check", "show", "schema", "status", "stop", "logs", "eval", "plot", "bench"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in called(capsys, "--help")[1]
    code, out, _ = called(capsys, name, "--help")

    assert code == 0
    assert out.startswith(f"Usage: ddrl {name}")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["frobnicate"], 64, "No such command 'frobnicate'"),
        (["run", "--frobnicate"], 64, "No such option"),
        (["run", "quickstat"], 64, "did you mean 'quickstart'?"),
        (["run", "a.yaml", "b.yaml"], 64, "one topology at a time"),
        (["run", "no-such.yaml"], 64, "no-such.yaml: cannot read 'no-such.yaml'"),
        (["run", "quickstart", "algo.lrr=1"], 64, "override 'algo.lrr=1': algo.lrr: unknown key"),
        (["run", "quickstart", "env.id=CartPoel-v1"], 65, "did you mean 'CartPole-v1'?"),
        (["run", "two-hosts"], 64, "topologies/two-hosts.yaml:6:9: hosts.gpu0: ${GPU0} is not set"),
        (["run", "quickstart", "--ssh"], 64, "quickstart has one host only; --ssh is for starting others"),
        (["run", "quickstart", "--node-command", "x"], 64, "say how --ssh is to be done; give --ssh too"),
        (["run", "--resume", "x", "--seed", "1"], 64, "--resume goes on with a run as it is"),
        (["run", "--resume", "x"], 64, "no run 'x'"),
        (["check"], 64, "which topology?"),
        (["status"], 64, "no run under"),
        (["eval", "x"], 64, "no run 'x'"),
        (["bench"], 64, "give the name of a benchmark, tcp://HOST:PORT, or --serve"),
        (["bench", "tcp://gpu0"], 64, "tcp://gpu0: expected tcp://HOST:PORT"),
        (["bench", "--serve", "tcp://*"], 64, "tcp://*: expected tcp://HOST:PORT"),
        (["bench", "--serve", "links"], 64, "links: expected tcp://HOST:PORT"),
        (["bench", "links", "--transport", "udp"], 64, "--transport 'udp': expected one of memory, ipc, ipc+shared"),
        (["bench", "links", "--fail-over", "much"], 64, "'much', expected a percentage, such as 10%"),
        (["bench", "links", "--compare", "none.json"], 64, "expected what `ddrl bench links --json none.json` wrote"),
        (["bench", "codec", "--html", "no/such/page.html"], 64, "no folder no/such"),
        (["bench", "topology"], 64, "which topology?"),
        (["bench", "allreduce", "--ranks", "2,x"], 64, "'2,x', expected numbers of at least 1 with commas"),
        (["bench", "allreduce", "--bytes", "1e3,0"], 64, "'1e3,0', expected numbers of at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_words(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = called(capsys, *arguments)

    assert found == code
    assert words in err
    assert "Traceback" not in err
    assert out == ""
    assert not Path("runs").exists()


def test_a_refusal_is_the_exit_code_of_a_process() -> None:
    result = ddrl("run", "quickstat")

    assert (result.returncode, result.stdout) == (64, "")
    assert "did you mean 'quickstart'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_where_an_error_comes_from() -> None:
    result = ddrl("run", "quickstat", "--debug")

    assert result.returncode == 64
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either -t TOPO or --join tcp://HEAD:PORT"),
        (["-t", "quickstart", "--join", "10.0.0.1", "--host", "a"], "give either -t TOPO or --join"),
        (["--join", "10.0.0.1"], "either --name NODE or --host HOST"),
        (["--join", "10.0.0.1", "--host", "a", "seed=2"], "seed=2: the head's topology holds for all"),
        (["--join", "tcp://*:7077", "--host", "a"], "expected the head's address, such as tcp://10.0.0.1:7077"),
        (["-t", "quickstart"], "either --name NODE or --host HOST"),
        (["-t", "quickstart", "--name", "actor-9"], "no node 'actor-9'; have actor-0, actor-1"),
        (["-t", "quickstart", "--host", "gpu7"], "no node on host 'gpu7'; hosts: local"),
    ],
)
def test_ddrl_node_refuses_in_words(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capsys, *arguments, name="ddrl_node")

    assert code == 64
    assert words in err
    assert "Traceback" not in err


def test_a_run_over_hosts_that_are_all_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    hosts = ["hosts={a: 198.51.100.1, b: 198.51.100.2}", "nodes.actor.host=b", "insecure=true"]
    code, _, err = called(capsys, "run", "quickstart", *hosts)

    assert code == 64
    assert "this machine has none of its hosts' addresses: a (198.51.100.1), b (198.51.100.2)" in err


def test_ssh_is_for_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    hosts = ["hosts={a: 198.51.100.1, b: 127.0.0.1}", "nodes.actor.host=b", "insecure=true"]
    code, _, err = called(capsys, "run", "quickstart", "--ssh", *hosts)

    assert code == 64
    assert "this machine is b; start with --ssh on the head, a" in err


def test_check_show_schema_and_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "check", "quickstart")[2] == "quickstart: 5 nodes, 4 links: nothing wrong\n"
    assert "actor-2" in called(capsys, "show", "quickstart", "nodes.actor.count=3")[1]
    assert called(capsys, "show", "quickstart", "--mermaid")[1].startswith("flowchart LR")
    assert json.loads(called(capsys, "schema")[1])["title"] == "ddrl_bus topology"
    dry = ddrl("run", "quickstart", "--dry-run", "--seed", "5")
    assert dry.returncode == 0
    assert "seed 5" in dry.stdout
    assert not Path("runs").exists()


# ── with a run ───────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """A run under way, started by `process`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.folder = Path("runs/quickstart/latest")

    def lives(self) -> list[tuple[str, int, int]]:
        """(node, epoch, pid) of every start so far."""
        try:
            lines = (self.folder / "lives").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(name, int(epoch, 16), int(pid)) for name, epoch, pid, _ in map(str.split, lines)]

    def pid(self, node: str) -> int:
        return [pid for name, _, pid in self.lives() if name == node][-1]

    def status(self) -> dict[str, Any]:
        try:
            return asyncio.run(remote.status_of(self.folder))
        except DdrlError:
            return {"updates": -1, "nodes": {}}

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, (self.status(), ddrl("logs").stdout)
            time.sleep(0.1)

    def trains(self, updates: int = 5) -> None:
        """Wait until the learner made so many updates more."""
        before = max(0, self.status()["updates"])
        self.until(lambda: bool(self.status()["updates"] >= before + updates))

    def ended(self, code: int = 0) -> dict[str, Any]:
        """The closing object; nobody is left."""
        out, self.said = self.process.communicate(timeout=120)
        assert self.process.returncode == code, self.said
        assert not [life for life in self.lives() if _works(life[2])]
        closing: dict[str, Any] = json.loads(out)
        return closing


def _works(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@contextmanager
def running(*arguments: str, name: str = "ddrl") -> Iterator[Run]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(*arguments, name=name), stdout=pipe, stderr=pipe, text=True, env=ENVIRON)
    run = Run(process)
    try:
        yield run
    finally:
        for pid in [process.pid, *(pid for _, _, pid in run.lives())]:
            if _works(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=10)


@pytest.mark.slow
def test_a_run_from_start_to_stop_and_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Train, lose an actor and the controller, look, stop, look again, go on, drain by Ctrl-C, evaluate."""
    with running("run", "--json", *SMALL, *FOREVER, "links.trajectories.rate=1MiB") as run:
        run.until(lambda: len(run.lives()) == 5)
        run.trains()
        for node in ("actor-0", "controller-0"):
            os.kill(run.pid(node), signal.SIGKILL)
        run.until(lambda: len(run.lives()) == 7)
        run.until(lambda: {each.get("state") for each in run.status()["nodes"].values()} == {"running"})
        run.trains()
        status = json.loads(called(capsys, "status", "--json")[1])
        assert {node["state"] for node in status["nodes"].values()} == {"running"}
        assert status["nodes"]["actor-0"]["pid"] == run.pid("actor-0")
        assert "learner-0" in called(capsys, "status", "quickstart")[1]
        code, _, err = called(capsys, "run", "--resume", "quickstart")
        assert (code, "is being run already" in err) == (64, True)
        code, _, err = called(capsys, "run", "quickstart", "--run-dir", str(run.folder))
        assert (code, "holds run" in err) == (64, True)
        assert ddrl("stop").returncode == 0
        closing = run.ended()

    assert closing["reason"] == "stop"
    assert closing["restarts"] == 2
    assert closing["ledger"]["closed"] is True
    link = closing["ledger"]["links"]["trajectories"]
    assert link["produced"] == link["accepted"] + link["refused"] + link["lost"]
    assert link["taken"] > 0
    assert closing["env_steps"] > 0
    assert closing["updates"] >= 10
    assert closing["first_update_s"] < closing["wall_s"]
    assert closing["overhead"].keys() >= {"actor-0", "actor-1", "learner-0"}
    assert closing == json.loads(Path("runs/quickstart/latest/closing.json").read_text())
    assert called(capsys, "status")[0] == 69
    assert "state=stopped" in called(capsys, "logs")[1]

    with running("run", "--json", "--resume", "quickstart") as run:
        run.until(lambda: len(run.lives()) == 12)
        run.until(lambda: bool(run.status()["updates"] > closing["updates"]))
        run.process.send_signal(signal.SIGINT)
        on = run.ended()
    assert on["reason"] == "stop"
    assert on["run_dir"] == closing["run_dir"]
    assert on["env_steps"] > closing["env_steps"]
    assert on["ledger"]["closed"] is True
    assert on["ledger"]["lost"] == closing["ledger"]["lost"]
    assert on["ledger"]["links"]["trajectories"]["produced"] >= link["produced"]
    assert len(json.loads(Path("runs/quickstart/latest/meta.json").read_text())["before"]) == 1

    played = json.loads(ddrl("eval", "--episodes", "3").stdout)
    assert played["episodes"] == 3
    assert played["return"] >= 1


def test_in_process() -> None:
    result = ddrl("run", "--json", "--in-process", *SMALL, "stop.steps=10_000", "stop.reward=null")

    assert result.returncode == 0, result.stderr
    closing = json.loads(result.stdout)
    assert closing["reason"] == "steps"
    assert closing["env_steps"] >= 10_000
    assert closing["ledger"]["closed"] is True
    assert closing["ledger"]["lost"] == 0


def test_in_process_failure() -> None:
    result = ddrl("run", "--json", "--in-process", "env.id=faulty_envs:Raises-v0", *SMALL, *FOREVER)

    assert result.returncode == 65
    assert json.loads(result.stdout)["reason"] == "failed"
    assert "Traceback" in result.stderr
    assert "the simulator lost its licence" in result.stderr


def test_two_hosts_on_one_machine() -> None:
    """The actors' host first, then the learner's, which has the controller and says how it ended."""
    gpu0, cpu1 = (f"127.0.0.1:{free_ports(8)}" for _ in range(2))
    where = [f"hosts={{gpu0: '{gpu0}', cpu1: '{cpu1}'}}", "nodes.actor.host=cpu1", "nodes.learner.host=gpu0"]
    share = ["-t", "quickstart", *SMALL, *where, "stop.steps=20_000", "stop.reward=null", "--json"]
    with (
        running(*share, "--host", "cpu1", "--run-dir", "cpu1", name="ddrl_node") as actors,
        running(*share, "--host", "gpu0", "--run-dir", "gpu0", name="ddrl_node") as learner,
    ):
        actors.folder, learner.folder = Path("cpu1"), Path("gpu0")
        closing = learner.ended()
        out, err = actors.process.communicate(timeout=60)

    assert (actors.process.returncode, out) == (0, ""), err
    assert f"on gpu0:  ddrl-node -t {shlex.join(share[1:-1])} --host gpu0\n" in err
    assert closing["reason"] == "steps"
    assert closing["ledger"]["closed"] is True
    assert closing["ledger"]["lost"] == 0
    assert {name for name, _, _ in actors.lives()} == {"actor-0", "actor-1", "relay-0"}
