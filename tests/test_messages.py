"""The vocabulary: what is said arrives as it was said, and what does not fit is refused by a name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.messages import (
    Control,
    Evaluation,
    Group,
    Progress,
    Replica,
    Tally,
    Trajectory,
    Vote,
    Weights,
    fields_of,
    parse,
)
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Message

EVALUATION = Evaluation(mean_return=475.5, episodes=20, version=9, learner_epoch=3, env_steps=11_520, number=4)
PROGRESS = Progress(
    role="actor",
    state="running",
    pid=4711,
    host="box",
    topology="0123456789ab",
    package="0.1.0",
    started=1.5e9,
    counters={"env_steps": 640, "trajectories/actor-0@1>learner-0@1/produced": 2**62},
    gauges={"credit": 2.0, "version": 7},
)
GROUP = Group(generation=7, members={"learner-1": 2**63, "learner-0": 3}, store="[::1]:4711")
SAID = [
    Trajectory(learner_epoch=2**63, returns=[1.5, 500.0], lengths=[2, 500]),
    Trajectory(learner_epoch=1, returns=[], lengths=[]),
    Weights(env_steps=1_280, updates=1),
    Weights(env_steps=1_280, updates=1, confirm=3),
    PROGRESS,
    replace(PROGRESS, evaluation=EVALUATION, done="steps", error="EnvError: fell over"),
    Control(),
    Control("drain", 2, ["actor-0", "evaluator-0"], "reward"),
    Control(group=GROUP),
    replace(PROGRESS, replica=Replica("[::1]:4712")),
    replace(PROGRESS, replica=Replica("[::1]:4712", GROUP, broken=6)),
    Vote(generation=7, ready=9, rows=40, held=True, digests=[(8, -(2**63)), (9, 2**63 - 1)]),
    Tally(update=9, done=2, workers=3),
]


def sent(kind: str, fields: dict[str, Any]) -> Message:
    return wire.decode(wire.encode(kind, "actor-0", 1, 1, fields))


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_what_is_said_arrives(said: Any) -> None:
    assert parse(type(said), sent(said.KIND, fields_of(said))) == said


def test_another_kind_is_refused() -> None:
    with pytest.raises(WireError, match=r"^kind: got 'weights', expected 'trajectory'") as refused:
        parse(Trajectory, sent(Weights.KIND, fields_of(Weights(0, 0))))
    assert refused.value.reason == "kind"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (SAID[0], {"learner_epoch": "seven"}),
        (SAID[0], {"learner_epoch": None}),
        (SAID[0], {"returns": 3.0}),
        (SAID[0], {"lengths": ["long"]}),
        (SAID[2], {"updates": 1.5}),
        (PROGRESS, {"state": "resting"}),
        (PROGRESS, {"counters": {"env_steps": "many"}}),
        (PROGRESS, {"gauges": [1.0]}),
        (PROGRESS, {"evaluation": {"mean_return": 1.0}}),
        (Control(), {"phase": "explode"}),
        (Control(), {"draining": {"actor-0": True}}),
        (Control(), {"group": {"generation": 1, "members": ["learner-0"], "store": "here:1"}}),
        (PROGRESS, {"replica": {"group": None}}),
        (Vote(1, 1, 1, held=False), {"digests": [[1]]}),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused(message: Any, change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match=rf"^fields: {message.KIND}: ") as refused:
        parse(type(message), sent(message.KIND, fields_of(message) | change))
    assert refused.value.reason == "fields"


@pytest.mark.parametrize("name", ["learner_epoch", "returns", "lengths"])
def test_a_missing_field_is_refused(name: str) -> None:
    fields = fields_of(SAID[0])
    del fields[name]
    with pytest.raises(WireError, match=r"^fields: trajectory: "):
        parse(Trajectory, sent(Trajectory.KIND, fields))


def test_members_arrive_in_the_order_of_their_ranks() -> None:
    group = parse(Control, sent(Control.KIND, fields_of(Control(group=GROUP)))).group
    told = parse(Progress, sent(Progress.KIND, fields_of(replace(PROGRESS, replica=Replica("here:1", GROUP))))).replica
    assert group is not None
    assert told is not None
    assert told.group is not None
    assert list(group.members) == list(told.group.members) == ["learner-1", "learner-0"]
