"""What an inference node knows of one group of an actor's environments, in one life of that actor.

A group asks step by step, and each step is taken once: whoever repeats it gets the answer that was given, or the one
that is on its way. An actor's new life is a new `Group`: what the agents carry and the half-built unroll begin anew, as
they do where the environments were made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ddrl_bus.algos import memory
from ddrl_bus.algos.memory import State
from ddrl_bus.experience import FINAL, RECORD, STATE
from ddrl_bus.messages import Act, Actions
from ddrl_bus.nodes.assembly import OUTCOME, Assembler, Played
from ddrl_bus.transport.links.request import Request
from ddrl_bus.transport.wire import Array, Spec


class Group:
    """One group of environments.

    Args:
        life: the actor's epoch.
        step: the first one it asks for; not 0 where this inference node is the younger one.
        initial: makes the state of the agents at the start of their episodes.
        places: [n] of the environments among all of the run.
        assembler: puts their unrolls together; None where the actor does.
    """

    def __init__(
        self, life: int, step: int, initial: Callable[[], State], places: Array, assembler: Assembler | None
    ) -> None:
        self.life = life
        self.places = places
        self.assembler = assembler
        self.step = step - 1
        """The newest one asked for."""
        self.requests: list[Request] = []
        """To be answered with the actions of `step`; more than one if it was repeated meanwhile."""
        self.out = False
        """A predictor has it: nobody else may touch what its answer is made of."""
        self.answered = False
        """`step` was; a repeated question gets the same answer."""
        self.left = False
        """Its actor has a newer life."""
        self.actions: Actions | None = None
        """The answer to `step`, with `arrays`."""
        self.arrays: dict[str, Array] = {}
        self.obs: Array
        """[n, ...] of `step`"""
        self.state: State
        """What the agents carry into `step`."""
        self._initial = initial
        self._action: Array | None = None
        self._tells_state = True

    def may_ask(self, step: int) -> bool:
        """Whether it is the next step, after an answer, or the newest one again."""
        return step == self.step or (step == self.step + 1 and not self.requests)

    def asks(self, act: Act, arrays: Mapping[str, Array]) -> tuple[Played | None, int]:
        """Take the next step's question; returns the unroll that ends with its observations, and the rows of one that
        came to nothing."""
        lost = 0
        self._tells_state = act.begins or self._action is None
        if self._action is not None and OUTCOME[0] in arrays:
            ended = np.flatnonzero(arrays["terminated"] | arrays["truncated"])
            self.state = memory.carry(self.state, self._action, arrays["reward"], ended)
            if self.assembler:
                self.assembler.led_to(arrays, act.returns, act.lengths)
        else:
            self.state = self._initial()
            lost = self.assembler.restart() if self.assembler else 0
        self.obs, self.step, self.answered = arrays["obs"], act.step, False
        return (self.assembler.observed(self.obs) if self.assembler else None), lost

    def acted(self, action: Array, record: Mapping[str, Array], state: State, by: Actions) -> None:
        """The policy's answer, whose arrays are copied where they are kept; `state` is the group's own from now on."""
        arrays = {"action": action, **{RECORD + name: array for name, array in record.items()}}
        if self._tells_state or (self.assembler and self.assembler.begins):
            arrays |= {STATE + name: array for name, array in self.state.items()}
        if self.assembler:
            self.assembler.acted(arrays, by)
            arrays = {"action": action}
        self.arrays = {name: array.copy() for name, array in arrays.items()}
        self._action, self.state = self.arrays["action"], state
        self.actions = by

    def abandon(self) -> int:
        """Rows of its half-built unroll, which nobody will go on with."""
        return self.assembler.restart() * len(self.obs) if self.assembler else 0


def refusal(arrays: Mapping[str, Array], obs: Spec) -> str | None:
    """Why the arrays of an `Act` are not as they should be; `obs` is the (dtype, shape) of a group's observations."""
    envs = obs[1][0]
    expected = {"obs": obs}
    if OUTCOME[0] in arrays:
        expected |= {"reward": ("float32", (envs,)), "terminated": ("bool", (envs,)), "truncated": ("bool", (envs,))}
    for name, (dtype, shape) in expected.items():
        array = arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            came = "nothing" if array is None else f"{array.dtype.name}{list(array.shape)}"
            return f"{name}: got {came}, expected {dtype}{list(shape)}"
    index, final = (arrays.get(name) for name in FINAL)
    cut = np.flatnonzero(arrays["truncated"]) if OUTCOME[0] in arrays else np.empty(0, np.int64)
    if not len(cut) and index is None:
        return None
    if index is None or final is None or index.dtype != np.int64 or not np.array_equal(index, cut):
        return f"{FINAL[0]}: expected the {len(cut)} truncated environments, and {FINAL[1]} of each"
    if final.dtype != obs[0] or final.shape != (len(cut), *obs[1][1:]):
        return f"{FINAL[1]}: got {final.dtype.name}{list(final.shape)}, expected one of each of {len(cut)}"
    return None
