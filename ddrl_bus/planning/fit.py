"""From what parts cost alone to what they cost in a run: the strain under which the simulation does as a trial did.

    levels    each kind of process takes as much processor time an env step as the kernel counted
    locked    learners are at an update for as long as they were: they wait for their event loops to let go of Python's
              lock
    hop       env steps come as fast as they came: sleepers take so long to wake up
    besides   where lock or hop would have to be more than they can: that others take cores

The parts still say how a process's time is shared out among what it does, and how that grows with sizes and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Final

from ddrl_bus.planning.costs import Costs, Strain
from ddrl_bus.planning.model import model
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import rates
from ddrl_bus.planning.trial import Trial
from ddrl_bus.topology.plan import Plan

EVENTS: Final = 12_000
ROUNDS: Final = 3
"""Each of these changes the others a little."""
HALVINGS: Final = 7
NEAR: Final = 1.01
"""What is nearer needs no explanation."""
MOST_LOCKED: Final = 0.7
"""An update needs the lock for all but what torch does in one go, such as backward passes."""
SLOWEST_HOP_S: Final = 2e-3
Rates = Mapping[str, float]


def fitted(plan: Plan, costs: Costs, trial: Trial) -> Strain:
    """The strain of a trial.

    Args:
        plan: as it was tried.
    """
    done = partial(_rates, plan, costs)
    updating = (1 - trial.idle) / trial.env_steps_per_s

    def fast(rate: Rates) -> bool:
        return rate["env_steps"] > trial.env_steps_per_s * NEAR

    def hastes(rate: Rates) -> bool:
        return fast(rate) and _updating(rate) * NEAR < updating

    def least(explained: Callable[[float], Strain], short: Callable[[Rates], bool]) -> Strain:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS if short(done(explained(0.0))) else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if short(done(explained(middle))) else (low, middle)
        return explained(high if low else 0.0)

    crowd = model(plan, costs, Setting()).machines[next(iter(plan.hosts))].strain.crowd
    strain = Strain(crowd)
    for _ in range(ROUNDS):
        alone = replace(_levelled(strain, done(strain), trial), hop=0.0, besides=trial.besides)
        locked = least(partial(_locked, alone), hastes)
        strain = least(partial(_waiting, locked), fast)
        if fast(done(strain)):
            strain = least(partial(_crowded, locked, costs.cores), fast)
    return strain


def _locked(strain: Strain, much: float) -> Strain:
    return replace(strain, locked=MOST_LOCKED * much)


def _waiting(strain: Strain, much: float) -> Strain:
    return replace(strain, hop=SLOWEST_HOP_S * much)


def _crowded(strain: Strain, cores: int, much: float) -> Strain:
    return replace(strain, besides=strain.besides + cores * much)


def _levelled(strain: Strain, rate: Rates, trial: Trial) -> Strain:
    """Nearer to the kernel's count."""
    levels = {
        kind: strain.levels.get(kind, 1.0) * seconds * rate["env_steps"] / rate[f"cpu {kind}"]
        for kind, seconds in trial.cpu.items()
        if rate.get(f"cpu {kind}")
    }
    return replace(strain, levels=levels)


def _rates(plan: Plan, costs: Costs, strain: Strain) -> Rates:
    return rates(model(plan, replace(costs, strains=[strain]), Setting()), EVENTS)


def _updating(rate: Rates) -> float:
    """Seconds that a learner is at updates, an env step."""
    return fmean(share for name, share in rate.items() if name.startswith("trains ")) / rate["env_steps"]
