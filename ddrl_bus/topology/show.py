"""A plan as text and as a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ddrl_bus.topology.plan import LinkPlan, NodePlan, Plan
from ddrl_bus.topology.schema import BYTES, RELAYED, SYSTEM_PORTS, NodeOptions


def text(plan: Plan) -> str:
    """Nodes per host, then every link with its ends and the addresses that are bound."""
    lines = [
        f"{plan.name}  run {plan.run_id}  algorithm {plan.algo_name}  env {plan.env.id}  seed {plan.seed}",
        "",
    ]
    for host, address in plan.hosts.items():
        lines.append(f"host {host} ({address})")
        lines += [f"  {node.name:<16} {node.kind:<11} {_options(plan, node)}".rstrip() for node in plan.on_host(host)]
    lines += ["", "links"]
    for link in plan.links.values():
        lines.append(f"  {link.name:<16} {_arrow(link)}  {terms(link)}")
        binders = plan.members(link.sources if link.binding_side == "out" else link.targets)
        relays = (relay for (_, name), relay in plan.relays.items() if name == link.name)
        for node in (*binders, *relays):
            bind = plan.binds[node.name, link.name]
            lines += [f"    {node.name} binds {address}" for address in bind.addresses]
    return "\n".join(lines) + "\n"


USED_WITH = {"groups": "act", "prefetch": "samples", "deadline": "sync"}
"""Option → the port without which it means nothing."""


def _options(plan: Plan, node: NodePlan) -> str:
    unused = {option for option, port in USED_WITH.items() if port not in plan.ports(node.name)}
    own = node.options.model_dump(exclude_none=True, exclude=unused | NodeOptions.model_fields.keys())
    own |= {"process": node.process} if node.bundle else {}
    return "  ".join(f"{key}={value}" for key, value in own.items())


def _arrow(link: LinkPlan) -> str:
    return f"{', '.join(link.sources)} → {', '.join(link.targets)}"


def terms(link: LinkPlan) -> str:
    """`queue, window 2, on_loss count, rate 10MiB/s`"""
    said: list[str] = [link.kind]
    if link.kind == "queue":
        said += [f"window {link.window}", f"on_loss {link.on_loss}"]
        said += [] if link.max_lag is None else [f"max_lag {link.max_lag}"]
    said += [] if link.codec == "auto" else [f"codec {link.codec}"]
    said += [] if link.rate is None else [f"rate {size(link.rate)}/s"]
    said += [link.precision] if link.name in RELAYED else []
    return ", ".join(said + (["insecure"] if link.insecure else []))


def size(nbytes: float) -> str:
    """`1.5MiB`, in the largest unit that leaves at least 1."""
    unit, factor = max(((u, f) for u, f in BYTES.items() if f <= max(nbytes, 1)), key=lambda pair: pair[1])
    return f"{nbytes / factor:.4g}{unit}"


Box = tuple[str, str | None, str]
"""Host, bundle and group: nodes that are drawn as one."""


def mermaid(plan: Plan) -> str:
    """A Mermaid flowchart: a box per host, in it one per bundle, a node per group, an arrow per link between groups.

    `progress` and `control` touch every node and would hide the rest: they are left out.
    """
    boxes = Counter((node.host, node.bundle, node.group) for node in plan.nodes.values())
    ids = {box: f"n{number}" for number, box in enumerate(boxes)}
    lines = ["flowchart LR"]
    for number, (host, address) in enumerate(plan.hosts.items()):
        lines.append(f'  subgraph h{number}["{host} ({address})"]')
        here = {box: count for box, count in boxes.items() if box[0] == host}
        for bundle in dict.fromkeys(bundle for _, bundle, _ in here):
            inside = {box: count for box, count in here.items() if box[1] == bundle}
            if bundle is None:
                lines += [f'    {ids[box]}["{_times(box[2], count)}"]' for box, count in inside.items()]
            else:
                lines.append(f'    subgraph h{number}_{bundle}["{_times(bundle, max(inside.values()))}"]')
                lines += [f'      {ids[box]}["{box[2]}"]' for box in inside]
                lines.append("    end")
        lines.append("  end")
    lines += _arrows(plan, ids)
    return "\n".join(lines) + "\n"


def _times(name: str, count: int) -> str:
    return f"{name} × {count}" if count > 1 else name


def _arrows(plan: Plan, ids: Mapping[Box, str]) -> Iterator[str]:
    for link in plan.links.values():
        if link.name in SYSTEM_PORTS:
            continue
        label = f"{link.name}: {link.kind}" + (f", window {link.window}" if link.kind == "queue" else "")
        relays = {host: (host, None, relay.group) for (host, name), relay in plan.relays.items() if name == link.name}
        arrows = [
            (source, target)
            for source in (box for box in ids if box[2] in link.sources)
            for target in (box for box in ids if box[2] in link.targets)
            # members of one bundle that meet are on one host
            if not (source[1] is not None and source[1] == target[1] and source[0] != target[0])
        ]
        for source, target in dict.fromkeys(pair for arrow in arrows for pair in _by_relay(arrow, relays)):
            yield f'  {ids[source]} -- "{label}" --> {ids[target]}'


def _by_relay(arrow: tuple[Box, Box], relays: Mapping[str, Box]) -> Iterator[tuple[Box, Box]]:
    """An arrow, or those to and from the relay of the host that it leads to."""
    source, target = arrow
    relay = relays.get(target[0]) if source[0] != target[0] else None
    yield from [arrow] if relay is None else [(source, relay), (relay, target)]
