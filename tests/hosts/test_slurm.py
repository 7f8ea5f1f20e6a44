"""What `ddrl emit slurm` prints, run by Slurm itself: a controller and two nodes, each in a network of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable
from runs import ENVIRON, SMALL, command, eventually

from ddrl_bus.launch import closing

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
NO_SLURM = MISSING or ("" if all(map(shutil.which, TOOLS)) else "needs slurm-wlm and munge")
NODES = {"gpu0": "alpha1", "cpu1": "alpha2"}

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(NO_SLURM) and os.environ.get("CI") != "true", reason=NO_SLURM),
]

CONF = """\
ClusterName=test
SlurmctldHost={hostname}({controller})
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
{nodes}PartitionName=main Nodes=ALL Default=YES
"""


@dataclass
class Slurm:
    cable: Cable
    folder: Path

    def __call__(self, *words: str, cwd: Path | None = None) -> str:
        """A command of Slurm's, given on the first node; what it printed."""
        environ = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        argv = [*self.cable.on("gpu0"), *words]
        done = subprocess.run(argv, env=environ, cwd=cwd, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self("scontrol", "show", "job", number)))


@pytest.fixture
def slurm(cable: Cable) -> Iterator[Slurm]:
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge goes through no folder that others may write to
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("munge", "state", *NODES.values()):
            (folder / name).mkdir(mode=0o755)
        folder.chmod(0o755)
        hosts = "".join(f"{ADDRESSES[host]} {node}\n" for host, node in NODES.items())
        for namespace in cable.namespaces.values():
            private = Path("/etc/netns") / namespace  # laid over /etc by `ip netns exec`
            private.mkdir(parents=True)
            undo.callback(shutil.rmtree, private)
            (private / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        nodes = "".join(f"NodeName={node} NodeAddr={ADDRESSES[host]} CPUs=2\n" for host, node in NODES.items())
        names = {"hostname": socket.gethostname().split(".")[0], "controller": ADDRESSES["gpu0"]}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, nodes=nodes, **names))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # or it looks for one that is not mounted
        undo.enter_context(munge(folder / "munge"))
        started = [undo.enter_context(daemon(cable, "gpu0", folder, "slurmctld", "-D"))]
        for host, node in NODES.items():
            started.append(undo.enter_context(daemon(cable, host, folder, "slurmd", "-D", "-N", node)))
        slurm = Slurm(cable, folder)

        def ready() -> bool:
            assert all(process.poll() is None for process in started), said(folder)
            with suppress(subprocess.CalledProcessError):
                return slurm("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"]
            return False

        eventually(ready, "two idle nodes")
        yield slurm


def said(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in folder.glob("*.out"))


@contextmanager
def daemon(cable: Cable, host: str, folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the foreground, with whatever it starts, until the end of the block."""
    environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / f"{words[0]}-{words[-1]}.out").open("w") as out:
        process = subprocess.Popen(
            [*cable.on(host), *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environ,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def munge(folder: Path) -> Iterator[None]:
    """Slurm's daemons know each other by it."""
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    files = {"key": "key-file", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    options = [f"--{option}={folder / name}" for name, option in files.items()]
    subprocess.run(["munged", "--force", *options], check=True, capture_output=True, timeout=30)
    pid = int((folder / "pid").read_text())
    try:
        yield
    finally:
        os.kill(pid, signal.SIGTERM)


def test_a_job_over_two_nodes_learns(slurm: Slurm, tmp_path: Path) -> None:
    """To a return of 100, where acting by chance has 20."""
    sockets = Path(tempfile.mkdtemp(prefix="nodes-"))
    node = shlex.join(["env", f"PYTHONPATH={ENVIRON['PYTHONPATH']}"])
    node += f" TMPDIR={sockets}/$SLURMD_NODENAME {shlex.join(command(name='ddrl_node'))}"
    for name in NODES.values():
        (sockets / name).mkdir()
    words = ["emit", "slurm", "two-hosts", "hosts.gpu0=a", "hosts.cpu1=b", "nodes.actor.count=2", "stop.reward=100"]
    emitted = subprocess.run(
        [sys.executable, "-c", "from ddrl_bus.cli import ddrl; ddrl()", *words, *SMALL, "--node-command", node],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    (tmp_path / "job").write_text(emitted.stdout)
    number = slurm("sbatch", "--parsable", "job", cwd=tmp_path).strip()
    try:
        eventually(lambda: slurm.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end")
    finally:
        slurm("scancel", number)
        shutil.rmtree(sockets)
    log = (tmp_path / f"two-hosts-{number}.log").read_text()
    job = slurm.job(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    runs = tmp_path / "runs" / "two-hosts"
    ended = json.loads((runs / f"{number}-gpu0" / closing.CLOSING).read_text())
    assert ended["reason"] == "reward"
    assert ended["return"] >= 100
    assert ended["ledger"]["closed"]
    assert {line.split()[0] for line in (runs / f"{number}-cpu1" / "lives").read_text().splitlines()} == {
        "actor-0",
        "actor-1",
        "evaluator-0",
        "relay-0",
    }
    assert f"ddrl-node --join tcp://{NODES['gpu0']}:7077 --host cpu1" in log
    assert (tmp_path / f"two-hosts-{number}.yaml").exists()
