"""`load`: a topology file to a `Plan`, or every problem there is with it."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddrl_bus.errors import EnvError, SecurityError, TopologyError, UsageError
from ddrl_bus.topology import checks, relays
from ddrl_bus.topology.files import expand, read_tree
from ddrl_bus.topology.plan import LinkPlan, Plan
from ddrl_bus.topology.roles import Roles
from ddrl_bus.topology.schema import (
    GROUP_NAME,
    KINDS,
    SECTIONS,
    Catalog,
    CheckpointSettings,
    EnvSettings,
    NodeOptions,
    Settings,
    StopSettings,
    check_hosts,
    one_of,
    validate,
    validate_config,
)
from ddrl_bus.topology.tree import Mark, Node, Problems, came, dotted, parse
from ddrl_bus.topology.wiring import Group, Wiring, default_links

DEFAULT_GROUPS = ("evaluator", "controller")  # added when no group is of their kind


def load(
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    catalog: Catalog,
    in_process: bool = False,
    run_id: str | None = None,
) -> Plan:
    """The plan of a topology file.

    `overrides` are `key.path=value`; `in_process` puts every node into one process (`memory://` addresses);
    `run_id` defaults to the file's, else to a digest of the topology that every host agrees on.

    Raises:
        TopologyError: with every problem found, each with file, line, column and path.
        SecurityError: nothing else is wrong, but a link would leave its machine, and a host at its end has no key here.
        EnvError: nothing else is wrong, but the environment cannot be made here.
    """
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
        raise UsageError(f"run id: got {came(run_id)}, expected 1 to 64 letters, digits, - and _")
    problems = Problems()
    tree = read_tree(path, overrides, environ, problems)
    return _loaded(tree, environ, catalog, problems, in_process=in_process, run_id=run_id)


def load_text(text: str, name: str, *, catalog: Catalog) -> Plan:
    """The plan of a locked topology that somebody sent: it reads no file and no variable of this machine.

    `name` stands for the file in messages. Raises as `load` does.
    """
    problems = Problems()
    tree = parse(text, name, problems)
    if tree is None or not isinstance(tree.value, dict):
        problems.add(Mark(name), "", "expected a locked topology")
        raise TopologyError(problems.sorted())
    if "extends" in tree.value:
        problems.add(tree.value.pop("extends"), "extends", "a locked topology stands for itself")
    return _loaded(expand(tree, {}, problems), os.environ, catalog, problems)


def _loaded(
    tree: Node,
    environ: Mapping[str, str],
    catalog: Catalog,
    problems: Problems,
    *,
    in_process: bool = False,
    run_id: str | None = None,
) -> Plan:
    plan = _plan(tree, catalog, problems)
    if plan is None:
        raise TopologyError(problems.sorted())
    run_id = run_id or plan.run_id or plan.digest()
    ipc_dir = Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"ddrl-{os.getuid()}" / run_id
    plan = dataclasses.replace(plan, run_id=run_id, in_process=in_process, ipc_dir=ipc_dir)
    return _judged(plan, tree, catalog, problems)


def _judged(plan: Plan, tree: Node, catalog: Catalog, problems: Problems) -> Plan:
    """The plan itself, once nothing is wrong with it here."""
    exposed, env = Problems(), Problems()
    checks.check_in_process(plan, tree, problems)
    checks.check_addresses(plan, tree, problems)
    checks.check_security(plan, catalog, tree, exposed)
    checks.check_env(plan, catalog, tree, env)
    if problems:
        problems.found |= exposed.found | env.found
        raise TopologyError(problems.sorted())
    if exposed:
        raise SecurityError("\n".join(map(str, exposed.sorted() + env.sorted())))
    if env:
        raise EnvError("\n".join(map(str, env.sorted())))
    return plan


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _plan(tree: Node, catalog: Catalog, problems: Problems) -> Plan | None:
    """The plan without its run id and addresses, or None with the reasons in `problems`."""
    top = _part(tree, [key for key in tree.children() if key not in SECTIONS])
    settings = validate(Settings, top, (), problems, known=SECTIONS)
    env = validate(EnvSettings, _required(tree, "env", problems), ("env",), problems)
    stop = validate(StopSettings, _optional(tree, "stop"), ("stop",), problems)
    checkpoint = validate(CheckpointSettings, _optional(tree, "checkpoint"), ("checkpoint",), problems)
    hosts = check_hosts(tree.children().get("hosts"), problems)
    algo_name, algo = _algorithm(_required(tree, "algo", problems), catalog, problems)

    nodes = _required(tree, "nodes", problems)
    groups = _groups(nodes, problems)
    wrong = Problems()
    links = _links(tree, nodes, groups, algo_name, catalog, wrong) if algo_name else {}
    whole = {name: options for name, options in groups.items() if isinstance(options, NodeOptions)}
    checks.check_groups(whole, hosts, nodes, problems)
    if links and not wrong and _complete(tree, whole):
        present = {name: options for name, options in whole.items() if options.count}
        Roles(present, links, catalog.algorithms[algo_name], algo, tree, wrong).check()
    problems.found |= wrong.found
    if len(whole) == len(groups):
        checks.check_stop(whole.values(), stop is not None and stop.reward is not None, tree, problems)
        if not wrong:
            checks.check_batches(algo, whole, links.get("trajectories"), tree, problems)
            if algo is not None:
                checks.check_replays(algo, catalog.algorithms[algo_name], whole, links, tree, problems)
    if problems or not settings or not env or not stop or not checkpoint:
        return None
    plan = Plan(
        name=settings.name,
        run_id=settings.run_id or "",
        seed=settings.seed,
        env=env,
        algo_name=algo_name,
        algo=algo,
        groups={name: _placed(options, hosts) for name, options in whole.items()},
        links=links,
        stop=stop,
        checkpoint=checkpoint,
        grace=settings.grace,
        hosts=hosts,
        port=settings.port,
    )
    return relays.placed(plan)


def _links(
    tree: Node,
    nodes: Node,
    groups: Mapping[str, NodeOptions | Group],
    algo_name: str,
    catalog: Catalog,
    problems: Problems,
) -> dict[str, LinkPlan]:
    insecure = tree.children().get("insecure")
    entry = catalog.algorithms[algo_name]
    wiring = Wiring(
        default=default_links(entry),
        acting=entry.acting,
        groups={name: Group(options.kind, options.count) for name, options in groups.items()},
        insecure=insecure is not None and insecure.value is True,
        complete=_complete(tree, groups),
        problems=problems,
    )
    return wiring.resolve(tree.children().get("links"), nodes)


def _complete(tree: Node, groups: Mapping[str, object]) -> bool:
    """Whether every group that the file writes is among these."""
    return "nodes" in tree.children() and tree.find(["nodes"]).children().keys() <= groups.keys()


def _part(node: Node, keys: Sequence[str]) -> Node:
    """A mapping with some of its keys, at the same place."""
    return Node({key: node.children()[key] for key in keys}, node.at, node.key_at)


def _required(tree: Node, key: str, problems: Problems) -> Node:
    node = tree.children().get(key)
    if node is None:
        problems.add(tree, key, "missing, and it has no default")
    return node or Node({}, tree.at)


def _optional(tree: Node, key: str) -> Node:
    return tree.children().get(key) or Node({}, tree.at)


def _algorithm(node: Node, catalog: Catalog, problems: Problems) -> tuple[str, Any]:
    """Name and Config; "" for a name that is off, None for settings that are."""
    if not isinstance(node.value, dict):
        problems.add(node, "algo", f"got {came(node.plain())}, expected a mapping with a name")
        return "", None
    name = node.children().get("name")
    if name is None:
        problems.add(node, "algo.name", f"missing; {one_of('', catalog.algorithms)}")
        return "", None
    if not isinstance(name.value, str) or name.value not in catalog.algorithms:
        message = f"got {came(name.plain())}, {one_of(str(name.value), catalog.algorithms)}"
        problems.add(name, "algo.name", message)
        return "", None
    rest = _part(node, [key for key in node.children() if key != "name"])
    return name.value, validate_config(catalog.algorithms[name.value].config, rest, ("algo",), problems)


def _groups(nodes: Node, problems: Problems) -> dict[str, NodeOptions | Group]:
    """Group name -> options, with evaluator and controller added; a bare `Group` where the options are off."""
    if not isinstance(nodes.value, dict | None):
        problems.add(nodes, "nodes", f"got {came(nodes.plain())}, expected a mapping of groups to options")
    groups: dict[str, NodeOptions | Group] = {}
    for name, node in nodes.children().items():
        if (options := _group(name, node, problems)) is not None:
            groups[name] = options
    present = {options.kind for options in groups.values()}
    for kind in DEFAULT_GROUPS:
        if kind not in present and kind not in nodes.children():
            groups[kind] = KINDS[kind].model_validate({})
    return groups


def _group(name: str, node: Node, problems: Problems) -> NodeOptions | Group | None:
    path = ("nodes", name)
    if not GROUP_NAME.fullmatch(name):
        message = f"got {came(name)}, expected a name of a-z, 0-9, - and _ that starts with a letter, at most 32"
        problems.add(node.key_at or node, dotted(path), message)
        return None
    kind = node.children().get("kind")
    if kind is None and name not in KINDS:
        message = f"no kind is given, and the name is none; {one_of(name, KINDS)}"
        problems.add(node.key_at or node, dotted(path), message)
        return None
    if kind is not None and (not isinstance(kind.value, str) or kind.value not in KINDS):
        message = f"got {came(kind.plain())}, {one_of(str(kind.value), KINDS)}"
        problems.add(kind, dotted((*path, "kind")), message)
        return None
    which = str(kind.value) if kind else name
    if name in KINDS and name != which:
        assert kind is not None
        problems.add(kind, dotted((*path, "kind")), f"got {which}, but {name} names a kind itself; rename the group")
        return None
    return validate(KINDS[which], node, path, problems) or Group(which, 1)


def _placed(options: NodeOptions, hosts: Mapping[str, str]) -> NodeOptions:
    """The options with their host filled in: the first one listed."""
    return options if options.host else options.model_copy(update={"host": (next(iter(hosts)),)})
