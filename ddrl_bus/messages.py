"""The vocabulary: what nodes say to each other, as frozen dataclasses of scalars; arrays ride beside them.

`fields_of` makes the map that travels; `parse` reads it back and refuses what does not fit with a counted reason, so a
node never sees a message of the wrong shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from ddrl_bus.errors import WireError
from ddrl_bus.transport.wire import Message

Phase = Literal["run", "confirm", "drain"]
NodeState = Literal["new", "starting", "running", "draining", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One unroll of one vector env; `experience.UnrollSchema` lists its arrays."""

    KIND: ClassVar[str] = "trajectory"
    learner_epoch: int
    """The learner's life whose weights chose the newest action in it; the array `version` has the version of each."""
    returns: list[float]
    """Undiscounted, unclipped returns of the episodes that ended in its new rows."""
    lengths: list[int]
    overlap: int = 0
    """Rows at its beginning that are no new ones: the last of the unroll before."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A snapshot of a network's parameters: the arrays are the state dict."""

    KIND: ClassVar[str] = "weights"
    env_steps: int
    updates: int
    confirm: int = 0
    """Non-zero: published for the confirmation of this number, while the learner holds still."""


@dataclass(frozen=True, slots=True)
class Act:
    """An actor asks an inference node what one group of its environments is to do.

    The arrays are `obs` [n, ...] and what the last actions led to: `reward`, `terminated`, `truncated` [n], and of
    truncated rows `final_index` [K] and `final_obs` [K, ...]. Without them the environments were just made: what came
    before is over.
    """

    KIND: ClassVar[str] = "act"
    group: int
    step: int
    """Counts from 0 in each life of an actor, for each of its groups."""
    begins: bool = False
    """The actor assembles unrolls, and one begins here: it needs to know what the agents carry."""
    returns: list[float] = field(default_factory=list)
    """Undiscounted, unclipped returns of the episodes that the last actions ended."""
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Actions:
    """The answer to `Act`: `action` [n, ...]; for an actor that assembles unrolls also `record.*`, and where one begins
    or this inference node is new to the group, `state.*` before these actions."""

    KIND: ClassVar[str] = "actions"
    version: int
    """Updates at the weights that chose them."""
    learner_epoch: int


@dataclass(frozen=True, slots=True)
class Gradient:
    """A worker's gradient for the parameter server; the arrays are one per parameter, under its name."""

    KIND: ClassVar[str] = "gradient"
    number: int
    """Counted by the worker within its life, from 1: the server applies each once."""
    version: int
    """Updates at the parameters that it was computed with."""
    env_steps: int
    """Rows that it was computed from."""
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameter server's answer; the arrays are its newest parameters."""

    KIND: ClassVar[str] = "parameters"
    env_steps: int
    updates: int
    verdict: str
    """What became of the gradient: `applied`, `duplicate` (applied before), `held` (not now), or why it was refused."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A learner asks a replay node for items. The arrays `id` and `priority` [K], which may be missing, are new
    priorities of items that were drawn earlier."""

    KIND: ClassVar[str] = "sample"
    count: int
    """Items wanted; 0 asks for the totals alone."""
    life: int = 0
    """Of the replay node, whose items `id` names: another one may have given the same numbers to others."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The answer to `Sample`: items as the columns of an unroll [T(+1), n, ...] whose `version` is [T, n]; `id` [n]
    int64, and `probability` [n] float64 with which each was drawn among this node's."""

    KIND: ClassVar[str] = "sampled"
    items: int
    """Held by this node when it drew."""
    mass: float
    """Sum of what their probabilities are in proportion to."""
    env_steps: int
    """Played for what this node ever took in."""
    waits: str = ""
    """Why there are no items, and for whom this node waits."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What a learner tells the other replicas: always the whole truth, so that the newest one is enough."""

    KIND: ClassVar[str] = "vote"
    generation: int
    """Of the group that it is in."""
    ready: int
    """It has a batch for each update up to this one, and goes through with them."""
    rows: int
    """Environment steps of the batch of its next update."""
    held: bool
    """It promises no more updates for now."""
    digests: list[tuple[int, int]] = field(default_factory=list)
    """(update, digest of its parameters after that) of the last few."""


@dataclass(frozen=True, slots=True)
class Tally:
    """A learner tells its actor how many workers have played their rollouts for an update."""

    KIND: ClassVar[str] = "tally"
    update: int
    done: int
    workers: int


@dataclass(frozen=True, slots=True)
class Group:
    """Learners that train as one. The controller alone says who they are, so that there are never two such groups."""

    generation: int
    """Counts groups."""
    members: dict[str, int]
    """Learner → its life, in the order of their ranks; the first leads: it publishes weights and saves."""
    store: str
    """Where they meet: host:port at the first member."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What the controller must know of a learner to put it into a group."""

    store: str
    """Where others could meet here: host:port."""
    group: Group | None = None
    """That it is in."""
    broken: int = 0
    """Generation of the last group that failed it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean return of pinned weights, played with exploration off unless the topology says otherwise."""

    mean_return: float
    episodes: int
    version: int
    learner_epoch: int
    env_steps: int
    confirm: int = 0
    number: int = 0
    """Counted by the evaluator, so that a repeated report counts once."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A node's application heartbeat; the controller answers with `Control`."""

    KIND: ClassVar[str] = "progress"
    role: str
    state: NodeState
    pid: int
    host: str
    topology: str
    """Digest of the expanded topology: nodes of different topologies refuse each other."""
    package: str
    """Version of this package."""
    started: float
    """Seconds since 1970, for people."""
    counters: dict[str, int] = field(default_factory=dict)
    """The node's ledger."""
    earlier: dict[str, dict[str, int]] = field(default_factory=dict)
    """Life → ledger of an earlier life of this node that the controller may not know to its end: it may have died."""
    gauges: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    replica: Replica | None = None
    done: str | None = None
    """Why this node finished its share of the run (`steps`), if it did."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """What the controller wants of everybody: always the whole truth, so that the newest one is enough."""

    KIND: ClassVar[str] = "control"
    phase: Phase = "run"
    confirm: int = 0
    """Number of the confirmation asked for: the learner holds still, the evaluator plays its weights."""
    draining: list[str] = field(default_factory=list)
    """Nodes that shall flush what they hold, report and leave."""
    reason: str = ""
    group: Group | None = None
    """Learners that train as one, where there are several."""


@dataclass(frozen=True, slots=True)
class Join:
    """Somebody asks the controller for the topology, to run the share of `host`, one process, or added nodes."""

    KIND: ClassVar[str] = "join"
    versions: dict[str, str | None]
    """Of that installation."""
    host: str = ""
    """As the topology names it; where nodes are added, a name of its own will do."""
    process: str = ""
    group: str = ""
    """To which `count` nodes are to be added."""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer to `Join`; the array `topology` [bytes] uint8 is the locked topology."""

    KIND: ClassVar[str] = "joined"
    digest: str
    """SHA-256 of the topology, in hex."""
    versions: dict[str, str | None]
    """Of the controller's installation."""
    lives: dict[str, int]
    """Node that is asked for → epoch of its newest life, if there was one."""
    present: list[str]
    """Nodes that are asked for and are there already."""
    added: list[str] = field(default_factory=list)
    """Names of the nodes to add, which nobody else is given."""


STATUS: str = "status"
"""Request to the controller: answers with `StatusReply`."""
STOP: str = "stop"
"""Request to the controller: drain everybody; answers with the control in force."""

PULL: str = "pull"
"""Request to the parameter server: answers with `Parameters`, verdict `pulled`."""

M = TypeVar(
    "M",
    Trajectory,
    Weights,
    Act,
    Actions,
    Gradient,
    Parameters,
    Sample,
    Sampled,
    Vote,
    Tally,
    Progress,
    Control,
    Join,
    Joined,
)


_CLASSES: tuple[type[Any], ...] = M.__constraints__
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in _CLASSES}
_NAMES = {cls: tuple(f.name for f in fields(cls)) for cls in _CLASSES}


def fields_of(
    message: Trajectory
    | Weights
    | Act
    | Actions
    | Gradient
    | Parameters
    | Sample
    | Sampled
    | Vote
    | Tally
    | Progress
    | Control
    | Join
    | Joined,
) -> dict[str, Any]:
    """The map of scalars that travels for `message`."""
    if isinstance(message, Progress | Control):  # they hold dataclasses; these are seldom sent
        return asdict(message)
    return {name: getattr(message, name) for name in _NAMES[type(message)]}


def parse(cls: type[M], message: Message) -> M:
    """The `cls` in `message`.

    Raises:
        WireError: `kind` or `fields`, when it is something else.
    """
    if message.kind != cls.KIND:
        raise WireError("kind", f"got {message.kind!r}, expected {cls.KIND!r}")
    try:
        parsed: M = _ADAPTERS[cls].validate_python(message.fields)
    except ValidationError as error:
        raise WireError("fields", f"{cls.KIND}: {error.errors(include_url=False)[0]['msg']}") from None
    return parsed
