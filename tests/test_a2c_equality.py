"""A2C in three processes is A2C: a learner that waits for its actors learns bit for bit what one process learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, assert_closed, command

from ddrl_bus import checkpoint
from ddrl_bus.algos.a2c import A2C, A2CConfig
from ddrl_bus.bench.control import Training
from ddrl_bus.envs import EnvConfig

SEED, UPDATES, ENVS = 7, 20, 8
SETTINGS = A2CConfig(unroll=40, batch=2 * ENVS, hidden=(16, 16), lr=0.01, anneal_steps=100_000)
TOPOLOGY = f"""
name: lockstep
seed: {SEED}
env: {{id: CartPole-v1, max_episode_steps: 30}}
algo: {{name: a2c, unroll: 40, batch: {2 * ENVS}, hidden: [16, 16], lr: 0.01, anneal_steps: 100_000}}
nodes:
  actor: {{count: 2, envs: {ENVS}}}
  learner: {{device: cpu}}
  evaluator: {{episodes: 2, every: 200ms}}
stop: {{steps: {UPDATES * 40 * 2 * ENVS}}}
"""


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """As nodes set it: sums have another order with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_three_processes_learn_what_one_does_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "lockstep.yaml").write_text(TOPOLOGY)
    run = Run(
        tmp_path / "run", command("run", "--json", str(tmp_path / "lockstep.yaml"), "--run-dir", f"{tmp_path}/run")
    )
    try:
        ended = run.ends()
        balance = run.books()
    finally:
        run.close()
    assert ended["reason"] == "steps"
    assert_closed(balance)
    assert run.counters("learner-0")["trajectories/trained"] == 2 * UPDATES

    lags = [
        record["nodes"]["learner-0"]["lag_max"]
        for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        if "lag_max" in (record := json.loads(line))["nodes"].get("learner-0", {})
    ]
    assert lags
    assert set(lags) == {0.0}

    training = Training(EnvConfig("CartPole-v1", max_episode_steps=30), A2C, SETTINGS, envs=ENVS, seed=SEED)
    for _ in range(UPDATES):
        training.update()
    training.close()
    saved = checkpoint.newest(run.folder / "checkpoints")
    assert saved is not None
    state = training.learner.state()
    assert saved.arrays.keys() == state.keys()
    different = [name for name, array in state.items() if not np.array_equal(saved.arrays[name], array)]
    assert not different
    assert saved.values["updates"] == UPDATES
