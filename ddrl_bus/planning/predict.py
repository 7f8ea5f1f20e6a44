"""From a topology and costs to what it will do: the simulation run until it is steady, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.model import Model, Setting
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
    model = Model(plan, costs, setting)
    actors = len(model.of("actor"))
    before, after = _run(model, EVENTS + EVENTS_PER_ACTOR * actors)
    seconds = max(1e-9, after["now"] - before["now"])
    rate = {name: (value - before.get(name, 0.0)) / seconds for name, value in after.items()}
    load = {name.removeprefix("load "): share for name, share in rate.items() if name.startswith("load ")}
    lagged = after["lagged"] - before["lagged"]
    trained = [rate[f"trains {node.name}"] for node in model.of("learner")]
    return Prediction(
        plan.name,
        actors,
        rate["env_steps"],
        rate["updates"] / (len(trained) if model.barrier else 1),
        max(0.0, 1 - sum(trained) / len(trained)),
        (after["lag"] - before["lag"]) / lagged if lagged else None,
        {name.removeprefix("bytes "): value for name, value in rate.items() if name.startswith("bytes ")},
        _memory(model),
        _bottleneck(load, _shares(model)),
        load,
        model.sim.events,
    )


def _run(model: Model, events: int) -> tuple[dict[str, float], dict[str, float]]:
    """Readings of the moment from which it counts as steady, and of the end."""
    readings = []
    for number in range(1, SLICES + 1):
        model.sim.run(HORIZON_S * number / SLICES, max(1, events * number // SLICES - model.sim.events))
        readings.append(_reading(model))
    end = readings[-1]["now"]
    return next(reading for reading in readings if reading["now"] >= SETTLED * end), readings[-1]


def _reading(model: Model) -> dict[str, float]:
    found = {
        "now": model.sim.now,
        "env_steps": model.env_steps,
        "updates": model.updates,
        "lag": model.lag,
        "lagged": model.lagged,
    }
    found |= {f"bytes {link}": size for link, size in model.bytes.items()}
    for host, machine in model.machines.items():
        found[f"load cores of {host}"] = machine.cpu.done / machine.cpu.most
        if len(model.machines) > 1:
            found[f"load network out of {host}"] = machine.wire.busy
    for node in model.nodes:
        if node.kind in ("inference", "replay", "param_server"):
            found[f"load {node.name}"] = model.thread(node).busy
    for name, thread in model.trainers.items():
        found[f"load {name}"] = found[f"trains {name}"] = thread.busy
    for node in model.of("learner"):
        if node.process in model.threads:
            found[f"load event loop of {node.process}"] = model.threads[node.process].busy
    return found


def _shares(model: Model) -> dict[str, list[tuple[float, str]]]:
    """Host → who uses its cores, most first."""
    work: dict[str, dict[str, float]] = {}
    for node in model.nodes:
        on = work.setdefault(node.host, {})
        kind = node.bundle or node.kind
        if node.kind == "learner":
            on[node.kind] = on.get(node.kind, 0.0) + model.trainers[node.name].done
        if node.process in model.threads:
            on[kind] = on.get(kind, 0.0) + model.threads.pop(node.process).done
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


def _memory(model: Model) -> dict[str, float]:
    """Processes as they were measured, unrolls in windows, and full replays."""
    sizes, found = model.costs.sizes, dict.fromkeys(model.machines, 0.0)
    seen = set()
    link = model.plan.links["trajectories"]
    for node in model.nodes:
        torch = node.kind in ("learner", "param_server")
        if node.process not in seen or torch:
            found[node.host] += sizes["learner"] if torch else sizes["node"]
            seen.add(node.process)
        if node.kind == "replay":
            found[node.host] += node.options.capacity / sizes["items"] * sizes["trajectories"]
        if node.kind == "actor":
            found[model.mine(node, model.owners())[0].host] += link.window * model.unroll_size(node)
    return found


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Rounded to what can be meant."""
    return {name: _rounded(value) for name, value in asdict(prediction).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
