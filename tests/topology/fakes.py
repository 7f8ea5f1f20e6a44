"""A catalog with two algorithms, wired as IMPALA and as Ape-X are, and helpers to load a topology from text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ddrl_bus.algos.base import Windows
from ddrl_bus.errors import Problem, TopologyError
from ddrl_bus.topology import AlgorithmEntry, Catalog, Plan, load

TOPOLOGIES = Path(__file__).parents[2] / "topologies"


@dataclass(frozen=True)
class Config:
    lr: float = 6e-4
    """Adam's step size."""
    unroll: int = 20
    """Steps per unroll."""
    batch: int = 64
    gamma: float = 0.99
    entropy_cost: float = 0.01
    hidden: tuple[int, ...] = (64, 64)
    reduction: Literal["sum", "mean"] = "sum"
    clip: float | None = 40.0
    anneal: bool = False
    preempt: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma > 1:
            raise ValueError(f"gamma: got {self.gamma}, expected at most 1")


WIRING: Mapping[str, Mapping[str, object]] = {
    "trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 2},
    "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
}
REPLAY_WIRING: Mapping[str, Mapping[str, object]] = {
    "trajectories": {"kind": "queue", "from": "actor", "to": "replay", "window": 2},
    "samples": {"kind": "request", "from": "learner", "to": "replay"},
    "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
}


def windows(config: Config) -> Windows:
    """Of three rows, one from each new row."""
    return Windows(rows=config.unroll + 3, overlap=3, length=3, starts=config.unroll)


CATALOG = Catalog(
    {"impala": AlgorithmEntry(Config, WIRING), "dqn": AlgorithmEntry(Config, REPLAY_WIRING, windows=windows)}
)

HEAD = "name: t\nenv: {id: CartPole-v1}\nalgo: {name: impala}\n"
NODES = "nodes: {actor: {count: 2, envs: 32}, learner: {}}\n"
BASE = HEAD + NODES

# The wirings of the reference files, small. Line 4 is `nodes:`, line 5 `links:`.
LOCK_STEP = "{from: actor, to: learner, window: 1, max_lag: 0}"
A3C = (
    HEAD.replace("impala", "impala, batch: 16")
    + "nodes: {actor: {count: 2, envs: 16, bundle: w}, learner: {count: 2, bundle: w}, param_server: {}}\n"
    + f"links:\n  trajectories: {LOCK_STEP}\n  weights: {{from: learner, to: actor}}\n"
    + "  gradients: {from: learner, to: param_server}\n  parameters: {from: param_server, to: evaluator}\n"
)
DDPPO = (
    HEAD.replace("impala", "impala, batch: 16, preempt: 0.6")
    + "nodes: {actor: {count: 2, envs: 16, bundle: w}, learner: {count: 2, bundle: w}}\n"
    + f"links:\n  trajectories: {LOCK_STEP}\n  weights: {{from: learner, to: [actor, evaluator]}}\n"
    + "  sync: {from: learner, to: learner}\n  tally: {from: learner, to: actor}\n"
)
GA3C = (
    HEAD
    + "nodes: {actor: {count: 2, envs: 32}, inference: {}, learner: {}}\n"
    + "links:\n  act: {}\n  trajectories: {from: actor}\n  weights: {to: [inference, evaluator]}\n"
)
SEED = GA3C.replace("{from: actor}", "{from: inference}")
APEX = (
    HEAD.replace("impala", "dqn")
    + "nodes: {actor: {count: 2, envs: 8}, replay: {count: 2}, learner: {}}\n"
    + "links:\n  trajectories: {from: actor, to: replay}\n  samples: {}\n  weights: {to: [actor, evaluator]}\n"
)
SEED_R2D2 = (
    APEX.replace("replay: {count", "inference: {}, replay: {count")
    .replace("from: actor,", "from: inference,")
    .replace("[actor, ev", "[inference, ev")
    + "  act: {}\n"
)
GORILA = (
    APEX.replace("envs: 8}", "envs: 8, bundle: w}")
    .replace("replay: {count: 2}", "replay: {count: 2, bundle: w}")
    .replace("learner: {}", "learner: {count: 2, bundle: w, outliers: 3}, param_server: {count: 2}")
    .replace("[actor, evaluator]", "actor")
    + "  gradients: {}\n  parameters: {}\n"
)
GORILA_GLOBAL = GORILA.replace("replay: {count: 2, bundle: w}", "replay: {count: 3}")


def load_text(tmp_path: Path, text: str | bytes, *overrides: str, **options: Any) -> Plan:
    path = tmp_path / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, overrides=overrides, **{"catalog": CATALOG, "environ": {}, **options})


def problems(tmp_path: Path, text: str | bytes, *overrides: str, **options: Any) -> Sequence[Problem]:
    """What `load` refuses `text` for; files are shortened to their name."""
    with pytest.raises(TopologyError) as caught:
        load_text(tmp_path, text, *overrides, **options)
    return [
        Problem(p.file.replace(f"{tmp_path}/", ""), p.line, p.column, p.path, p.message) for p in caught.value.problems
    ]
