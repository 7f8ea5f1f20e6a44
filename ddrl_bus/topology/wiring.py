"""From the links a file writes, or the algorithm's own, to links between the groups that exist.

The algorithm says which ports there are, of which kind, and which kinds of node hold their ends; a file may name
the groups, set windows and so on, never invent a port. `control` and `progress` are in every topology.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ddrl_bus.topology.plan import LinkPlan
from ddrl_bus.topology.schema import KINDS, AlgorithmEntry, LinkSettings, one_of, validate
from ddrl_bus.topology.tree import Mark, Node, Problems, came, dotted

QUEUE_WINDOW = 2  # one unroll under way while the receiver reads the other

_OTHERS = [kind for kind in KINDS if kind != "controller"]
SYSTEM: Mapping[str, Mapping[str, object]] = {
    "control": {"kind": "latest", "from": "controller", "to": _OTHERS},
    "progress": {"kind": "request", "from": _OTHERS, "to": "controller"},
}


@dataclass(frozen=True)
class Group:
    """A group as far as links care; `count` is 1 while its options are refused, to judge the links all the same."""

    kind: str
    count: int


@dataclass
class Wiring:
    """Resolves all links of one topology."""

    algorithm: str
    ports: Mapping[str, LinkSettings]
    groups: Mapping[str, Group]
    insecure: bool
    complete: bool  # False: some groups are refused, so nothing can be said about who is missing
    problems: Problems

    def resolve(self, written: Node | None, nodes: Node) -> dict[str, LinkPlan]:
        """Link name -> link. `written` is the `links:` section; `nodes` is where a missing group is reported."""
        if written is not None and not isinstance(written.value, dict | None):
            self.problems.add(written, "links", f"got {came(written.plain())}, expected a mapping of links")
            return {}
        texts = written.children() if written else {}
        if written and texts and written.at.line:  # overrides alone (line 0) change the algorithm's links
            for name in (name for name in self.ports if name not in texts and name not in SYSTEM):
                self.problems.add(written, dotted(("links", name)), f"missing; expected {self._figure(name)}")
        names = dict.fromkeys([*(name for name in [*self.ports, *texts] if name not in SYSTEM), *SYSTEM])
        links = (self._link(name, texts.get(name) or Node({}, nodes.at), nodes) for name in names)
        return {link.name: link for link in links if link}

    def _link(self, name: str, node: Node, nodes: Node) -> LinkPlan | None:
        path = ("links", name)
        port = self.ports.get(name)
        if port is None or port.kind is None:
            ports = "; ".join(f"{each} is {self._figure(each)}" for each in self.ports if each not in SYSTEM)
            hint = one_of(name, self.ports).partition("; ")[2]
            message = f"{self.algorithm} has no such port: {ports}" + (f"; {hint}" if hint else "")
            self.problems.add(node.key_at or node, dotted(path), message)
            return None
        settings = validate(LinkSettings, node, path, self.problems)
        if settings is None:
            return None
        if settings.kind not in (None, port.kind):
            message = f"got {came(settings.kind)}, expected {port.kind}: {name} is {self._figure(name)}"
            self.problems.add(node.find(["kind"]), dotted((*path, "kind")), message)
        if port.kind != "queue":
            for key in ("window", "on_loss", "max_lag"):
                if getattr(settings, key) is not None:
                    message = f"only a queue has it; {name} is {self._figure(name)}"
                    at = node.find([key])
                    self.problems.add(at.key_at or at, dotted((*path, key)), message)
        sources = self._ends(node, path, "from", settings.sources, port.sources or ())
        targets = self._ends(node, path, "to", settings.targets, port.targets or ())
        for end, groups in (("from", sources), ("to", targets)):
            if groups == ():
                self._nobody(name, end, node, nodes)
        window = settings.window or port.window or (QUEUE_WINDOW if port.kind == "queue" else 1)
        insecure = next(v for v in (settings.insecure, port.insecure, self.insecure) if v is not None)
        return LinkPlan(
            name,
            port.kind,
            sources or (),
            targets or (),
            window,
            settings.on_loss or port.on_loss or "count",
            port.max_lag if settings.max_lag is None else settings.max_lag,
            insecure,
        )

    def _ends(
        self, node: Node, path: tuple[str, ...], end: str, names: tuple[str, ...] | None, kinds: tuple[str, ...]
    ) -> tuple[str, ...] | None:
        """The groups at one end, in the topology's order; None if that cannot be said."""
        if not self.complete:
            return None
        holders = [name for name, group in self.groups.items() if group.kind in kinds and group.count]
        if names is None:
            return tuple(holders)
        found: list[str] = []
        refused = False
        for place, name in enumerate(names):
            at = node.find((end, place))
            where = dotted((*path, end))
            groups = [name] if name in self.groups else self._of_kind(name)
            wrong = ""
            if not groups:
                wrong = f"no group {came(name)}; {one_of(name, self.groups)}"
            elif self.groups[groups[0]].kind not in kinds:
                verb = "send" if end == "from" else "receive"
                kind = self.groups[groups[0]].kind
                wrong = (
                    f"{came(name)} is of kind {kind}, which does not {verb} {path[1]}: it is {self._figure(path[1])}"
                )
            elif set(groups) & set(found):
                wrong = f"{came(name)} stands here twice"
            if wrong:
                self.problems.add(at, where, wrong)
                refused = True
            found += groups
        if refused:
            return None
        if left_out := [name for name in holders if name not in found]:
            at = node.find([end])
            message = f"{left_out[0]} is left out, but every {self.groups[left_out[0]].kind} holds an end of {path[1]}"
            fix = f"name it here, or set nodes.{left_out[0]}.count: 0"
            self.problems.add(at, dotted((*path, end)), f"{message}: {fix}")
        return tuple(name for name in holders if name in found)

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name, group in self.groups.items() if group.kind == kind]

    def _nobody(self, name: str, end: str, node: Node, nodes: Node) -> None:
        port = self.ports[name]
        kinds = " or ".join((port.sources if end == "from" else port.targets) or ())
        what = "sender" if end == "from" else "receiver"
        at = node.find([end]) if node.key_at else nodes
        if name in SYSTEM and kinds == "controller":
            return  # reported as a missing controller
        message = f"{name} has no {what}: no group of kind {kinds} has a node; add one under nodes"
        self.problems.add(at, dotted(("links", name, end)), message)

    def _figure(self, name: str) -> str:
        """`queue, actor → learner`"""
        port = self.ports[name]
        return f"{port.kind}, {', '.join(port.sources or ())} → {', '.join(port.targets or ())}"


def ports_of(algorithm: str, entry: AlgorithmEntry, at: Node | Mark, problems: Problems) -> dict[str, LinkSettings]:
    """The algorithm's ports and the system's. A port that no node can hold (yet) is a problem of `algo.name`."""
    ports = {
        name: LinkSettings.model_validate_json(json.dumps(dict(port), default=list))
        for name, port in {**entry.wiring, **SYSTEM}.items()
    }
    for name, port in ports.items():
        ends = (("send", port.sources), ("receive", port.targets))
        for verb, kind in ((verb, kind) for verb, kinds in ends for kind in kinds or ()):
            if name not in SYSTEM and not _holds(kind, name, verb):
                message = f"{algorithm} needs nodes of kind {kind} that {verb} {name}; there are none"
                problems.add(at, "algo.name", message)
    return ports


def _holds(kind: str, port: str, verb: str) -> bool:
    known = KINDS.get(kind)
    return known is not None and port in (known.sends if verb == "send" else known.receives)
