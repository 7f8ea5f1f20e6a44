"""Relays, which a file does not write: the expansion places them where they save copies of weights.

learner ─ tcp ─→ relay ─ ipc ─→ each subscriber of that host
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ddrl_bus.topology.plan import LinkPlan, Plan
from ddrl_bus.topology.schema import SYSTEM_PORTS, NodeOptions, RelayOptions

GROUP = "relay"


def placed(plan: Plan) -> Plan:
    """The plan with one relay on each host that needs any, in place of those that it has."""
    others = {name: options for name, options in plan.groups.items() if options.kind != GROUP}
    plan = dataclasses.replace(plan, groups=others, links=_without(plan.links, others))
    hosts = tuple(dict.fromkeys(host for link in plan.links.values() for host in plan.relayed_to(link)))
    if not hosts:
        return plan
    groups = {**others, GROUP: RelayOptions(count=len(hosts), host=hosts)}
    return dataclasses.replace(plan, groups=groups, links={n: _watched(link) for n, link in plan.links.items()})


def _without(links: Mapping[str, LinkPlan], groups: Mapping[str, NodeOptions]) -> dict[str, LinkPlan]:
    def kept(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name in groups)

    return {
        name: dataclasses.replace(link, sources=kept(link.sources), targets=kept(link.targets))
        for name, link in links.items()
    }


def _watched(link: LinkPlan) -> LinkPlan:
    """A relay stands at the ends of the system's links, as all do; on the others it is on the way."""
    rule = SYSTEM_PORTS.get(link.name)
    return dataclasses.replace(
        link,
        sources=(*link.sources, *([GROUP] if rule and GROUP in rule.sources else [])),
        targets=(*link.targets, *([GROUP] if rule and GROUP in rule.targets else [])),
    )
