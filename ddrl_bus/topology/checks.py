"""What must hold between sections: a plan that passes can start, and can fill its first batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddrl_bus.errors import EnvError
from ddrl_bus.rate_limiter import least_slack
from ddrl_bus.topology.exposure import guarded
from ddrl_bus.topology.plan import TCP_PORTS, LinkPlan, Plan, bundle_of, most_columns
from ddrl_bus.topology.schema import (
    MAX_NODES,
    ActorOptions,
    AlgorithmEntry,
    Catalog,
    NodeOptions,
    ReplayOptions,
    one_of,
)
from ddrl_bus.topology.tree import Node, Problems, came, dotted

MAX_IPC_PATH = 106  # bytes: sun_path holds 108 with its NUL, and libzmq keeps one
CREDITS_SUFFIX = ".c"  # a queue's second endpoint

# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_groups(groups: Mapping[str, NodeOptions], hosts: Mapping[str, str], nodes: Node, problems: Problems) -> None:
    """Counts, hosts and bundles."""
    if (total := sum(options.count for options in groups.values())) > MAX_NODES:
        problems.add(nodes, "nodes", f"{total:,} nodes, expected at most {MAX_NODES:,}")
    controllers = [name for name, options in groups.items() if options.kind == "controller"]
    if (count := sum(groups[name].count for name in controllers)) != 1 and controllers:
        at, path = _option(nodes, controllers[-1 if count else 0], "count")
        got = f"{count} nodes of kind controller" if count else "got 0"
        problems.add(at, path, f"{got}, expected 1: a run has one controller")
    for group, options in groups.items():
        for place, host in enumerate(options.host or ()):
            if host not in hosts:
                at, path = nodes.find((group, "host", place)), dotted(("nodes", group, "host"))
                problems.add(at, path, f"no host {came(host)}; {one_of(host, hosts)}")
    default = next(iter(hosts))
    for bundle in dict.fromkeys(options.bundle for options in groups.values() if options.bundle):
        members = {name: options for name, options in groups.items() if options.bundle == bundle}
        for group in members:
            if wrong := _unfit(bundle, group, members, groups, default):
                at, path = _option(nodes, group, "bundle")
                problems.add(at, path, wrong)


def _unfit(
    bundle: str,
    group: str,
    members: Mapping[str, NodeOptions],
    groups: Mapping[str, NodeOptions],
    default_host: str,
) -> str | None:
    """Why a group cannot share processes with the other groups of its bundle; None if it can."""
    first, options = next(iter(members)), members[group]
    if options.kind == "controller":
        return "a controller runs in a process of its own; leave it out"
    if bundle in groups:
        return f"got {came(bundle)}, but a group has that name, and its nodes the names of such processes"
    twin = next(name for name, other in members.items() if other.kind == options.kind)
    if twin != group:
        return f"{twin} and {group} are both of kind {options.kind}; a bundle holds one group of a kind"
    count = members[first].count
    if count != options.count:
        return f"{group} has {options.count} nodes and {first} has {count}; a bundle needs equal counts"
    if (options.host or (default_host,)) != (members[first].host or (default_host,)):
        return f"{group} and {first} are on different hosts; a bundle needs the same `host` for all its groups"
    return None


def _option(nodes: Node, group: str, key: str) -> tuple[Node, str]:
    return nodes.find((group, key)), dotted(("nodes", group, key))


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_batches(
    algo: object, groups: Mapping[str, NodeOptions], link: LinkPlan | None, root: Node, problems: Problems
) -> None:
    """Whether the learner's batch of `algo.batch` columns can fill before every actor waits for credit."""
    batch = getattr(algo, "batch", None)
    if link and any(groups[name].kind == "replay" for name in link.targets):
        return
    actors = [groups[name] for name in link.sources if name in groups] if link else []
    senders = [options for options in actors if isinstance(options, ActorOptions)]
    if not isinstance(batch, int) or link is None or not senders or len(senders) != len(actors):
        return
    bundle = bundle_of(link, groups)  # then a learner hears the actors of its own process only
    counts = [(1 if bundle else options.count, options.envs) for options in senders]
    columns = sum(count * envs for count, envs in counts)
    sum_text = " + ".join(f"{count} × {envs}" for count, envs in counts) + (f" in each {bundle}" if bundle else "")
    if link.max_lag == 0:
        _check_lock_step(batch, columns, sum_text, link, root, problems)
    elif columns * link.window < batch:
        most = columns * link.window
        problems.add(
            root.find(("algo", "batch")),
            "algo.batch",
            f"can never fill: {batch} columns are needed, but the actors wait after {most} "
            f"(actors × envs × window: ({sum_text}) × {link.window}); set algo.batch to {most} or less, "
            f"or raise nodes.*.envs, nodes.*.count or links.{link.name}.window",
        )


def _check_lock_step(batch: int, columns: int, sum_text: str, link: LinkPlan, root: Node, problems: Problems) -> None:
    """max_lag 0: every actor waits for the version made from its last unroll, so one round is one batch."""
    path = ("links", link.name)
    if link.window != 1:
        message = f"got {link.window}, expected 1: with max_lag 0 an actor has one unroll under way"
        problems.add(root.find((*path, "window")), dotted((*path, "window")), message)
    if batch != columns:
        why = "it can never fill" if batch > columns else "rounds would mix"
        problems.add(
            root.find(("algo", "batch")),
            "algo.batch",
            f"got {batch}, expected {columns} (actors × envs: {sum_text}): with max_lag 0 one round of all actors "
            f"is one batch, else {why}; set algo.batch to {columns}, or leave links.{link.name}.max_lag out",
        )


# ── replays ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_replays(
    algo: Any,
    entry: AlgorithmEntry,
    groups: Mapping[str, NodeOptions],
    links: Mapping[str, LinkPlan],
    root: Node,
    problems: Problems,
) -> None:
    """Whether each replay node takes unrolls in, and whether its rate limit ever lets go of both sides."""
    windows = entry.windows(algo)
    for group, options in groups.items():
        if isinstance(options, ReplayOptions) and options.count and windows is not None:
            items = windows.starts * most_columns(groups, links)
            for key, wrong in _unfit_replay(options, items, algo.batch).items():
                problems.add(root.find(("nodes", group, key)), dotted(("nodes", group, key)), wrong)


def _unfit_replay(options: ReplayOptions, items: int, batch: int) -> dict[str, str]:
    """Option → what is wrong with it, where the largest unroll brings so many items."""
    wrong = {}
    if options.capacity < items:
        wrong["capacity"] = f"got {options.capacity:,}, expected at least {items:,}: an unroll brings so many items"
    elif options.min_size > options.capacity:
        most = f"expected at most {options.capacity:,}, its capacity"
        wrong["min_size"] = f"got {options.min_size:,}, {most}: it would never hold so many"
    if options.slack is not None and options.samples_per_insert is None:
        wrong["slack"] = f"got {options.slack:g}, but without samples_per_insert nobody waits; leave it out"
    elif options.slack is not None and options.samples_per_insert is not None:
        least = least_slack(options.samples_per_insert, items, batch)
        if options.slack < least:
            wrong["slack"] = (
                f"got {options.slack:g}, expected at least {least:g}, or both sides would wait for ever: {items:,} "
                f"items come at once, each to be drawn {options.samples_per_insert:g} times, and {batch:,} are drawn "
                "at once"
            )
    return wrong


def check_stop(groups: Iterable[NodeOptions], stops_by_reward: bool, root: Node, problems: Problems) -> None:
    """A reward to stop at needs somebody to measure it."""
    if stops_by_reward and not any(options.kind == "evaluator" and options.count for options in groups):
        message = "needs an evaluator to measure it; leave it out, or let nodes.evaluator have a count of 1"
        problems.add(root.find(("stop", "reward")), "stop.reward", message)


def check_in_process(plan: Plan, root: Node, problems: Problems) -> None:
    """In one process all nodes compute on one thread."""
    learners = [name for name, options in plan.groups.items() if options.kind == "learner" and options.count]
    count = sum(plan.groups[name].count for name in learners)
    if plan.in_process and "sync" in plan.links and count > 1:
        at, path = root.find(("nodes", learners[-1], "count")), dotted(("nodes", learners[-1], "count"))
        why = "replicas wait for one another in each update, and in one process nobody would come"
        problems.add(at, path, f"{count} nodes of kind learner, expected 1: {why}; run without --in-process")


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_addresses(plan: Plan, root: Node, problems: Problems) -> None:
    """Ports in range and bound once; ipc paths short enough."""
    taken: dict[tuple[str, int], str] = {}
    for (name, link_name), bind in plan.binds.items():
        host = plan.nodes[name].host
        at, path = root.find(("hosts", host)), dotted(("hosts", host))
        for port in range(bind.port, bind.port + TCP_PORTS[plan.links[link_name].kind]) if bind.far else ():
            user = f"{name}.{link_name} on {host}"
            first = taken.setdefault((bind.address, port), user)
            if port > 65535:
                problems.add(at, path, f"{user} would get tcp port {port}, expected at most 65535: lower `port`")
            elif first != user:
                message = f"{bind.address}:{port} is taken twice, by {first} and by {user}; give this host"
                problems.add(at, path, f"{message} a first port of its own: {bind.address}:{plan.port + 100}")
        for address in bind.addresses:
            _check_ipc(address, root, problems)


def _check_ipc(address: str, root: Node, problems: Problems) -> None:
    path = address.removeprefix("ipc://") + CREDITS_SUFFIX if address.startswith("ipc:") else ""
    if (size := len(path.encode(errors="surrogateescape"))) > MAX_IPC_PATH:
        message = f"ipc path of {size} bytes, expected at most {MAX_IPC_PATH}: {came(path)}; set TMPDIR to a shorter"
        problems.add(root, "", f"{message} directory, or shorten the run id and the names of groups")


def check_security(plan: Plan, catalog: Catalog, root: Node, problems: Problems) -> None:
    """Links that would leave their machine in the open without being told to: those of hosts without a key."""
    hosts = guarded(plan)
    if summing := next((host for host, links in hosts.items() if "sync" in links), None):
        message = "learners on several hosts sum their gradients in plain text, which keys do not protect; set "
        message += "links.sync.insecure: true, if only machines you trust reach that network"
        path = ("links", "sync")
        at = path if "sync" in root.find(["links"]).children() else ("hosts", summing)
        problems.add(root.find(at), dotted(path), message)
    for host, links in hosts.items():
        if wrong := _without_key(host, links, catalog):
            problems.add(root.find(("hosts", host)), "links", wrong)


def _without_key(host: str, links: Mapping[str, set[str]], catalog: Catalog) -> str:
    """What is wrong with a host's key, if anything is."""
    kinds = catalog.keys(host) if catalog.keys else None
    if kinds is None:
        return (
            f"no key of {host} is allowed on this machine, but these links leave theirs: {', '.join(links)}; "
            f"{catalog.invite(host)}; or set insecure: true, on a link or once at the top level, if only machines you "
            "trust reach that network"
        )
    if kinds and (beyond := frozenset[str]().union(*links.values()) - kinds):
        return (
            f"the key of {host} is allowed for {', '.join(sorted(kinds))} only, not for {', '.join(sorted(beyond))}; "
            f"place those elsewhere, or type `ddrl keys allow {host} KEY` with --role for each kind that it may run"
        )
    return ""


def check_env(plan: Plan, catalog: Catalog, root: Node, problems: Problems) -> None:
    """Whether the environment can be made on this host, if the catalog can tell."""
    if catalog.probe_env:
        try:
            catalog.probe_env(plan.env)
        except EnvError as error:
            problems.add(root.find(("env", "id")), "env.id", str(error))
