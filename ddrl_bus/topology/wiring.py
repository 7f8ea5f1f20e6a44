"""From the links a file writes, or the algorithm's own, to links between the groups that exist.

`PORTS` says which links there can be, of which kind, and which kinds of node hold their ends; a file picks among them,
names the groups, sets windows and so on. `control` and `progress` are in every topology, `sync` where several learners
train as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ddrl_bus.topology.plan import LinkPlan
from ddrl_bus.topology.schema import (
    PORTS,
    RELAYED,
    SYSTEM_PORTS,
    AlgorithmEntry,
    LinkSettings,
    PortRule,
    Precision,
    one_of,
    validate,
)
from ddrl_bus.topology.tree import Node, Problems, came, dotted

QUEUE_WINDOW = 2  # one unroll under way while the receiver reads the other
QUEUE_ONLY = ("window", "on_loss", "max_lag")
RELAYED_ONLY = ("relay", "precision")
CODECS = {"queue": ("none", "lz4"), "latest": ("none", "delta"), "request": ()}
_UNWRITTEN = LinkSettings.model_validate({})


@dataclass(frozen=True)
class Group:
    """A group as far as links care; `count` is 1 while its options are refused, to judge the links all the same."""

    kind: str
    count: int


@dataclass
class Wiring:
    """Resolves all links of one topology. `default` is the algorithm's own, for a file that writes none; `acting` the
    precision of weights that it allows."""

    default: Mapping[str, LinkSettings]
    acting: Precision
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
        own = written and texts and written.at.line  # overrides alone (line 0) change the algorithm's links
        defaults = {} if own else self.default
        names = [name for name in dict.fromkeys([*defaults, *texts]) if name not in SYSTEM_PORTS]
        if self._replicated and not {"gradients", "sync"} & set(names):
            names.append("sync")
        if "gradients" in names:
            self.acting = "float32"  # a worker hands on the parameters that it computes gradients of
        links = [
            self._link(name, texts.get(name) or Node({}, nodes.at), defaults.get(name) or _UNWRITTEN, nodes)
            for name in [*names, *SYSTEM_PORTS]
        ]
        return {link.name: link for link in links if link}

    @property
    def _replicated(self) -> bool:
        return sum(group.count for group in self.groups.values() if group.kind == "learner") > 1

    def _link(self, name: str, node: Node, default: LinkSettings, nodes: Node) -> LinkPlan | None:
        path = ("links", name)
        rule = SYSTEM_PORTS.get(name) or PORTS.get(name)
        if rule is None:
            self.problems.add(node.key_at or node, dotted(path), f"no such port; {one_of(name, PORTS)}")
            return None
        settings = validate(LinkSettings, node, path, self.problems)
        if settings is None:
            return None
        if settings.kind not in (None, rule.kind):
            message = f"got {came(settings.kind)}, expected {rule.kind}: {name} is {rule}"
            self.problems.add(node.find(["kind"]), dotted((*path, "kind")), message)
        wrong = dict.fromkeys(QUEUE_ONLY if rule.kind != "queue" else (), "a queue")
        wrong |= {"rate": "a queue or a latest"} if rule.kind == "request" else {}
        wrong |= dict.fromkeys(() if rule.relayed else RELAYED_ONLY, " or ".join(RELAYED))
        for key, owner in wrong.items():
            if getattr(settings, key) is not None:
                at = node.find([key])
                self.problems.add(at.key_at or at, dotted((*path, key)), f"only {owner} has it; {name} is {rule}")
        if settings.codec is not None and settings.codec not in (codecs := CODECS[rule.kind]):
            expected = " or ".join(codecs) or "no codec"
            message = f"got {came(settings.codec)}, expected {expected}: {name} is {rule}"
            self.problems.add(node.find(["codec"]), dotted((*path, "codec")), message)
        sources = self._ends(_End(name, "from", rule, rule.sources), settings.sources, default.sources, node, nodes)
        targets = self._ends(_End(name, "to", rule, rule.targets), settings.targets, default.targets, node, nodes)
        window = settings.window or default.window or (QUEUE_WINDOW if rule.kind == "queue" else 1)
        insecure = next(v for v in (settings.insecure, default.insecure, self.insecure) if v is not None)
        return LinkPlan(
            name,
            rule.kind,
            sources,
            targets,
            window,
            settings.on_loss or default.on_loss or "count",
            default.max_lag if settings.max_lag is None else settings.max_lag,
            insecure,
            settings.codec or default.codec or "auto",
            settings.rate or default.rate,
            rule.relayed and settings.relay is not False,
            settings.precision or (self.acting if rule.relayed else "float32"),
        )

    def _ends(
        self, end: _End, names: tuple[str, ...] | None, default: tuple[str, ...] | None, node: Node, nodes: Node
    ) -> tuple[str, ...]:
        """The groups at one end, in the topology's order; () if that cannot be said."""
        if not self.complete:
            return ()
        kinds = default or end.kinds
        found = self._named(end, names, node) if names else [n for n, g in self.groups.items() if g.kind in kinds]
        if found is None:
            return ()
        kinds = tuple(dict.fromkeys(self.groups[name].kind for name in found)) or kinds
        groups = tuple(name for name, group in self.groups.items() if name in found and group.count)
        if not groups and not (end.link in SYSTEM_PORTS and kinds == ("controller",)):  # reported as missing itself
            what = "sender" if end.side == "from" else "receiver"
            message = f"{end.link} has no {what}: no group of kind {' or '.join(kinds)} has a node; add one under nodes"
            self.problems.add(node.find([end.side]) if node.key_at else nodes, dotted(end.path), message)
        return groups

    def _named(self, end: _End, names: tuple[str, ...], node: Node) -> list[str] | None:
        """The groups that `names` (groups or kinds) stand for; None if some stand for none, or none that fits."""
        found: list[str] = []
        refused = False
        for place, name in enumerate(names):
            groups = [name] if name in self.groups else self._of_kind(name)
            wrong = ""
            if not groups:
                wrong = f"no group {came(name)}; {one_of(name, self.groups)}"
            elif (kind := self.groups[groups[0]].kind) not in end.kinds:
                verb = "send" if end.side == "from" else "receive"
                wrong = f"{came(name)} is of kind {kind}, which does not {verb} {end.link}: it is {end.rule}"
            elif set(groups) & set(found):
                wrong = f"{came(name)} stands here twice"
            if wrong:
                self.problems.add(node.find((end.side, place)), dotted(end.path), wrong)
                refused = True
            found += groups
        if refused:
            return None
        kinds = end.kinds if end.link in SYSTEM_PORTS else {self.groups[name].kind for name in found}
        for name, group in self.groups.items():
            if group.kind in kinds and group.count and name not in found:
                message = f"{name} is left out, but every {group.kind} holds an end of {end.link}"
                fix = f"name it here, or set nodes.{name}.count: 0"
                self.problems.add(node.find([end.side]), dotted(end.path), f"{message}: {fix}")
        return found

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name, group in self.groups.items() if group.kind == kind]


@dataclass(frozen=True)
class _End:
    """One side of a link, as problems name it."""

    link: str
    side: Literal["from", "to"]
    rule: PortRule
    kinds: tuple[str, ...]  # that may stand here

    @property
    def path(self) -> tuple[str, ...]:
        return ("links", self.link, self.side)


def default_links(entry: AlgorithmEntry) -> dict[str, LinkSettings]:
    """The algorithm's own wiring."""
    return {
        name: LinkSettings.model_validate_json(json.dumps(dict(port), default=list))
        for name, port in entry.wiring.items()
    }
