"""From what parts cost alone to what they cost in a run: costs under which the simulation does as a trial did.

    levels    each kind of process takes as much processor time an env step as the kernel counted
    hop       with these, env steps come as fast as they came

The parts still say how a process's time is shared out among what it does, and how that grows with sizes and counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.model import model
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import rates
from ddrl_bus.planning.trial import Trial
from ddrl_bus.topology.plan import Plan

EVENTS: Final = 12_000
ROUNDS: Final = 3
HALVINGS: Final = 7
SLOWEST_HOP_S: Final = 2e-3


def fitted(plan: Plan, costs: Costs, trial: Trial) -> Costs:
    """The costs with levels and hop of the trial. Where no hop explains what it took, none is assumed."""
    alone = replace(costs, besides=trial.besides, hop=0.0)
    for _ in range(ROUNDS):  # what work takes of a core's time depends on what goes on beside it, and that on this
        alone, _ = _levelled(plan, alone, trial)
    _, rate = _levelled(plan, replace(alone, hop=SLOWEST_HOP_S), trial)
    if rate > trial.env_steps_per_s:
        return alone
    low, high, found = 0.0, SLOWEST_HOP_S, alone
    for _ in range(HALVINGS):
        found, rate = _levelled(plan, replace(found, hop=(low + high) / 2), trial)
        low, high = (found.hop, high) if rate > trial.env_steps_per_s else (low, found.hop)
    return found


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
