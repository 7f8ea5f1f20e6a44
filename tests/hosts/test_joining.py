"""A second host that has nothing but the head's address: by the line that the head prints, and by ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, ddrl_keys, running
from runs import CALM, ENVIRON, FOREVER, SMALL, Run, command, eventually

from ddrl_bus.transport import wire

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
NO_SSH = MISSING or ("" if Path(SSHD).exists() and shutil.which("ssh") else "needs sshd and ssh")
PORT = 2222
HOSTS = {"GPU0": ADDRESSES["gpu0"], "CPU1": ADDRESSES["cpu1"]}
LINE = f"ddrl-node --join tcp://{ADDRESSES['gpu0']}:7077 --host cpu1"

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(NO_SSH) and os.environ.get("CI") != "true", reason=NO_SSH),
]


def head(cable: Cable, folder: Path, *words: str, keys: Path | None = None) -> AbstractContextManager[Run]:
    """`ddrl run two-hosts`, which finds out which host it is on."""
    words = ("run", "two-hosts", "nodes.actor.count=1", *SMALL, *words)
    variables = HOSTS | {"DDRL_KEYS": str(keys or folder / "none")}
    return running(cable, "gpu0", folder, *words, name="ddrl", **variables)


def joined(cable: Cable, folder: Path, *words: str) -> AbstractContextManager[Run]:
    return running(cable, "cpu1", folder, *(words or shlex.split(LINE)[1:]))


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_host_is_named_with_the_line_that_brings_it(cable: Cable, tmp_path: Path) -> None:
    """And typed once more after all of that host was killed, it brings it back: not as an older life."""
    with head(cable, tmp_path / "gpu0", *FOREVER, *CALM, "nodes.actor.count=2") as learner:
        assert learner.until(lambda: f"on cpu1:  {LINE}\n" in learner.said, "what to type")
        learner.until(lambda: f"has been missing for 5 s; type there:  {LINE}\n" in learner.said, "who is missing")
        with joined(cable, tmp_path / "first") as actors:
            learner.until(lambda: learner.trained() > 20, "training")
            learner.until(lambda: "cpu1 is here" in learner.said, "word that it is there")
        learner.until(lambda: learner.said.count("has been missing for 5 s") >= 2, "who is missing again")
        with joined(cable, tmp_path / "second") as actors:
            learner.trains_on(50, "training after the second start")
            lives = [line.split() for line in (actors.folder / "lives").read_text().splitlines()]
            assert [int(life[1], 16) >> 32 for life in lives if life[0] == "actor-0"] == [1, 2]
            assert {life[0] for life in lives} == {"actor-0", "actor-1", "relay-0"}
            locks = [(run.folder / "topology.lock.yaml").read_text() for run in (learner, actors)]
            assert locks[0] == locks[1]
            learner.process.send_signal(signal.SIGTERM)
            assert learner.ends()["reason"] == "stop"
            assert actors.ends() == {}


def test_a_host_of_another_protocol_is_refused_and_both_are_named(cable: Cable, tmp_path: Path) -> None:
    code = "import ddrl_bus.transport.wire as wire; wire.PROTOCOL = (9, 0)\n"
    code += "from ddrl_bus.cli import ddrl_node; ddrl_node()"
    argv = [*cable.on("cpu1"), sys.executable, "-c", code, *shlex.split(LINE)[1:]]
    with head(cable, tmp_path / "gpu0", *FOREVER, *CALM) as learner:
        other = subprocess.run(argv, env=ENVIRON, capture_output=True, text=True, timeout=100, check=False)
        assert learner.process.poll() is None
    assert other.returncode == 64, other.stderr
    ours = ".".join(map(str, wire.PROTOCOL))
    assert f"protocol {ours} here, we speak 9.0; install the same ddrl_bus on both hosts" in other.stderr


def test_by_keys_a_host_joins_and_asks_and_stops_nobody(cable: Cable, tmp_path: Path, keys: dict[str, Path]) -> None:
    """The line is the one that the head prints; who has no key, or another's, is not told the topology."""
    address = f"tcp://gpu0@{ADDRESSES['gpu0']}:7077"
    line = f"ddrl-node --join {address} --host cpu1"
    by_key = {"DDRL_KEYS": str(keys["cpu1"])}

    def asked(*words: str) -> subprocess.CompletedProcess[str]:
        argv = command(*words, prefix=cable.on("cpu1"))
        return subprocess.run(argv, env=ENVIRON | by_key, capture_output=True, text=True, timeout=100, check=False)

    with head(cable, tmp_path / "gpu0", "insecure=false", *FOREVER, *CALM, keys=keys["gpu0"]) as learner:
        assert learner.until(lambda: f"on cpu1:  {line}\n" in learner.said, "what to type")
        with running(cable, "cpu1", tmp_path / "cpu1", *shlex.split(line)[1:], **by_key) as actors:
            learner.until(lambda: learner.trained() > 20, "training by key")
            for run in (address, str(tmp_path / "cpu1")):
                status = json.loads(asked("status", run, "--json").stdout)
                assert status["nodes"]["actor-0"]["state"] == "running"
            plain = asked("status", address.replace("gpu0@", ""))
            assert (plain.returncode, plain.stdout) == (69, "")
            assert "where its links are encrypted, give tcp://HEAD@ADDRESS:PORT" in plain.stderr
            refused = asked("stop", str(tmp_path / "cpu1"))
            assert refused.returncode == 70
            assert "type `ddrl stop` on gpu0" in refused.stderr
            ddrl_keys(keys["gpu0"], "revoke", "cpu1")
            stranger = asked("status", address)
            assert (stranger.returncode, stranger.stdout) == (69, "")
            assert "unless it was before, type on gpu0:  ddrl keys allow cpu1 " in stranger.stderr
            learner.process.send_signal(signal.SIGTERM)
            assert learner.ends()["reason"] == "stop"
            actors.close()


# ── by ssh ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Ssh:
    """An sshd on cpu1, and how gpu0 gets in."""

    folder: Path
    sockets: Path
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What runs there carries a mark, so that it is found again."""
        self.mark = f"DDRL_TEST_MARK={self.folder}"
        there = {"PYTHONPATH": ENVIRON["PYTHONPATH"], "TMPDIR": str(self.sockets)}
        node = ["env", "-C", str(self.folder), self.mark, *(f"{k}={v}" for k, v in there.items())]
        self.words = ["--ssh", "--ssh-config", str(self.folder / "config")]
        self.words += ["--node-command", shlex.join([*node, *command(name="ddrl_node")])]

    def processes(self) -> list[int]:
        """Whatever lives on cpu1 because of us."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
        return found


@pytest.fixture
def ssh(cable: Cable, tmp_path: Path) -> Iterator[Ssh]:
    folder = tmp_path / "ssh"
    folder.mkdir()
    for name in ("host", "key", "stranger"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True, capture_output=True)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text(f"[{ADDRESSES['cpu1']}]:{PORT} {host_key}\n")
    (folder / "sshd_config").write_text(
        f"Port {PORT}\nListenAddress {ADDRESSES['cpu1']}\nHostKey {folder}/host\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "config").write_text(
        f"Host {ADDRESSES['cpu1']}\n  Port {PORT}\n  User root\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known\n  StrictHostKeyChecking yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    sockets = Path(tempfile.mkdtemp(prefix="cpu1-"))
    found = Ssh(folder, sockets)
    with daemon([*cable.on("cpu1"), SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], folder / "sshd.log") as log:
        eventually(lambda: "Server listening" in log.read_text(), "sshd")
        try:
            yield found
        finally:
            for pid in found.processes():
                with suppress(ProcessLookupError):  # one may take others along
                    os.kill(pid, signal.SIGKILL)
    shutil.rmtree(sockets)


@contextmanager
def daemon(argv: list[str], log: Path) -> Iterator[Path]:
    with log.open("w") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
    try:
        yield log
    finally:
        process.terminate()
        process.wait(30)


def test_ssh_starts_the_other_host_by_keys_and_shows_what_it_says(
    cable: Cable, ssh: Ssh, tmp_path: Path, keys: dict[str, Path]
) -> None:
    words = [*ssh.words[:-1], ssh.words[-1].replace(ssh.mark, f"{ssh.mark} DDRL_KEYS={keys['cpu1']}")]
    more = ("insecure=false", "stop.reward=null", "stop.steps=20000")
    with head(cable, tmp_path / "gpu0", *words, *more, keys=keys["gpu0"]) as run:
        ended = run.ends()
        assert (ended["reason"], ended["ledger"]["closed"], ended["restarts"]) == ("steps", True, 0)
        assert ended["env_steps"] >= 20_000
        assert "ssh cpu1 | run runs/two-hosts/" in run.said
        assert ssh.processes() == []


def test_the_first_signal_drains_both_hosts_and_the_run_is_resumed(cable: Cable, ssh: Ssh, tmp_path: Path) -> None:
    with head(cable, tmp_path / "gpu0", *ssh.words, *FOREVER, *CALM) as run:
        run.until(lambda: run.trained() > 20, "training over ssh")
        assert len(ssh.processes()) >= 2  # a supervisor and an actor
        run.process.send_signal(signal.SIGINT)
        assert run.ends()["reason"] == "stop"
        assert run.books().lost == 0
        assert ssh.processes() == []
        before = run.trained()
    words = ("run", "--resume", str(tmp_path / "gpu0"), *ssh.words, f"stop.steps={before * 640 + 10_000}")
    with running(cable, "gpu0", tmp_path / "gpu0", *words, name="ddrl", **HOSTS) as run:
        ended = run.ends()
        assert (ended["reason"], ended["ledger"]["closed"]) == ("steps", True)
        assert run.trained() > before
        assert ssh.processes() == []


def test_a_share_that_dies_is_started_again_and_goes_with_a_head_that_is_killed(
    cable: Cable, ssh: Ssh, tmp_path: Path
) -> None:
    with head(cable, tmp_path / "gpu0", *ssh.words, *FOREVER, *CALM) as run:
        run.until(lambda: run.trained() > 20, "training over ssh")
        for pid in ssh.processes():
            with suppress(ProcessLookupError):  # one may take others along
                os.kill(pid, signal.SIGKILL)
        run.until(lambda: re.search("ssh cpu1 failed with exit code .*; restart 1 of 3", run.said), "what became of it")
        run.trains_on(50, "training after that")
        assert ssh.processes()
        run.process.kill()
        eventually(lambda: not ssh.processes(), "nobody left on cpu1")
        eventually(lambda: not run.alive(), "nobody left on gpu0")


@pytest.mark.parametrize("wrong", ["key", "command"])
def test_what_ssh_cannot_do_ends_the_run_in_words(cable: Cable, ssh: Ssh, tmp_path: Path, wrong: str) -> None:
    words = ssh.words
    if wrong == "key":
        config = (ssh.folder / "config").read_text()
        (ssh.folder / "config").write_text(config.replace("/key\n", "/stranger\n"))
    else:
        words = [*words[:-1], "/no/such/ddrl-node"]
    with head(cable, tmp_path / "gpu0", *words, *FOREVER, *CALM) as run:
        run.ends(69 if wrong == "key" else 127)
        said = "Permission denied" if wrong == "key" else "/no/such/ddrl-node: "
        assert "ssh cpu1 failed" in run.said
        assert f"ssh cpu1 | {'root@10.77.0.2: ' if wrong == 'key' else ''}" in run.said
        assert said in run.said
        assert not run.alive()
