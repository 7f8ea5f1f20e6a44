"""YAML text as a tree that remembers where each value stands.

Only events of ruamel.yaml's parser are used, never its constructors: nothing in a file can build an object, and
depth, size and aliases are judged before a tree exists. Scalars are typed by the YAML 1.2 core schema with two
additions that people expect: `1_000_000` and `3e-4` are numbers. `no`, `on` and `12:30` are text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from ddrl_bus.errors import Problem

# A topology is written by a person; whatever exceeds these is a mistake or an attack. They bound the time to refuse.
MAX_BYTES = 1 << 20
MAX_LINES = 20_000
MAX_LINE = 1 << 16
MAX_EVENTS = 10_000
MAX_DEPTH = 32
MAX_KEY = 128
MAX_PROBLEMS = 100

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
MarkAt = Callable[[int, int], "Mark"]  # line and column, counted from 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, counted from 1; line 0 is a whole file or a command-line override."""

    file: str
    line: int = 0
    column: int = 0


@dataclass(slots=True)
class Node:
    value: Scalar | list[Node] | dict[str, Node]
    at: Mark
    key_at: Mark | None = None  # where the key stands, if the node is a mapping's value

    def plain(self) -> Plain:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def children(self) -> dict[str, Node]:
        return self.value if isinstance(self.value, dict) else {}

    def find(self, path: Iterable[str | int]) -> Node:
        """The deepest node along `path`, so that a missing key is reported at the mapping that lacks it."""
        node = self
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[str(step)]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
            else:
                break
        return node


@dataclass
class Problems:
    """Collects everything that is wrong; of several at one place and path, the first explains the others."""

    found: dict[tuple[Mark, str], Problem] = field(default_factory=dict)

    def add(self, at: Mark | Node, path: str, message: str) -> None:
        mark = at.at if isinstance(at, Node) else at
        above = (path[:end] for end, character in enumerate(path) if character in ".[")
        if not any((mark, each) in self.found for each in (path, *above)):
            self.found[mark, path] = Problem(mark.file, mark.line, mark.column, path, message)

    def __bool__(self) -> bool:
        return bool(self.found)

    def sorted(self) -> list[Problem]:
        """In file order, at most `MAX_PROBLEMS` of them."""
        files = {problem.file: None for problem in self.found.values()}
        order = {file: rank for rank, file in enumerate(files)}
        problems = sorted(self.found.values(), key=lambda p: (order[p.file], p.line, p.column))
        if (more := len(problems) - MAX_PROBLEMS) > 0:
            problems[MAX_PROBLEMS:] = [Problem(problems[0].file, 0, 0, "", f"and {more} more problems")]
        return problems


def came(value: object) -> str:
    """A value as an error message shows it: one short line, control characters escaped."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ── scalars ──────────────────────────────────────────────────────────────────────────────────────────────────────

_WORDS: dict[str, Scalar] = {"": None, "~": None}
for _text, _value in {"null": None, "true": True, "false": False}.items():
    _WORDS |= dict.fromkeys((_text, _text.capitalize(), _text.upper()), _value)
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")


def resolve(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 64:  # no number anyone wrote; int() of long text is slow or refused
        return text
    if _INT.fullmatch(text):
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if _FLOAT.fullmatch(text):
        return float(text)
    if sign := _INF.fullmatch(text):
        return -math.inf if sign[1] == "-" else math.inf
    return text


# ── text to tree ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Refused(Exception):
    """Parsing cannot go on."""

    def __init__(self, at: Mark, message: str) -> None:
        super().__init__(message)
        self.at, self.message = at, message


def parse(text: str, file: str, problems: Problems, *, override: Sequence[str] = ()) -> Node | None:
    """The one document in `text`; None if it cannot be read to its end. What is wrong goes to `problems`.

    `override` is the path that `text` is a value for: such a value has no lines to count.
    """

    def mark(line: int, column: int) -> Mark:
        return Mark(file, line + 1, column + 1) if not override else Mark(file)

    def position(index: int) -> Mark:
        before = text[:index]
        return mark(before.count("\n"), index - before.rfind("\n") - 1)

    try:
        _measure(text, mark)
        return _Builder(mark, problems, override).build(YAML(typ="safe", pure=True).parse(text))
    except _Refused as error:
        problems.add(error.at, "", error.message)
    except MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        at = mark(where.line, where.column) if where else mark(0, 0)
        problems.add(at, "", f"not YAML: {error.problem or error.context}")
    except ReaderError as error:
        problems.add(position(error.position), "", f"not YAML: character {error.character!a} is not allowed")
    except (YAMLError, ValueError, OverflowError, IndexError, AssertionError) as error:  # ruamel's own slips
        problems.add(mark(0, 0), "", f"not YAML: {came(str(error))}")
    return None


def _measure(text: str, mark: MarkAt) -> None:
    for number, line in enumerate(text.split("\n")):
        if number >= MAX_LINES:
            raise _Refused(mark(number, 0), f"more than {MAX_LINES:,} lines; no topology is that long")
        if len(line) > MAX_LINE:
            raise _Refused(mark(number, 0), f"a line of {len(line):,} characters; at most {MAX_LINE:,} are read")


@dataclass
class _Open:
    """A mapping or list whose end has not come yet."""

    node: Node
    step: str | int  # its own key or index
    key: tuple[str, Mark] | None = None  # the key that waits for its value, in a mapping

    def here(self) -> str | int:
        """Key or index of the child that comes next."""
        return len(self.node.value) if isinstance(self.node.value, list) else self.key[0] if self.key else ""


class _Builder:
    """Events in, one tree out. Anything a topology has no use for (anchors, aliases, tags) is refused here."""

    def __init__(self, mark: MarkAt, problems: Problems, above: Sequence[str]) -> None:
        self.mark = mark
        self.above = above
        self.problems = problems
        self.root: Node | None = None
        self.open: list[_Open] = []

    def build(self, events: Iterable[Event]) -> Node:
        for count, event in enumerate(events):
            at = self.mark(event.start_mark.line, event.start_mark.column)
            if count > MAX_EVENTS:
                raise _Refused(at, f"more than {MAX_EVENTS:,} values; no topology is that large")
            if isinstance(event, DocumentStartEvent):
                self._start_document(event, at)
            elif isinstance(event, NodeEvent):
                self._start_node(event, at)
            elif isinstance(event, MappingEndEvent | SequenceEndEvent):
                self.open.pop()
        return self.root or Node(None, self.mark(0, 0))

    def _start_document(self, event: DocumentStartEvent, at: Mark) -> None:
        if self.root:
            raise _Refused(at, "a second document starts here; a topology file holds one")
        if event.tags or event.version not in (None, (1, 2)):
            raise _Refused(at, "directives are not used here; topologies are plain YAML 1.2")

    def _start_node(self, event: NodeEvent, at: Mark) -> None:
        if event.anchor:
            what = "alias *" if isinstance(event, AliasEvent) else "anchor &"
            message = f"{what}{came(event.anchor)[1:-1]}: refused; write the value out, or share it through `extends`"
            self.problems.add(at, self._path(), message)
        if isinstance(event, AliasEvent):
            self._place(Node(None, at))
        elif isinstance(event, ScalarEvent):
            self._tag(event.tag, at)
            self._scalar(event, at)
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            self._tag(event.tag, at)
            if len(self.open) >= MAX_DEPTH:
                raise _Refused(at, f"nested deeper than {MAX_DEPTH} levels")
            node = Node({} if isinstance(event, MappingStartEvent) else [], at)
            step = self.open[-1].here() if self.open else ""
            self._place(node)
            self.open.append(_Open(node, step))

    def _tag(self, tag: object, at: Mark) -> None:
        if tag:
            self.problems.add(at, self._path(), f"tag {came(str(tag))}: refused; a topology is plain data")

    def _scalar(self, event: ScalarEvent, at: Mark) -> None:
        text = str(event.value)
        if not encodable(text):
            raise _Refused(at, "a lone surrogate is not text")
        parent = self.open[-1] if self.open else None
        if parent and isinstance(parent.node.value, dict) and parent.key is None:
            self._key(parent, text, at)
        elif event.style is None and text in (".nan", ".NaN", ".NAN"):
            self.problems.add(at, self._path(), "got .nan, expected a value that equals itself")
            self._place(Node(None, at))
        else:
            self._place(Node(resolve(text) if event.style is None else text, at))

    def _key(self, parent: _Open, text: str, at: Mark) -> None:
        if len(text) > MAX_KEY:
            raise _Refused(at, f"a key of {len(text):,} characters; at most {MAX_KEY} are read")
        parent.key = (text, at)
        if first := parent.node.children().get(text):
            line = first.key_at.line if first.key_at else 0
            self.problems.add(at, self._path(), f"duplicate key; it stands first on line {line}")

    def _place(self, node: Node) -> None:
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif isinstance(parent.node.value, dict):
            if parent.key is None:
                raise _Refused(node.at, f"got {came(node.plain())} as a key, expected text")
            key, node.key_at = parent.key
            parent.node.value[key], parent.key = node, None

    def _path(self) -> str:
        return dotted([*self.above, *(each.step for each in self.open[1:]), *(each.here() for each in self.open[-1:])])


def dotted(path: Iterable[str | int]) -> str:
    """`("nodes", "actor", "host", 0)` as `nodes.actor.host[0]`, fit for a message."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step if step.isprintable() else ascii(step)[1:-1]}"
    return text.removeprefix(".")


def encodable(text: str) -> bool:
    """Whether `text` can be written as UTF-8 (environment and arguments may hold lone surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# ── tree to text ─────────────────────────────────────────────────────────────────────────────────────────────────

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def emit(data: Mapping[str, Plain]) -> str:
    """`data` as YAML that `parse` reads back to the same: two levels of block style, flow style below."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            lines.append(f"{_flow(key)}:")
            lines += [f"  {_flow(name)}: {_flow(item)}" for name, item in value.items()]
        else:
            lines.append(f"{_flow(key)}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Plain) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, str):
        if _BARE.fullmatch(value) and resolve(value) is value:
            return value
        # JSON's escapes are YAML's, but YAML also folds or refuses these characters
        return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
    return json.dumps(value)
