"""Keys and the allow-list: the files, the commands, a node that has none; and that nothing received can run code."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import zmq
from runs import ENVIRON

from ddrl_bus import keys
from ddrl_bus.cli import ddrl, ddrl_node
from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.keys import AllowList, Entry

KEY = "a" + "1" * 39
TWO_HOSTS = ("-t", "two-hosts", "insecure=false", "nodes.actor.count=1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    return tmp_path / "keys"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def type_(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Types a command on the host with these keys."""
    monkeypatch.setenv("GPU0", "10.0.0.1")
    monkeypatch.setenv("CPU1", "10.0.0.2")
    monkeypatch.chdir(folder.parent)

    def type_(command: click.Command, *words: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            command.main(list(words))
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return type_


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_key_is_its_owners_alone_and_is_allowed(folder: Path) -> None:
    public = keys.new("gpu0")
    path = folder / "gpu0.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    pair = keys.own("gpu0")
    assert pair.public == public == zmq.curve_public(path.read_bytes().strip()).decode()
    assert pair.secret not in repr(pair)
    assert keys.allowed() == (Entry("gpu0", public),)
    assert keys.owned() == {"gpu0": public}
    with pytest.raises(UsageError, match=r"gpu0\.key is there"):
        keys.new("gpu0")
    assert keys.own("gpu0") == pair


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660])
def test_a_key_that_others_could_have_read_is_refused_with_what_to_type(mode: int, folder: Path) -> None:
    keys.new("gpu0")
    (folder / "gpu0.key").chmod(mode)
    with pytest.raises(SecurityError, match=f"has mode {mode:04o}.*chmod 600 .*gpu0.key") as caught:
        keys.own("gpu0")
    assert caught.value.exit_code == 77


def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    keys.new("gpu0")
    (folder / "gpu0.key").rename(tmp_path / "elsewhere")
    (folder / "gpu0.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecurityError, match=r"a link that leads to .*elsewhere; expected a file, or a link inside"):
        keys.own("gpu0")


def secret_key() -> str:
    """Begins as ours do."""
    return next(key for _ in range(1000) if (key := zmq.curve_keypair()[1].decode())[0].isalnum())


def mounted(folder: Path, version: str, **files: str) -> None:
    """As the kubelet writes a Secret, or a newer version of it: NAME → ..data/NAME, ..data → ..VERSION."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o1777)  # root's, as a tmpfs of its own
    data = folder / f"..{version}"
    data.mkdir(mode=0o755)
    for name, text in files.items():
        (data / name).write_text(text)
        (data / name).chmod(0o400)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(data.name)
    (folder / "..data_tmp").replace(folder / "..data")


def test_keys_are_read_as_kubernetes_mounts_a_secret_and_a_newer_one_is_seen(folder: Path) -> None:
    secret = secret_key()
    public = zmq.curve_public(secret.encode()).decode()
    mounted(folder, "1", **{"gpu0.key": secret, "allowed": f"cpu1 {KEY}\n"})
    assert keys.own("gpu0").public == public
    assert keys.only() == "gpu0"
    running = AllowList()
    assert running.refresh()
    assert running.key_of("cpu1", "actor") == KEY
    mounted(folder, "2", **{"gpu0.key": secret, "allowed": "# nobody\n"})
    assert running.refresh()
    assert (running.entries, running.problem) == ((), "")
    (folder / "..data" / "gpu0.key").chmod(0o440)
    with pytest.raises(SecurityError, match="others can read it"):
        keys.own("gpu0")
    (folder / "..data" / "gpu0.key").chmod(0o400)
    (folder / "..2").chmod(0o777)
    with pytest.raises(SecurityError, match=r"others can replace files in .*/\.\.2"):
        keys.own("gpu0")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "wrong"),
    [
        (0, 4000, 0o440, ""),  # fsGroup
        (4000, 4000, 0o400, ""),
        (4000, 4000, 0o440, "others can read it"),
        (0, 4000, 0o460, "others can read it"),
        (0, 4000, 0o444, "others can read it"),
        (5000, 4000, 0o440, "expected a plain file that is yours"),
    ],
)
def test_root_may_give_a_key_to_a_user_by_its_group(owner: int, group: int, mode: int, wrong: str) -> None:
    with tempfile.TemporaryDirectory() as place:  # where another user can come
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "gpu0.key").write_text(secret_key())
        os.chown(folder / "gpu0.key", owner, group)
        (folder / "gpu0.key").chmod(mode)
        code = "import os, zmq; from ddrl_bus import keys\n"
        code += "os.setgroups([]); os.setgid(4000); os.setuid(4000); print(keys.own('gpu0').public)"
        environ = ENVIRON | {keys.ENVIRONMENT: place}
        found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert wrong in found.stderr
    assert bool(wrong) == bool(found.returncode), found.stderr


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    keys.new("gpu0")
    if os.geteuid():
        pytest.skip("needs root, to give it away")
    os.chown(folder, 4000, 4000)
    with pytest.raises(SecurityError, match="others can replace files"):
        keys.own("gpu0")
    os.chown(folder, 0, 0)


@pytest.mark.parametrize("text", ["", "short\n", KEY + "1\n", KEY + "\n" + KEY + "\n", "\xe9" * 40])
def test_a_file_that_holds_no_key_is_refused_and_not_shown(text: str, folder: Path) -> None:
    keys.new("gpu0")
    (folder / "gpu0.key").write_text(text)
    with pytest.raises(SecurityError, match=r"gpu0\.key") as caught:
        keys.own("gpu0")
    assert KEY not in str(caught.value)


def test_a_folder_that_others_can_write_to_is_refused(folder: Path) -> None:
    keys.new("gpu0")
    folder.chmod(0o777)
    with pytest.raises(SecurityError, match="chmod 700"):
        keys.own("gpu0")


def test_people_may_edit_the_list(folder: Path) -> None:
    keys.new("gpu0")
    with (folder / keys.ALLOWED).open("a") as allowed:
        allowed.write(f"\n# the rack\ncpu1 {KEY} actor,evaluator  # since May\n")
    keys.allow(Entry("cpu2", KEY))
    assert keys.allowed()[1:] == (Entry("cpu1", KEY, frozenset({"actor", "evaluator"})), Entry("cpu2", KEY))
    assert keys.kinds("cpu1") == frozenset({"actor", "evaluator", "relay"})
    assert keys.kinds("cpu2") == keys.ANY
    assert keys.kinds("cpu3") is None
    keys.revoke("cpu1")
    assert keys.kinds("cpu1") is None
    assert "# the rack" in (folder / keys.ALLOWED).read_text()


def test_ones_own_key_is_nobody_elses(folder: Path) -> None:
    public = keys.new("gpu0")
    with pytest.raises(UsageError, match=r"this machine's own key, as gpu0; expected the one that .* printed on cpu1"):
        keys.allow(Entry("cpu1", public))
    keys.allow(Entry("gpu0", public, frozenset({"learner"})))


def test_a_host_has_one_key(folder: Path) -> None:
    keys.allow(Entry("cpu1", KEY))
    keys.allow(Entry("cpu1", other := "b" * 40))
    assert keys.allowed() == (Entry("cpu1", other),)


@pytest.mark.parametrize("line", ["cpu1", f"cpu1 {KEY}1", f"cpu1 {KEY} actor evaluator", f"-x {KEY}", f"{KEY} cpu1"])
def test_a_line_that_is_no_entry_names_its_place_and_lets_nobody_in(line: str, folder: Path) -> None:
    keys.allow(Entry("cpu2", KEY))
    with (folder / keys.ALLOWED).open("a") as allowed:
        allowed.write(f"{line}\n")
    with pytest.raises(SecurityError, match=r"allowed:2: expected NAME KEY"):
        keys.allowed()
    running = AllowList()
    assert running.refresh()
    assert running.entries == (Entry("cpu2", KEY),)  # a node that runs goes on with the rest
    assert "allowed:2" in running.problem


def test_a_list_that_changed_is_read_again(folder: Path) -> None:
    running = AllowList()
    assert not running.refresh()  # there is none
    keys.allow(Entry("cpu1", KEY))
    assert running.refresh()
    assert not running.refresh()
    assert running.key_of("cpu1", "actor") == KEY
    keys.revoke("cpu1")
    assert running.refresh()
    assert running.key_of("cpu1", "actor") is None
    keys.allow(Entry("cpu1", KEY, frozenset({"actor"})))
    assert running.refresh()
    assert running.key_of("cpu1", "actor") == KEY
    assert running.key_of("cpu1", "learner") is None
    (folder / keys.ALLOWED).unlink()
    assert running.refresh()
    assert running.entries == ()


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_commands(type_: Callable[..., Done]) -> None:
    made = type_(ddrl, "keys", "new", "gpu0")
    public = made.out.strip()
    assert len(public) == 40
    assert f"on every other HOST type:  ddrl keys new HOST --allow gpu0 '{public}'\n" == made.err
    assert type_(ddrl, "keys", "allow", "cpu1", KEY, "--role", "actor").code == 0
    listed = type_(ddrl, "keys", "list")
    assert listed.out.splitlines() == [f"gpu0 {public}", f"cpu1 {KEY} actor"]
    assert f"type:  ddrl keys allow gpu0 '{public}'\n" in listed.err
    assert keys.own("gpu0").secret not in made.out + made.err + listed.out + listed.err
    assert type_(ddrl, "keys", "revoke", "cpu1").code == 0
    assert type_(ddrl, "keys", "list").out.splitlines() == [f"gpu0 {public}"]


def test_two_hosts_know_each_other_after_three_lines(
    type_: Callable[..., Done], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prints the next, word for word; the second may be typed again."""

    def typed(host: str, line: str) -> Done:
        monkeypatch.setenv(keys.ENVIRONMENT, str(folder / host))
        return type_(ddrl, *shlex.split(line)[1:])

    folder.mkdir()
    first = typed("gpu0", "ddrl keys new gpu0")
    line = first.err.partition("type:  ")[2].replace("HOST", "cpu1")
    second = typed("cpu1", line)
    assert typed("cpu1", line) == second
    assert "on gpu0 type:  ddrl keys allow cpu1 " in second.err
    assert typed("gpu0", second.err.partition("type:  ")[2]).code == 0
    for host in ("gpu0", "cpu1"):
        known = typed(host, "ddrl keys list").out.split()
        assert set(known) == {"gpu0", "cpu1", first.out.strip(), second.out.strip()}


def test_the_head_says_what_to_type_on_a_host_without_a_key(type_: Callable[..., Done]) -> None:
    public = keys.new("gpu0")
    refused = type_(ddrl, "run", *TWO_HOSTS[1:])
    assert refused.code == 77
    assert f"type on cpu1:  ddrl keys new cpu1 --allow gpu0 '{public}'  and here what that prints; " in refused.err


def test_who_joins_without_keys_is_told_what_to_type(type_: Callable[..., Done], folder: Path) -> None:
    line = ("--join", "tcp://gpu0@127.0.0.1:9", "--host", "cpu1")
    refused = type_(ddrl_node, *line)
    assert refused.code == 77
    assert "no secret key of host cpu1 on this machine" in refused.err
    keys.new("cpu1")
    for words in ((ddrl_node, *line), (ddrl, "status", line[1])):
        refused = type_(*words)
        assert refused.code == 77
        assert "no key of gpu0 is allowed on this machine" in refused.err
        assert "`ddrl keys list` on gpu0 prints what to type here" in refused.err
    keys.allow(Entry("gpu0", KEY))
    silent = type_(ddrl, "status", line[1])
    assert (silent.code, silent.err.endswith("in time (Connection refused)\n")) == (69, True)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = type_(ddrl, "status", f"tcp://gpu0@127.0.0.1:{deaf.getsockname()[1]}")
    assert silent.code == 69
    assert f"unless it was before, type on gpu0:  ddrl keys allow cpu1 '{keys.own('cpu1').public}'" in silent.err
    keys.new("cpu2")
    refused = type_(ddrl, "status", line[1])
    assert refused.code == 77
    assert "this machine has keys as cpu1, cpu2; give DDRL_KEYS a folder with one" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("new", "../x"), "expected a host"),
        (("allow", "cpu1", "abc"), "no public key"),
        (("allow", "cpu1", KEY, "--role", "acter"), "did you mean 'actor'?"),
        (("revoke", "cpu1"), "no host 'cpu1' is allowed"),
    ],
)
def test_a_mistake_is_a_usage_error(words: tuple[str, ...], said: str, type_: Callable[..., Done]) -> None:
    refused = type_(ddrl, "keys", *words)
    assert refused.code == 64
    assert said in refused.err
    assert "Traceback" not in refused.err


# ── a host without ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_keys_a_node_refuses_to_start_and_says_what_to_type(type_: Callable[..., Done]) -> None:
    starts = [(ddrl_node, *TWO_HOSTS, *words) for words in (("--host", "gpu0"), ("--name", "actor-0"))]
    for words in [*starts, (ddrl, "run", *TWO_HOSTS[1:])]:
        refused = type_(*words)
        assert refused.code == 77
        for typed in ("ddrl keys new gpu0", "ddrl keys allow gpu0 KEY", "ddrl keys new cpu1", "insecure: true"):
            assert typed in refused.err
    assert not Path("runs").exists()


def test_nor_with_only_the_keys_of_others_or_another_than_it_says(folder: Path, type_: Callable[..., Done]) -> None:
    share = (ddrl_node, *TWO_HOSTS, "--host", "gpu0")
    keys.allow(Entry("gpu0", KEY))
    keys.allow(Entry("cpu1", "b" * 40))
    refused = type_(*share)
    assert refused.code == 77
    assert "no secret key of host gpu0 on this machine" in refused.err
    keys.new("gpu0")
    keys.allow(Entry("gpu0", KEY))
    refused = type_(*share)
    assert refused.code == 77
    assert "not the one in its own list" in refused.err
    (folder / "gpu0.key").chmod(0o644)
    refused = type_(*share)
    assert refused.code == 77
    assert "chmod 600" in refused.err


def test_showing_a_topology_needs_no_keys(type_: Callable[..., Done]) -> None:
    assert type_(ddrl, "show", "two-hosts", "insecure=false").code == 0
    assert type_(ddrl, "check", "two-hosts", "insecure=false").code == 77
