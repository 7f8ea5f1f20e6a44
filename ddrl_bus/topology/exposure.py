"""What of a plan leaves its machine, and with whom that is."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

from ddrl_bus.topology.plan import Bind, LinkPlan, NodePlan, Plan


def is_loopback(address: str) -> bool:
    """Whether an address as `split_address` gives it stays on its machine; a DNS name is not trusted to."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def leaves(address: str) -> bool:
    """Whether what is sent to an address of a plan leaves its machine."""
    scheme, _, where = address.partition("://")
    return scheme == "tcp" and not is_loopback(where.rpartition(":")[0])


def exposed(plan: Plan) -> Iterator[tuple[NodePlan, LinkPlan, Bind]]:
    """What is bound for other machines."""
    for (name, link), bind in plan.binds.items():
        if bind.far and leaves(bind.far):
            yield plan.nodes[name], plan.links[link], bind


def head_address(plan: Plan) -> str | None:
    """Where other hosts ask the controller; `tcp://HEAD@HOST:PORT` where only keys open, HEAD being who must answer."""
    address = plan.join_address
    if address is None or plan.links["progress"].insecure or not leaves(address):
        return address
    return address.replace("://", f"://{plan.controller.host}@")


def insecure_links(plan: Plan, name: str) -> list[str]:
    """The links on which this node sends or receives across machines in plain text."""
    return [
        link
        for link, port in plan.ports(name).items()
        if port.link.insecure and any(leaves(address) for address in (*port.binds, *port.peers.values()))
    ]


def unlisted(plan: Plan, name: str) -> list[str]:
    """The encrypted links of a node that was added on a host without rights there: it is not of `hosts`.

    Raises:
        UsageError: it reaches nobody from there.
    """
    ports = plan.ports(name)
    if plan.node(name).host in plan.hosts:
        return []
    return [link for link, port in ports.items() if not port.link.insecure and any(map(leaves, port.peers.values()))]


def needs_key(plan: Plan, host: str) -> bool:
    """Whether nodes of a host bind or dial what only keys open."""
    return host in guarded(plan)


def met(plan: Plan, host: str) -> set[str]:
    """The hosts with which a host needs keys, itself included."""
    pairs = [
        {node.host, guest.host}
        for node, link, _ in exposed(plan)
        if not link.insecure
        for guest in plan.guests(node.name, link.name)
    ]
    return set[str]().union(*(pair for pair in pairs if host in pair))


def guarded(plan: Plan) -> Mapping[str, dict[str, set[str]]]:
    """Host → link that leaves the machine and is not insecure → the kinds of node of that host at its ends."""
    hosts: dict[str, dict[str, set[str]]] = {}
    for node, link, _ in exposed(plan):
        if not link.insecure:
            for end in (node, *plan.guests(node.name, link.name)):
                hosts.setdefault(end.host, {}).setdefault(link.name, set()).add(end.kind)
    return hosts
