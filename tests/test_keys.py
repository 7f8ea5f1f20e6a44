"""Keys and the allow-list: the files, the commands, a node that has none; and that nothing received can run code."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import zmq

import ddrl_bus
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


def test_a_link_in_place_of_a_key_is_not_followed(folder: Path, tmp_path: Path) -> None:
    keys.new("gpu0")
    (folder / "gpu0.key").rename(tmp_path / "elsewhere")
    (folder / "gpu0.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecurityError, match="no link"):
        keys.own("gpu0")


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
    assert keys.kinds("cpu1") == frozenset({"actor", "evaluator"})
    assert keys.kinds("cpu2") == keys.ANY
    assert keys.kinds("cpu3") is None
    keys.revoke("cpu1")
    assert keys.kinds("cpu1") is None
    assert "# the rack" in (folder / keys.ALLOWED).read_text()


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
    assert "ddrl keys allow gpu0 " in made.err
    assert type_(ddrl, "keys", "allow", "cpu1", KEY, "--role", "actor").code == 0
    listed = type_(ddrl, "keys", "list")
    assert listed.out.splitlines() == [f"gpu0 {public}", f"cpu1 {KEY} actor"]
    assert keys.own("gpu0").secret not in made.out + made.err + listed.out + listed.err
    assert type_(ddrl, "keys", "revoke", "cpu1").code == 0
    assert type_(ddrl, "keys", "list").out.splitlines() == [f"gpu0 {public}"]


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


# ── no byte can run code ─────────────────────────────────────────────────────────────────────────────────────────

UNSAFE = {"eval", "exec", "compile", "__import__", "pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "np.load", "numpy.load", "recv_pyobj", "recv_serialized"}


def unsafe(source: str) -> Iterator[str]:
    """Names in `source` that load or run what they are given."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] in UNSAFE)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNSAFE:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in UNSAFE:
                yield name
            case ast.Call(func=ast.Attribute(attr=attr) as func):
                if ast.unparse(func) in UNSAFE_CALLS or attr in UNSAFE_CALLS:
                    yield ast.unparse(func)
            case ast.keyword(arg="allow_pickle"):
                yield "allow_pickle"


def test_nothing_in_the_package_can_run_what_it_is_sent() -> None:
    package = Path(ddrl_bus.__file__).parent
    found = {str(path): list(unsafe(path.read_text())) for path in package.rglob("*.py")}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch.x, marshal", "eval(x)", "torch.load(f)"),
        *("yaml.load(f)", "socket.recv_pyobj()", "np.load(f)", "read(f, allow_pickle=True)"),
    ],
)
def test_what_could_is_seen(source: str) -> None:
    assert list(unsafe(source))
