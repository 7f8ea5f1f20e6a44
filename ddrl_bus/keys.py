"""Keys of hosts: what this machine is known by, and whom it lets in.

    ~/.config/ddrl/keys, or $DDRL_KEYS
        NAME.key    secret key of this machine as host NAME of a topology: one line, for its owner's eyes only
        allowed     whose keys may come and be dialled, a line each: NAME KEY [KIND,KIND]     # comments

Either may be a link to a file further inside that folder, which is how Kubernetes mounts a Secret.
Keys are Curve25519's, written in Z85: 40 characters, of which the first is a letter or digit here, so that a key is no
option and no comment. `allowed` holds nothing secret, and may be the same file on every host.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddrl_bus.errors import SecurityError, UsageError

ENVIRONMENT: Final = "DDRL_KEYS"
ALLOWED: Final = "allowed"
MAX_BYTES: Final = 1 << 20
ANY: Final[frozenset[str]] = frozenset()
"""Kinds of node that an entry without any speaks for: all."""
RELAYED: Final = frozenset({"actor", "evaluator", "inference"})
"""Kinds that hear weights: whoever may run one may run the relay that a topology puts before several of them."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # as of hosts in a topology
_KEY: Final = re.compile(r"[0-9a-zA-Z][0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{39}")
_KINDS: Final = re.compile(r"[a-z_]+(,[a-z_]+)*")


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the allow-list. `kinds` is ANY, or the only kinds of node that the host may run."""

    name: str
    key: str
    kinds: frozenset[str] = ANY

    @property
    def runs(self) -> frozenset[str]:
        """The kinds with what comes along with them."""
        return self.kinds | {"relay"} if self.kinds & RELAYED else self.kinds

    def __str__(self) -> str:
        return " ".join([self.name, self.key, *([",".join(sorted(self.kinds))] if self.kinds else [])])


def folder() -> Path:
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".config" / "ddrl" / "keys")


# ── what the command does ────────────────────────────────────────────────────────────────────────────────────────


def new(name: str) -> str:
    """Make this machine's key as host `name`, and allow it; its public half.

    Raises:
        UsageError: it has one, or cannot have one of this name.
    """
    import zmq

    path = folder() / f"{_checked(name)}.key"
    _make(path.parent)
    public, secret = b"-", b"-"
    while not (public[:1].isalnum() and secret[:1].isalnum()):
        public, secret = zmq.curve_keypair()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(
            f"{path} is there; `ddrl keys list` shows its public half. Remove it to make another"
        ) from None
    with open(fd, "wb") as file:
        file.write(secret + b"\n")
    allow(Entry(name, public.decode()))
    return public.decode()


def allow(entry: Entry) -> None:
    """Let the holder of a key in as a host of a topology, instead of who was that host before.

    Raises:
        UsageError: that is no name, key or kind; or the key is this machine's own as another host.
    """
    _checked(entry.name)
    if not _KEY.fullmatch(entry.key):
        raise UsageError("that is no public key; expected the 40 characters that `ddrl keys new` printed, in quotes")
    if mine := next((name for name, key in owned().items() if key == entry.key and name != entry.name), None):
        raise UsageError(
            f"that is this machine's own key, as {mine}; expected the one that `ddrl keys new {entry.name}` printed on "
            f"{entry.name}"
        )
    _rewrite([*_without(entry.name), str(entry)])


def revoke(name: str) -> None:
    """Shut a host out; nodes that run hear of it within a second.

    Raises:
        UsageError: it is not in the list.
    """
    entries = allowed()
    if all(entry.name != name for entry in entries):
        known = ", ".join(sorted({entry.name for entry in entries})) or "nobody"
        raise UsageError(f"no host {name[:64]!r} is allowed in {folder() / ALLOWED}; there: {known}")
    _rewrite(_without(name))


def owned() -> dict[str, str]:
    """Host name → public key, of the keys that this machine has.  Raises: SecurityError, as `own`."""
    return {path.stem: own(path.stem).public for path in sorted(folder().glob("*.key"))}


def introduction(name: str) -> str:
    """What to type where this machine's key as `name` is not known."""
    return f"ddrl keys allow {name} {shlex.quote(own(name).public)}"


def invitation(name: str, host: str = "HOST") -> str:
    """What to type on another host, that it has a key and knows this machine's; that prints its introduction."""
    return f"ddrl keys new {host} --allow {name} {shlex.quote(own(name).public)}"


def invite(host: str) -> str:
    """What to type where a host has no key."""
    mine = next((name for name in owned() if name != host), None)
    if mine is None:
        return (
            f"type `ddrl keys new {host}` on {host}, and on every other host `ddrl keys allow {host} KEY` with the key "
            "that it prints"
        )
    return f"type on {host}:  {invitation(mine, host)}  and here what that prints"


def unknown(host: str) -> str:
    """What is wrong where the key of a host is missing."""
    return (
        f"no key of {host} is allowed on this machine ({folder() / ALLOWED}); `ddrl keys list` on {host} prints what "
        "to type here"
    )


def _without(name: str) -> list[str]:
    """The lines of the list but those of `name`."""
    lines = _read(folder() / ALLOWED).splitlines() if (folder() / ALLOWED).exists() else []
    return [line for line in lines if line.split()[:1] != [name]]


def _rewrite(lines: list[str]) -> None:
    _make(folder())
    path = folder() / ALLOWED
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text("".join(f"{line}\n" for line in lines))
    draft.chmod(0o600)
    draft.replace(path)  # whole: a node that looks meanwhile sees the old list or the new one


def _make(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"got {name[:64]!r}, expected a host as a topology names it: letters, digits, '.', '_' and '-'"
        )
    return name


# ── what nodes read ──────────────────────────────────────────────────────────────────────────────────────────────


def only() -> str:
    """The host that this machine has a key as.

    Raises:
        SecurityError: it has none, or is several.
    """
    match sorted(path.stem for path in folder().glob("*.key")):
        case [name]:
            return name
        case []:
            raise SecurityError(
                f"this machine has no key ({folder()}); type `ddrl keys new HOST`, as `hosts:` names it"
            )
        case names:
            raise SecurityError(f"this machine has keys as {', '.join(names)}; give {ENVIRONMENT} a folder with one")


def own(name: str) -> KeyPair:
    """This machine's key as host `name`.

    Raises:
        SecurityError: it has none, others could have read it, or the file holds no key.
    """
    import zmq

    path = folder() / f"{_checked(name)}.key"
    if not path.exists():
        raise SecurityError(
            f"no secret key of host {name} on this machine ({path}); type `ddrl keys new {name}` here, and on every "
            f"other host `ddrl keys allow {name} KEY` with the key that it prints"
        )
    secret = _read(path, private=True).strip()
    if not _KEY.fullmatch(secret):
        raise SecurityError(f"{path}: expected one line of 40 characters, a secret key; remove it and make a new one")
    return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)


def allowed() -> tuple[Entry, ...]:
    """The allow-list; nobody where there is none.

    Raises:
        SecurityError: a line is off, or somebody else could have written it.
    """
    path = folder() / ALLOWED
    if not path.exists():
        return ()
    return tuple(_entry(line, f"{path}:{number}") for number, line in _lines(_read(path)))


def kinds(host: str) -> frozenset[str] | None:
    """The kinds of node that the keys of a host may stand for, ANY for all; None if it has no key here."""
    found = [entry.runs for entry in allowed() if entry.name == host]
    return None if not found else ANY if ANY in found else frozenset[str]().union(*found)


class AllowList:
    """The allow-list of a node that runs: nobody until `refresh` has looked, which then tells whether it changed.

    What cannot be read, or is no entry, lets nobody in; `problem` says why.
    """

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self.problem = ""
        self._path = folder() / ALLOWED
        self._seen: object = None

    def refresh(self) -> bool:
        """Whether its entries are others than before."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size)
        except OSError:
            seen = (0, 0, 0, 0)
        if seen == self._seen:
            return False
        self._seen, self.problem, before = seen, "", self.entries
        self.entries = tuple(self._readable())
        return self.entries != before

    def key_of(self, host: str, kind: str) -> str | None:
        """The key that a node of this kind on `host` must have; of several, the last in the list."""
        return next((e.key for e in reversed(self.entries) if e.name == host and may(e, kind)), None)

    def by_key(self) -> Mapping[str, list[Entry]]:
        entries: dict[str, list[Entry]] = {}
        for entry in self.entries:
            entries.setdefault(entry.key, []).append(entry)
        return entries

    def _readable(self) -> Iterator[Entry]:
        try:
            lines = list(_lines(_read(self._path)))
        except (SecurityError, OSError) as error:
            self.problem = str(error)
            return
        for number, line in lines:
            try:
                yield _entry(line, f"{self._path}:{number}")
            except SecurityError as error:
                self.problem = str(error)


def may(entry: Entry, kind: str) -> bool:
    """Whether the holder of this key may run nodes of a kind."""
    return not entry.kinds or kind in entry.runs


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _entry(line: str, where: str) -> Entry:
    words = line.split()
    words = words[: next((n for n, word in enumerate(words) if n > 1 and word.startswith("#")), None)]
    match words:
        case [name, key] if _NAME.fullmatch(name) and _KEY.fullmatch(key):
            return Entry(name, key)
        case [name, key, kinds] if _NAME.fullmatch(name) and _KEY.fullmatch(key) and _KINDS.fullmatch(kinds):
            return Entry(name, key, frozenset(kinds.split(",")))
    raise SecurityError(f"{where}: expected NAME KEY or NAME KEY KIND,KIND; `ddrl keys allow` writes such lines")


def _read(path: Path, *, private: bool = False) -> str:
    """A file that nobody else may write to, and if it is `private` nobody else may read.

    One of root's may be read by its group, as Kubernetes gives it to a pod's user (fsGroup).
    """
    try:
        real = _inside(path)
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SecurityError(f"{path}: {error.strerror}; expected a plain file") from None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            raise SecurityError(f"{path}: expected a plain file that is yours; type `sudo chown $USER {path}`")
        others = (0o077 if found.st_uid == os.geteuid() else 0o037) if private else 0o022
        if found.st_mode & others:
            mode, wrong = stat.S_IMODE(found.st_mode), "read it" if private else "write to it"
            raise SecurityError(f"{path} has mode {mode:04o}: others can {wrong}; type `chmod 600 {path}`")
        return file.read(MAX_BYTES).decode(errors="replace")


def _inside(path: Path) -> Path:
    """Where a file of the folder really is: in it, and no other user can put another file there.

    Raises:
        SecurityError: it is a link that leads out of its folder, or others can replace files.
    """
    top, real = (Path(os.path.realpath(each)) for each in (path.parent, path))
    if not real.is_relative_to(top):
        raise SecurityError(f"{path} is a link that leads to {real}; expected a file, or a link inside {path.parent}")
    for above in (real.parent, *real.parent.parents):
        found = above.stat()
        if found.st_uid not in (os.geteuid(), 0) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            raise SecurityError(f"others can replace files in {above}; type `chmod 700 {above}`, and make it yours")
        if above == top:
            break
    return real
