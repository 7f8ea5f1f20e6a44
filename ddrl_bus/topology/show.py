"""A plan as text and as a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ddrl_bus.topology.plan import LinkPlan, Plan
from ddrl_bus.topology.schema import NodeOptions


def text(plan: Plan) -> str:
    """Nodes per host, then every link with its ends and the addresses that are bound."""
    lines = [
        f"{plan.name}  run {plan.run_id}  algorithm {plan.algo_name}  env {plan.env.id}  seed {plan.seed}",
        "",
    ]
    for host, address in plan.hosts.items():
        lines.append(f"host {host} ({address})")
        lines += [f"  {node.name:<16} {node.kind:<11} {_options(node.options)}".rstrip() for node in plan.on_host(host)]
    lines += ["", "links"]
    for link in plan.links.values():
        lines.append(f"  {link.name:<16} {_arrow(link)}  {_terms(link)}")
        for node in plan.members(link.sources if link.binding_side == "out" else link.targets):
            bind = plan.binds[node.name, link.name]
            lines += [f"    {node.name} binds {address}" for address in bind.addresses]
    return "\n".join(lines) + "\n"


def _options(options: NodeOptions) -> str:
    own = options.model_dump(exclude_none=True, exclude=set(NodeOptions.model_fields))
    return "  ".join(f"{key}={value}" for key, value in own.items())


def _arrow(link: LinkPlan) -> str:
    return f"{', '.join(link.sources)} → {', '.join(link.targets)}"


def _terms(link: LinkPlan) -> str:
    terms: list[str] = [link.kind]
    if link.kind == "queue":
        terms += [f"window {link.window}", f"on_loss {link.on_loss}"]
        terms += [] if link.max_lag is None else [f"max_lag {link.max_lag}"]
    return ", ".join(terms + (["insecure"] if link.insecure else []))


def mermaid(plan: Plan) -> str:
    """A Mermaid flowchart: a box per host, a node per group in it, an arrow per link between groups.

    `progress` and `control` touch every node and would hide the rest: they are left out.
    """
    boxes = Counter((node.host, node.group) for node in plan.nodes.values())
    ids = {box: f"n{number}" for number, box in enumerate(boxes)}
    lines = ["flowchart LR"]
    for number, (host, address) in enumerate(plan.hosts.items()):
        lines.append(f'  subgraph h{number}["{host} ({address})"]')
        inside = ((box, count) for box, count in boxes.items() if box[0] == host)
        lines += [f'    {ids[box]}["{box[1]}{f" × {count}" if count > 1 else ""}"]' for box, count in inside]
        lines.append("  end")
    lines += _arrows(plan, ids)
    return "\n".join(lines) + "\n"


def _arrows(plan: Plan, ids: dict[tuple[str, str], str]) -> Iterator[str]:
    for link in plan.links.values():
        if link.name in ("progress", "control"):
            continue
        label = f"{link.name}: {link.kind}" + (f", window {link.window}" if link.kind == "queue" else "")
        for source in (box for box in ids if box[1] in link.sources):
            for target in (box for box in ids if box[1] in link.targets):
                yield f'  {ids[source]} -- "{label}" --> {ids[target]}'
