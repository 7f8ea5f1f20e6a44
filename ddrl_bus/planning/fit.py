"""From what parts cost alone to what they cost in a run: costs under which the simulation does as a trial did.

    levels       each kind of process takes as much processor time an env step as the kernel counted
    locked, hop  with these, env steps come as fast as they came: first learners wait for their event loops as long as
                 Python's lock may make them, and what is left then are the times until sleepers wake up
    besides      where waiting does not explain it, because there is always other work: threads that take cores

The parts still say how a process's time is shared out among what it does, and how that grows with sizes and counts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.model import model
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import rates
from ddrl_bus.planning.trial import Trial
from ddrl_bus.topology.plan import Plan

EVENTS: Final = 12_000
ROUNDS: Final = 3
HALVINGS: Final = 8
MOST_LOCKED: Final = 0.7
"""An update needs the lock for all but what torch does in one go, such as backward passes."""
SLOWEST_HOP_S: Final = 2e-3


def fitted(plan: Plan, costs: Costs, trial: Trial) -> Costs:
    """The costs with levels and waits of the trial."""
    costs = replace(costs, besides=trial.besides)
    for _ in range(ROUNDS):  # what work takes of a core's time depends on what goes on beside it, and that on this
        costs, _ = _levelled(plan, _waiting(costs, 1.0), trial)
    _, rate = _levelled(plan, _waiting(costs, 2.0), trial)
    explained = _waiting if rate <= trial.env_steps_per_s else partial(_crowded, besides=trial.besides)
    low, high = 0.0, 2.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        costs, rate = _levelled(plan, explained(costs, middle), trial)
        low, high = (middle, high) if rate > trial.env_steps_per_s else (low, middle)
    return costs


def _waiting(costs: Costs, much: float) -> Costs:
    """From 0 to 1 learners wait for their lock, up to 2 everybody for hops as well."""
    return replace(costs, locked=MOST_LOCKED * min(1.0, much), hop=SLOWEST_HOP_S * max(0.0, much - 1))


def _crowded(costs: Costs, much: float, besides: float) -> Costs:
    """No hop is slow enough where others have work meanwhile: so many threads more are always busy."""
    return replace(_waiting(costs, 1.0), besides=besides + much)


def _levelled(plan: Plan, costs: Costs, trial: Trial) -> tuple[Costs, float]:
    """Costs that are nearer to the kernel's count, and the env steps a second of these before."""
    world = model(plan, costs, Setting(counts=trial.counts, others=trial.others))
    rate = rates(world, EVENTS)
    levels = {
        kind: costs.levels.get(kind, 1.0) * seconds * rate["env_steps"] / rate[f"cpu {kind}"]
        for kind, seconds in trial.cpu.items()
        if rate.get(f"cpu {kind}")
    }
    return replace(costs, levels=levels), rate["env_steps"]
