"""From files, variables and overrides to one tree.

Order: `extends` (the base first, this file over it), then overrides, then `${VAR}`: a variable that somebody
overrides need not be set.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddrl_bus.errors import TopologyError
from ddrl_bus.topology.tree import (
    MAX_BYTES,
    MAX_KEY,
    MAX_LINE,
    Mark,
    Node,
    Problems,
    came,
    dotted,
    encodable,
    parse,
    resolve,
)

_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)(\}?)")
_INSIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:-|:\?)(.*))?", re.DOTALL)
MAX_OVERRIDE_DEPTH = 16
MAX_EXTENDS = 16


def read_tree(
    path: str | os.PathLike[str], overrides: Sequence[str], environ: Mapping[str, str], problems: Problems
) -> Node:
    """The merged, expanded tree.

    Raises:
        TopologyError: a file cannot be read or parsed at all; lesser problems are left in `problems`.
    """
    tree = _read(os.fspath(path), Mark(os.fspath(path)), (), environ, problems)
    if not isinstance(tree.value, dict):
        if tree.value is not None:
            problems.add(tree, "", f"got {came(tree.plain())}, expected a mapping with name, env, algo and nodes")
            raise TopologyError(problems.sorted())
        tree = Node({}, tree.at)
    for text in overrides:
        _override(tree, text, problems)
    return expand(tree, environ, problems)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(file: str, at: Mark, chain: tuple[str, ...], environ: Mapping[str, str], problems: Problems) -> Node:
    """The tree of `file` over what it extends; `at` is where the file is named, `chain` the files that led here."""
    tree = parse(text, file, problems) if (text := _text(file, at, problems)) is not None else None
    if tree is None:
        raise TopologyError(problems.sorted())
    extends = tree.value.pop("extends", None) if isinstance(tree.value, dict) else None
    if extends is None:
        return tree
    base = expand(extends, environ, problems, ("extends",)).value
    chain = (*chain, os.path.realpath(file))
    if not isinstance(base, str) or not base or os.path.isabs(base):
        problems.add(extends, "extends", f"got {came(base)}, expected a path relative to this file")
        return tree
    base = os.path.join(os.path.dirname(file), base)
    if os.path.realpath(base) in chain or len(chain) >= MAX_EXTENDS:
        why = "extends itself" if os.path.realpath(base) in chain else f"more than {MAX_EXTENDS} files"
        problems.add(extends, "extends", f"{came(base)}: {why} ({' → '.join(map(os.path.basename, chain))})")
        return tree
    return merge(_read(base, extends.at, chain, environ, problems), tree)


def _text(file: str, at: Mark, problems: Problems) -> str | None:
    """The file's text, or None with the reason in `problems`."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            problems.add(at, "", f"{came(file)} is not a regular file")
            return None
        with Path(file).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problems.add(at, "", f"cannot read {came(file)}: {getattr(error, 'strerror', None) or error}")
        return None
    if len(data) > MAX_BYTES:
        problems.add(Mark(file), "", f"larger than {MAX_BYTES >> 20} MiB; no topology is that large")
        return None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        mark = Mark(file, data.count(b"\n", 0, error.start) + 1, error.start - line_start + 1)
        problems.add(mark, "", f"not UTF-8: byte 0x{data[error.start]:02x}")
        return None


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings are merged key by key, anything else is replaced."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.at, over.key_at)


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


def _override(tree: Node, text: str, problems: Problems) -> None:
    """Sets `key.path=value` in the tree; an unknown key is found by validation, which then names the override."""
    mark = Mark(f"override {came(text)}")
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) > MAX_OVERRIDE_DEPTH or len(path) > MAX_KEY:
        problems.add(mark, "", "expected key.path=value, such as algo.lr=3e-4")
        return
    if keys[0] == "extends":
        problems.add(mark, "extends", "cannot be overridden; name the other file on the command line")
        return
    if not encodable(text) or len(text) > MAX_LINE:
        problems.add(mark, path if encodable(path) else "", f"expected UTF-8 text of at most {MAX_LINE:,} characters")
        return
    node = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.children().setdefault(key, Node({}, mark, mark))
        if child.value is None:
            child = node.children()[key] = Node({}, mark, mark)
        if not isinstance(child.value, dict):
            problems.add(mark, path, f"{dotted(keys[: depth + 1])} is {came(child.plain())}, not a mapping")
            return
        node = child
    if (new := parse(value, mark.file, problems, override=keys)) is not None:
        new.key_at = mark
        node.children()[keys[-1]] = new


# ── variables ────────────────────────────────────────────────────────────────────────────────────────────────────


def expand(node: Node, environ: Mapping[str, str], problems: Problems, path: tuple[str | int, ...] = ()) -> Node:
    """The tree with `${VAR}`, `${VAR:-default}` and `${VAR:?message}` replaced; `$${` stands for `${`.

    A scalar that is one variable and nothing else is typed anew, so that `port: ${PORT}` is a number. Values are
    scalars always: a variable cannot bring in keys, lists or further variables.
    """
    if isinstance(node.value, dict):
        children = {key: expand(child, environ, problems, (*path, key)) for key, child in node.value.items()}
        return Node(children, node.at, node.key_at)
    if isinstance(node.value, list):
        items = [expand(child, environ, problems, (*path, i)) for i, child in enumerate(node.value)]
        return Node(items, node.at, node.key_at)
    if not isinstance(node.value, str) or "${" not in node.value:
        return node

    def substitute(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        value, wrong = _lookup(match[1], match[2], environ)
        if wrong:
            problems.add(node, dotted(path), wrong)
        return value

    whole = _VARIABLE.fullmatch(node.value)
    text = _VARIABLE.sub(substitute, node.value)
    return Node(resolve(text) if whole and whole[0] != "$${" else text, node.at, node.key_at)


def _lookup(inside: str, closed: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Value of the variable, and what is wrong with it if anything is."""
    match = _INSIDE.fullmatch(inside)
    if not match or not closed:
        return "", f"got {came('${' + inside + closed)}, expected ${{VAR}}, ${{VAR:-default}} or ${{VAR:?message}}"
    name, operator, rest = match[1], match[2], match[3] or ""
    value = environ.get(name)
    if operator == ":-":
        value = value or rest
    elif operator == ":?" and not value:
        return "", f"${{{name}}} is not set: {came(rest)[1:-1] or 'it is required here'}"
    if value is None:
        return "", f"${{{name}}} is not set; set it, or give a default: ${{{name}:-...}}"
    if not encodable(value):
        return "", f"${{{name}}} is {came(value)}, expected UTF-8 text"
    return value, ""
