"""Who may speak to a node over a network: its rights follow from the plan, which every host computes for itself.

key ─→ host            the allow-list of this machine
host ─→ its nodes      `host:` of the topology
node ─→ links          the ports that it holds

A node that is added to a run bears its host's name, so that the same holds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ddrl_bus import keys
from ddrl_bus.topology.exposure import leaves
from ddrl_bus.topology.plan import LinkPlan, Plan
from ddrl_bus.transport.base import back_channel, scheme
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.security import Access, Guard, Peer


def guard(plan: Plan, name: str, ledger: Ledger) -> Guard:
    """Of one node.

    Raises:
        SecurityError: it needs a key that is not here, or the files that hold keys are open to others.
    """
    access = access_of(plan, name)
    pair = keys.own(plan.node(name).host) if access.binds or access.servers else None
    return Guard(name, access, pair, keys.AllowList(), ledger)


def access_of(plan: Plan, name: str) -> Access:
    plain, binds, servers, guests = set[str](), set[str](), dict[str, Peer](), dict[str, dict[str, Peer]]()
    people: dict[str, frozenset[str]] = {}
    added = dict[str, Mapping[str, str]]()  # link -> group -> kind
    for link, port in plan.ports(name).items():
        for address in (found for bind in port.binds for found in _tcp(port.link, bind)):
            if _is_guarded(port.link, address):
                binds.add(address)
                guests[link] = {peer.name: Peer(peer.host, peer.kind) for peer in plan.guests(name, link)}
                added[link] = {group: plan.groups[group].kind for group in plan.open_groups(link)}
                if link == "progress":  # for the topology, and for how the run goes
                    hosts = {peer.host for peer in guests[link].values()}
                    people[link] = frozenset(hosts | set(plan.hosts if added[link] else ()))
            else:
                plain.add(address)
        for peer_name, dialled in port.peers.items():
            peer = plan.nodes[peer_name]
            for address in _tcp(port.link, dialled):
                if _is_guarded(port.link, address):
                    servers[address] = Peer(peer.host, peer.kind)
                else:
                    plain.add(address)
    return Access(frozenset(plain), frozenset(binds), servers, guests, people, frozenset(plan.hosts), added)


def _tcp(link: LinkPlan, address: str) -> Iterator[str]:
    """The tcp addresses that an end of a link uses, credits included."""
    if scheme(address) == "tcp":
        yield address
        if link.kind == "queue":
            yield back_channel(address)


def _is_guarded(link: LinkPlan, address: str) -> bool:
    return not link.insecure and leaves(address)
