"""From a topology and costs to what it will do: the simulation run until it is steady, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.model import model
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.world import World
from ddrl_bus.topology.plan import Plan

HORIZON_S: Final = 30.0
"""Simulated time, at most."""
EVENTS, EVENTS_PER_ACTOR = 60_000, 25
"""Simulated events, at most."""
SLICES: Final = 20
SETTLED: Final = 0.4
"""Share of the simulation that is left out as its beginning."""
FULL: Final = 0.9
"""What is busier than this binds."""
NAMED: Final = 3
"""Of what binds, at most."""


@dataclass(frozen=True)
class Prediction:
    """What a topology will do once it is under way."""

    name: str
    actors: int
    env_steps_per_s: float
    updates_per_s: float
    learner_idle: float
    """Share of the time in which a learner trains on nothing, the mean of all."""
    staleness: float | None
    """Versions that rows are behind when they are trained on; None where a replay draws them, as old as they are."""
    bytes_per_s: Mapping[str, float]
    """Link → what is sent on it."""
    memory: Mapping[str, float]
    """Host → bytes."""
    bottleneck: str
    load: Mapping[str, float]
    """What can be busy → share of the time in which it is; of cores, of what they can do."""
    events: int


def predict(plan: Plan, costs: Costs, setting: Setting = Setting()) -> Prediction:  # noqa: B008 - frozen
    """The same for the same arguments.

    Raises:
        UsageError: `setting` names a group that the topology does not have.
    """
    world = model(plan, costs, setting)
    actors = len(world.of("actor"))
    rate = rates(world, EVENTS + EVENTS_PER_ACTOR * actors)
    load = _named("load", rate)
    trained = [rate[f"trains {node.name}"] for node in world.of("learner")]
    return Prediction(
        plan.name,
        actors,
        rate["env_steps"],
        rate["updates"] / (len(trained) if world.barrier else 1),
        max(0.0, 1 - sum(trained) / len(trained)),
        rate["lag"] / rate["lagged"] if rate["lagged"] else None,
        _named("bytes", rate),
        _memory(world),
        _bottleneck(load, _shares(world)),
        load,
        world.sim.events,
    )


def rates(world: World, events: int) -> dict[str, float]:
    """What grows by how much a second, once it is steady: a world is run once, for at most so many events."""
    before, after = _run(world, events)
    seconds = max(1e-9, after["now"] - before["now"])
    return {name: (value - before.get(name, 0.0)) / seconds for name, value in after.items()}


def _named(what: str, rate: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(f"{what} "): value for name, value in rate.items() if name.startswith(f"{what} ")}


def _run(world: World, events: int) -> tuple[dict[str, float], dict[str, float]]:
    """Readings of the moment from which it counts as steady, and of the end."""
    readings = []
    for number in range(1, SLICES + 1):
        world.sim.run(HORIZON_S * number / SLICES, max(1, events * number // SLICES - world.sim.events))
        readings.append(_reading(world))
    end = readings[-1]["now"]
    return next(reading for reading in readings if reading["now"] >= SETTLED * end), readings[-1]


def _reading(world: World) -> dict[str, float]:
    found = {
        "now": world.sim.now,
        "env_steps": world.env_steps,
        "updates": world.updates,
        "lag": world.lag,
        "lagged": world.lagged,
    }
    found |= {f"bytes {link}": size for link, size in world.bytes.items()}
    found |= {f"cpu {kind}": sum(thread.done for thread in threads) for kind, threads in world.kinds.items()}
    for host, machine in world.machines.items():
        found[f"load cores of {host}"] = machine.cpu.done / machine.cpu.cores
        if len(world.machines) > 1:
            found[f"load network out of {host}"] = machine.wire.busy
    for node in world.nodes:
        if node.kind in ("inference", "replay", "param_server"):
            found[f"load {node.name}"] = world.thread(node).busy
    for name, thread in world.trainers.items():
        found[f"load {name}"] = found[f"trains {name}"] = thread.busy
    for node in world.of("learner"):
        if node.process in world.threads:
            found[f"load event loop of {node.process}"] = world.threads[node.process].busy
    return found


def _shares(world: World) -> dict[str, list[tuple[float, str]]]:
    """Host → who uses its cores, most first."""
    work: dict[str, dict[str, float]] = {}
    for node in world.nodes:
        on = work.setdefault(node.host, {})
        kind = node.bundle or node.kind
        if node.kind == "learner":
            on[node.kind] = on.get(node.kind, 0.0) + world.trainers[node.name].done
        if node.process in world.threads:
            on[kind] = on.get(kind, 0.0) + world.threads.pop(node.process).done
    found = {}
    for host, kinds in work.items():
        total = sum(kinds.values()) or 1.0
        found[host] = sorted(((seconds / total, kind) for kind, seconds in kinds.items()), reverse=True)
    return found


def _bottleneck(load: Mapping[str, float], shares: Mapping[str, list[tuple[float, str]]]) -> str:
    """All that is full; where nothing is, nodes wait for one another."""
    full = {name: share for name, share in load.items() if share >= FULL}
    if not full:
        name, share = max(load.items(), key=lambda item: item[1])
        return f"nothing is full, nodes wait in turn; busiest is {name} ({share:.0%})"
    words = []
    for name, share in sorted(full.items(), key=lambda item: -item[1]):
        users = shares.get(name.removeprefix("cores of "), []) if name.startswith("cores of ") else []
        parts = ", ".join(f"{kind} {part:.0%}" for part, kind in users if part >= 0.05)
        words.append(f"{name} ({parts or f'{share:.0%}'})")
    return "; ".join(words[:NAMED])


def _memory(world: World) -> dict[str, float]:
    """Processes as they were measured, unrolls in windows, and full replays."""
    sizes, found = world.costs.sizes, dict.fromkeys(world.machines, 0.0)
    seen = set()
    link = world.plan.links["trajectories"]
    for node in world.nodes:
        torch = node.kind in ("learner", "param_server")
        if node.process not in seen or torch:
            found[node.host] += sizes["learner"] if torch else sizes["node"]
            seen.add(node.process)
        if node.kind == "replay":
            found[node.host] += node.options.capacity / sizes["items"] * sizes["trajectories"]
        if node.kind == "actor":
            found[world.mine(node, world.owners())[0].host] += link.window * world.unroll_size(node)
    return found


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Rounded to what can be meant."""
    return {name: _rounded(value) for name, value in asdict(prediction).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
