"""What a topology file may say: one flat pydantic model per section, the kinds of node, and the ports they hold.

The models know types and ranges. What needs more than one section (links, hosts, sizes that must fit) is in
`checks.py`; where a value stands in its file is `tree.py`'s business.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import ipaddress
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic
import pydantic.dataclasses
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from ddrl_bus.errors import DdrlError
from ddrl_bus.topology.tree import Node, Problems, came, dotted

# ── units ────────────────────────────────────────────────────────────────────────────────────────────────────────

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def expected(what: str) -> PydanticCustomError:
    """The error of a validator of ours; `problems_of` words it as "got ..., expected `what`"."""
    return PydanticCustomError("expected", "{what}", {"what": what})


def _in_units(units: Mapping[str, float], what: str) -> Callable[[object], object]:
    pattern = re.compile(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,15}})?) ?({'|'.join(units)})")

    def convert(value: object) -> object:
        if isinstance(value, bool) or value is None or isinstance(value, list | dict):
            raise expected(what)
        if isinstance(value, str):
            if not (match := pattern.fullmatch(value)):
                raise expected(what)
            return float(match[1]) * units[match[2]]
        return value

    return convert


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Duration = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False),
    BeforeValidator(_in_units(_SECONDS, "a duration such as 500ms, 2s, 5m or 1h")),
    WithJsonSchema({"type": ["string", "number"], "pattern": r"^[0-9.]+ ?(us|ms|s|m|h)$"}),
]
"""Seconds; a bare number is seconds too."""

Size = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_whole),
    BeforeValidator(_in_units(BYTES, "a size such as 64MiB or 2GiB")),
    WithJsonSchema({"type": ["string", "integer"], "pattern": r"^[0-9.]+ ?(B|KiB|MiB|GiB|TiB)$"}),
]
"""Bytes; a bare number is bytes too."""


def _names(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise expected("a name or a list of names")


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_names),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""One name or a list of them."""

Count = Annotated[int, Field(ge=1, lt=2**63)]


def _count_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63):
        return value
    raise expected("a whole number of at least 1, or auto")


CountOrAuto = Annotated[
    int | Literal["auto"],
    PlainValidator(_count_or_auto),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
"""A number, or `auto` for one that is found while the run goes on."""

# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Settings(Section):
    """The top level of a topology, apart from its sections."""

    name: str = Field(pattern=r"^[a-z0-9_-]{1,64}$")
    """Names the run directory: lower-case letters, digits, - and _."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Every random stream of the run derives from it."""
    run_id: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Tells runs apart on the wire; default: the first 12 hex digits of the SHA-256 of the expanded topology."""
    port: int = Field(7077, ge=1, le=65535)
    """First tcp port; every host counts up from it."""
    insecure: bool = False
    """Lets every link, `control` and `progress` too, leave its machine without encryption or authentication."""
    grace: Duration = 10.0
    """How long nodes may drain after a stop before they are killed."""


class EnvSettings(Section):
    """The environment, as gymnasium.make_vec is to build it."""

    id: str = Field(min_length=1, max_length=256)
    """Registered gymnasium id."""
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the environment's constructor."""
    vectorization: Literal["auto", "native", "sync"] = "auto"
    """native: the environment's own vector class; sync: one after the other; auto: native where it exists."""
    preset: str | None = None
    """Named set of wrappers."""
    max_episode_steps: Count | None = None
    """Truncates longer episodes; default: the environment's own limit."""


class StopSettings(Section):
    """The first that is reached ends the run; none: it runs until it is stopped."""

    reward: float | None = None
    """Mean return of one evaluation."""
    steps: Count | None = None
    """Environment steps over all actors."""
    time: Duration | None = None
    """Wall time."""


class CheckpointSettings(Section):
    every: Duration = 60.0
    """Time between checkpoints."""
    keep: Count = 3
    """Newest checkpoints that are kept."""


LinkKind = Literal["queue", "latest", "request"]
Precision = Literal["float16", "float32"]


class LinkSettings(Section):
    """One link. A file that writes any writes all; at an end that is left out is every group that may be there."""

    kind: LinkKind | None = None
    """queue: nothing lost silently; latest: the newest value wins; request: an answer, an error or a timeout."""
    sources: Names | None = Field(None, alias="from")
    """Groups that send (queue, latest) or ask (request)."""
    targets: Names | None = Field(None, alias="to")
    """Groups that receive or answer."""
    window: Count | None = None
    """queue: messages a sender may be ahead of a receiver before it waits."""
    on_loss: Literal["count", "resend"] | None = None
    """queue: what becomes of messages that a dead receiver had not acknowledged."""
    max_lag: int | None = Field(None, ge=0, lt=2**63)
    """queue: how many versions behind the learner an unroll may have been made; 0 is lock-step."""
    codec: Literal["none", "lz4", "delta"] | None = None
    """queue: how large arrays travel, none or lz4; default: compressed where that pays. latest: delta sends to other
    hosts what differs from what they hold; default: none."""
    rate: Annotated[Size, Field(gt=0)] | None = None
    """queue: bytes a second that each sender may put on it, however many receivers there are; latest: that a publisher
    may send to other hosts. Default: no limit."""
    relay: bool | None = None
    """weights: a host on which several processes subscribe to another host's gets one copy; default: true."""
    precision: Precision | None = None
    """weights: that they are played by; a learner's own, checkpoints and confirmations are float32. Default: float16
    where the learning rule takes the policy that acted to be another than its own."""
    insecure: bool | None = None
    """Lets this link leave its machine in the open."""


# ── node kinds ───────────────────────────────────────────────────────────────────────────────────────────────────

MAX_NODES = 4096


class NodeOptions(Section):
    """What every kind of node has."""

    kind: str
    """Defaults to the name of the group."""
    count: Annotated[int, Field(ge=0, le=MAX_NODES)] = 1
    """Nodes in the group; 0 leaves it out."""
    host: Names | None = None
    """Host, or hosts dealt round-robin; default: the first host."""
    bundle: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] | None = None
    """Groups of one bundle share processes, index by index; a link inside it joins nodes of one index only."""


Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")]


class ActorOptions(NodeOptions):
    """Steps environments, with the newest weights or with the actions of an inference node."""

    kind: Literal["actor"] = "actor"
    envs: Count = 8
    """Environments per actor, stepped as one vector."""
    groups: Count = 2
    """With `act` only: parts of its environments that step in turn, one while the others wait for actions."""


class LearnerOptions(NodeOptions):
    """Trains, and publishes weights; with `gradients` it has a parameter server apply them. Several without it are
    replicas: each computes gradients of batches of its own, and all apply their mean."""

    kind: Literal["learner"] = "learner"
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto is a GPU where there is one."""
    publish_every: Count = 1
    """Updates between two published versions."""
    delay: int = Field(0, ge=0, lt=2**16)
    """Publishes the weights of so many updates ago: for experiments on staleness."""
    trainers: CountOrAuto = 1
    """Gradients that are computed at a time (GA3C); auto: as many as make the most updates a second."""
    prefetch: Count = 2
    """With `samples`: batches that are drawn ahead."""
    deadline: Annotated[Duration, Field(gt=0)] = 10.0
    """With `sync`: longest time that a replica may keep the others waiting once an update has begun."""
    outliers: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With `gradients`: leaves out a batch whose loss is further above its running mean than so many standard
    deviations (Gorila), unless several in a row are; default: none."""


class EvaluatorOptions(NodeOptions):
    """Plays pinned versions and reports their mean return."""

    kind: Literal["evaluator"] = "evaluator"
    episodes: Count = 20
    """Episodes per evaluation."""
    every: Duration = 1.0
    """Least time between the starts of two evaluations."""
    greedy: bool = True
    """Takes the likeliest action instead of a sampled one."""


class ControllerOptions(NodeOptions):
    """Counts steps, stops the run, answers `ddrl status`; off the data path."""

    kind: Literal["controller"] = "controller"


class InferenceOptions(NodeOptions):
    """Chooses actions for environments that live elsewhere, many at a time."""

    kind: Literal["inference"] = "inference"
    batch: Count = 64
    """Observations after which a batch runs at once."""
    wait: Duration = 0.0
    """Longest time that the oldest request waits for a fuller batch; 0 takes what is there."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto is a GPU where there is one."""
    predictors: CountOrAuto = 1
    """Policies that answer in parallel; auto: as many as make the most steps a second."""


class ParamServerOptions(NodeOptions):
    """Holds the parameters, and applies gradients the moment they come."""

    kind: Literal["param_server"] = "param_server"
    max_staleness: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Updates that a gradient may be behind; older ones are refused and counted. Default: no bound."""
    durable: bool = False
    """Answers a gradient only after a checkpoint holds it."""


class ReplayOptions(NodeOptions):
    """Keeps experience, and draws batches of it for learners; several share it as shards."""

    kind: Literal["replay"] = "replay"
    capacity: Count = 100_000
    """Items per shard (transitions or sequences), rounded up to whole unrolls; above it the oldest go."""
    min_size: Count = 1_000
    """Items in a shard before any is drawn."""
    samples_per_insert: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How often an item is drawn on average; whoever is ahead of that waits. Default: nobody waits."""
    slack: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Drawn items that either side may be ahead by; default: enough for two batches and two unrolls."""
    save: bool = True
    """Its contents are part of checkpoints."""


class RelayOptions(NodeOptions):
    """Forwards the weights of other hosts to the subscribers on its own. The expansion places one on each host where
    that saves copies: what a file says of them, as a lock does, gives way. `links.weights.relay: false` leaves all
    out."""

    kind: Literal["relay"] = "relay"
    count: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1


KINDS: Mapping[str, type[NodeOptions]] = {
    "actor": ActorOptions,
    "learner": LearnerOptions,
    "evaluator": EvaluatorOptions,
    "controller": ControllerOptions,
    "inference": InferenceOptions,
    "param_server": ParamServerOptions,
    "replay": ReplayOptions,
    "relay": RelayOptions,
}


@dataclass(frozen=True)
class PortRule:
    """What a link of this name is: its kind, and the kinds of node that may stand at its ends."""

    kind: LinkKind
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relayed: bool = False
    """Between hosts by way of relays."""

    def __str__(self) -> str:
        """`queue, actor → learner`"""
        return f"{self.kind}, {', '.join(self.sources)} → {', '.join(self.targets)}"


PORTS: Mapping[str, PortRule] = {
    "trajectories": PortRule("queue", ("actor", "inference"), ("learner", "replay")),
    "samples": PortRule("request", ("learner",), ("replay",)),
    "weights": PortRule("latest", ("learner",), ("actor", "inference", "evaluator"), relayed=True),
    "act": PortRule("request", ("actor",), ("inference",)),
    "gradients": PortRule("request", ("learner",), ("param_server",)),
    "parameters": PortRule("latest", ("param_server",), ("evaluator",)),
    "sync": PortRule("latest", ("learner",), ("learner",)),
    "tally": PortRule("latest", ("learner",), ("actor",)),
}
RELAYED = tuple(name for name, rule in PORTS.items() if rule.relayed)
_OTHERS = tuple(kind for kind in KINDS if kind != "controller")
SYSTEM_PORTS: Mapping[str, PortRule] = {
    "progress": PortRule("request", _OTHERS, ("controller",)),
    "control": PortRule("latest", ("controller",), _OTHERS),
}
"""In every topology."""

SECTIONS = ("extends", "env", "algo", "nodes", "links", "hosts", "stop", "checkpoint")
LOCAL_HOSTS = {"local": "127.0.0.1"}  # a topology without `hosts:`


# ── what the topology is told of algorithms and environments ─────────────────────────────────────────────────────


@dataclass(frozen=True)
class AlgorithmEntry:
    """An algorithm: `config` is a frozen dataclass, `wiring` its links as a topology file would write them."""

    config: type
    wiring: Mapping[str, Mapping[str, object]]
    one_pass: bool = True
    """An update is one gradient, so that somebody else can apply it."""
    windows: Callable[[Any], Any] = lambda config: None
    """Of its Config: how an unroll is replayed, as `algos.base.Windows`; None for a rule that learns from unrolls as
    they come."""
    acting: Precision = "float32"
    """Of the weights that actors play by; float32 where the rule takes the policy that acted for its own."""


HostKeys = Callable[[str], frozenset[str] | None]
"""Of a host: the kinds of node that its key may stand for, empty for all; None if it has no key on this machine."""


@dataclass(frozen=True)
class Catalog:
    """The algorithms there are; `probe_env` raises EnvError where an environment cannot be made on this host; without
    `keys` no host has one; `invite` says what to type for a host that has none."""

    algorithms: Mapping[str, AlgorithmEntry]
    probe_env: Callable[[EnvSettings], None] | None = None
    keys: HostKeys | None = None
    invite: Callable[[str], str] = lambda host: f"type `ddrl keys new {host}` on {host}"


# ── hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DNS = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,10}\.?")
GROUP_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
ADDRESS = "an address that other hosts can dial, such as 10.0.0.5, gpu0.lan, [fd00::5], or 10.0.0.5:7177"


def split_address(text: str) -> tuple[str, int | None] | None:
    """Address as a URL writes it, and port if one is given; None if `text` is no address that can be dialled."""
    address, port = text, None
    if match := re.fullmatch(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})", text):
        address, port = match[1], int(match[2])
        if not 1 <= port <= 65535:
            return None
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        ip = ipaddress.ip_address(bare)
    except ValueError:
        name = bare.lower()
        if bare != address or not _DNS.fullmatch(name) or name.replace(".", "").isdigit():
            return None
        return ("127.0.0.1" if name == "localhost" else name), port  # a bind needs a number
    if ip.is_unspecified or ip.is_multicast or "%" in bare:
        return None
    return (f"[{ip.compressed}]" if ip.version == 6 else str(ip)), port


def check_hosts(node: Node | None, problems: Problems) -> dict[str, str]:
    """`hosts:` as name -> address or address:port."""
    if node is None or node.value is None:
        return dict(LOCAL_HOSTS)
    if not isinstance(node.value, dict) or not node.value:
        problems.add(node, "hosts", f"got {came(node.plain())}, expected a mapping of host names to addresses")
        return dict(LOCAL_HOSTS)
    hosts = {}
    for name, child in node.value.items():
        path = dotted(("hosts", name))
        if not HOST_NAME.fullmatch(name):
            problems.add(child.key_at or child, path, "a host name is letters, digits, '.', '_' and '-'")
        split = split_address(child.value) if isinstance(child.value, str) else None
        if split is None:
            problems.add(child, path, f"got {came(child.plain())}, expected {ADDRESS}")
        address, port = split or ("", None)
        hosts[name] = address if port is None else f"{address}:{port}"
    return hosts


# ── validation: one section of the tree against one model ────────────────────────────────────────────────────────

T = TypeVar("T")


def validate(
    model: type[T], node: Node, path: tuple[str, ...], problems: Problems, *, known: Iterable[str] = ()
) -> T | None:
    """An instance of `model`, or None with the reasons in `problems`. `known` adds keys for "did you mean"."""
    data = {} if node.value is None else node.plain()
    if not isinstance(data, dict):
        problems.add(node, dotted(path), f"got {came(data)}, expected a mapping")
        return None
    try:
        # through JSON: strict for scalars, while lists may fill tuples
        return TypeAdapter(model).validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        names = [*known, *field_names(model)]
        for detail in error.errors(include_url=False):
            _add(detail, node, path, names, problems)
    except DdrlError as error:  # a Config's own __post_init__
        problems.add(node, dotted(path), str(error))
    return None


def field_names(model: type) -> list[str]:
    if issubclass(model, BaseModel):
        return [field.alias or name for name, field in model.model_fields.items()]
    return [field.name for field in dataclasses.fields(cast(Any, model))]


def _add(detail: ErrorDetails, node: Node, path: tuple[str, ...], names: list[str], problems: Problems) -> None:
    loc = tuple(step for step in detail["loc"] if step != "[key]")
    at = node.find(loc)
    kind = detail["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problems.add(at.key_at or at, dotted((*path, *loc)), f"unknown key; {one_of(str(loc[-1]), names)}")
    elif kind == "missing":
        problems.add(at, dotted((*path, *loc)), "missing, and it has no default")
    else:
        problems.add(at, dotted((*path, *loc)), _message(detail, at))


def one_of(got: str, names: Iterable[str]) -> str:
    """`expected one of ...; did you mean 'x'?`"""
    names = sorted(set(names))
    close = difflib.get_close_matches(got[:64], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected one of {', '.join(names)}{hint}" if names else "expected none here"


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def _message(detail: ErrorDetails, at: Node) -> str:
    kind, context, got = detail["type"], detail.get("ctx", {}), came(at.plain())
    if kind == "expected":
        return f"got {got}, expected {context['what']}"
    if kind in _TYPES:
        quote = " (quote it)" if kind == "string_type" and isinstance(at.value, int | float) else ""
        return f"got {got}, expected {_TYPES[kind]}{quote}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"got {got}, expected {words} {context[key]:,}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"got {got}, {one_of(str(at.value), choices)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"got {got}, expected text like {context['pattern']!s}"
    return f"got {got}; {detail['msg']}"


def config_model(config: type) -> type:
    """An algorithm's Config dataclass as one that pydantic checks strictly; its instances become Configs again."""
    return pydantic.dataclasses.dataclass(
        config, frozen=True, config=ConfigDict(extra="forbid", strict=True, title=config.__qualname__)
    )


def validate_config(config: type, node: Node, path: tuple[str, ...], problems: Problems) -> Any:
    """An instance of the dataclass `config` itself."""
    checked: Any = validate(config_model(config), node, path, problems, known=["name"])
    if checked is None:
        return None
    return config(**{f.name: getattr(checked, f.name) for f in dataclasses.fields(config) if f.init})


# ── JSON Schema, for editors ─────────────────────────────────────────────────────────────────────────────────────


def json_schema(catalog: Catalog) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a topology file, with this catalog's algorithms."""
    models: list[type[BaseModel]] = [EnvSettings, StopSettings, CheckpointSettings, LinkSettings]
    models += KINDS.values()
    _, shared = pydantic.json_schema.models_json_schema(
        [(model, "validation") for model in models], ref_template="#/$defs/{model}"
    )

    def ref(model: type) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{model.__name__}"}

    schema = Settings.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ddrl_bus topology"
    schema["$defs"] = shared["$defs"]
    _describe(schema, Settings)
    for model in models:
        _describe(schema["$defs"][model.__name__], model)
    schema["properties"] |= {
        "extends": {"type": "string", "description": "A topology that this one changes; relative to this file."},
        "env": ref(EnvSettings),
        "algo": {"anyOf": [_algo_schema(name, entry) for name, entry in catalog.algorithms.items()]},
        "nodes": {
            "type": "object",
            "properties": {name: ref(options) for name, options in KINDS.items()},
            "additionalProperties": {"anyOf": [ref(options) for options in KINDS.values()]},
        },
        "links": {
            "type": "object",
            "properties": {name: ref(LinkSettings) for name in {**PORTS, **SYSTEM_PORTS}},
            "additionalProperties": False,
        },
        "hosts": {"type": "object", "additionalProperties": {"type": "string"}},
        "stop": ref(StopSettings),
        "checkpoint": ref(CheckpointSettings),
    }
    for part in (schema, schema["$defs"]["EnvSettings"]):
        del part["required"]  # what is required may come from `extends`
    return schema


def _algo_schema(name: str, entry: AlgorithmEntry) -> dict[str, Any]:
    schema = TypeAdapter(config_model(entry.config)).json_schema()
    _describe(schema, entry.config)
    schema["properties"] = {"name": {"const": name}, **schema["properties"]}
    schema["title"] = name
    schema.pop("required", None)
    return schema


def _describe(schema: dict[str, Any], model: type) -> None:
    """Add the docstrings of a model's fields. Read from its source, and only here: a node has no use for them."""
    docs: dict[str, str] = {}
    for base in reversed(model.__mro__):
        docs |= field_docs(base) if base.__module__ == model.__module__ else {}
    for key, value in schema["properties"].items():
        value |= {"description": docs[key]} if key in docs else {}


def field_docs(config: type) -> dict[str, str]:
    """The string literal that follows each field of a dataclass, by field name."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = inspect.cleandoc(doc)
    return docs
