"""Every error raised to a user, as one tree with the exit code of a command that ends by it.

DdrlError                    70  something inside went wrong
├── UsageError               64  the command line or an argument is off
│   ├── AddressInUseError    64  another process holds an address that this node must bind
│   └── TopologyError        64  a topology file is refused; carries every problem found
├── RefusedFileError         65  a file or an environment was refused (damaged checkpoint, env that cannot be made)
│   └── EnvError             65  an environment cannot be made, raised, or broke its declared spaces
├── UnreachableError         69  a peer did not answer before its deadline
│   └── LostReplicaError     69  a replica of a learner did not come to what all do together
├── DivergedError        70  replicas that must be equal are not
├── RemoteError              70  a server refused a request or failed over it; carries its words
│   └── VersionError         64  it speaks another major version of the protocol
├── LinkClosedError          70  a link end was used after it closed, or closed under a waiter
├── WireError                70  bytes that are not one of our messages; carries the counted reason
├── FencedError              75  a newer life of this node has taken over
└── SecurityError            77  the configuration would expose a link
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class DdrlError(Exception):
    """Base of all errors of this package."""

    exit_code: ClassVar[int] = 70


class UsageError(DdrlError):
    exit_code = 64


class AddressInUseError(UsageError):
    pass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a topology: `file:line:column: path: message`."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class TopologyError(UsageError):
    """A topology was refused. `problems` holds everything that is wrong with it, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RefusedFileError(DdrlError):
    exit_code = 65


class EnvError(RefusedFileError):
    pass


class UnreachableError(DdrlError):
    exit_code = 69


class LostReplicaError(UnreachableError):
    pass


class DivergedError(DdrlError):
    pass


class RemoteError(DdrlError):
    pass


class VersionError(RemoteError):
    exit_code = UsageError.exit_code


class LinkClosedError(DdrlError):
    pass


class WireError(DdrlError):
    """Bytes that are not an acceptable message. `reason` is one of `REASONS`, fit for a counter."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class FencedError(DdrlError):
    exit_code = 75


class SecurityError(DdrlError):
    exit_code = 77


def first(error: BaseException) -> BaseException:
    """What a group of exceptions, of groups perhaps, began with."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
