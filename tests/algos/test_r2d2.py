"""R2D2's loss against a twin that steps the network row by row, its burn-in, and its priorities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from played import ENVS, Played, play
from rows import DISCRETE, assert_same_loss_and_gradient
from test_q_learning import learner_of
from test_returns import slow_rescale, slow_unrescale

from ddrl_bus.algos import Batch, make_policy, memory
from ddrl_bus.algos.base import Windows
from ddrl_bus.algos.q_learning import QLearning
from ddrl_bus.algos.r2d2 import R2d2, R2d2Config

BURN_IN, UNROLL = 3, 8


def sequences(learner: QLearning[Any], *, start: int = 4, ends: float = 0.1, seed: int = 0) -> tuple[Played, Batch]:
    """A whole sequence that begins in the midst of episodes."""
    policy = make_policy(type(learner), learner.config, DISCRETE, seed=0)
    policy.load(learner.weights())
    played = play(policy, DISCRETE, start + BURN_IN + UNROLL, seed=seed, ends=ends)
    return played, played.window(start, BURN_IN + UNROLL)


def recurrent(**changes: Any) -> QLearning[Any]:
    return learner_of("r2d2", **{"burn_in": BURN_IN, "unroll": UNROLL, "n_step": 3, **changes})


def walk(learner: QLearning[Any], net: Any, batch: Batch, b: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Q of each of T+1 rows of a column, and of each of T rows' true successors; a step of the network at a time."""
    final = dict(zip(batch.final_index.tolist(), batch.final_obs, strict=True))
    state = {name: array[b : b + 1] for name, array in batch.state.items()}
    length, columns = batch.reward.shape
    rows, successors = [], {}
    for t in range(length + 1):
        with torch.set_grad_enabled(t >= learner.config.burn_in):
            (q,), state = net.step(batch.obs[t, b][None], state)
        rows.append(q[0])
        if t == length:
            break
        if memory.LAST_ACTION in state:
            state = {**state, memory.LAST_ACTION: batch.action[t, b][None] + 1}
            state[memory.LAST_REWARD] = batch.reward[t, b][None].clamp(-1, 1)
        if batch.truncated[t, b]:
            successors[t] = net.step(final[t * columns + b][None], state)[0].q[0]
        if batch.truncated[t, b] or batch.terminated[t, b]:
            state = {name: torch.zeros_like(array) for name, array in state.items()}
    return rows, [successors.get(t, rows[t + 1]) for t in range(length)]


def slow_errors(learner: QLearning[Any], batch: Batch, b: int) -> list[torch.Tensor]:
    """y - Q of the trained rows of a column."""
    c, errors = learner.config, []
    rows, online = walk(learner, learner.net, batch, b)
    _, target = walk(learner, learner.target, batch, b)
    for start in range(c.burn_in, len(batch.reward)):
        total, discount, bootstrap = 0.0, 1.0, 0.0
        for t in range(start, min(start + c.n_step, len(batch.reward))):
            total += discount * c.reward_scale * float(batch.reward[t, b])
            discount *= c.gamma
            chosen = online[t] if c.double else target[t]
            bootstrap = 0.0 if batch.terminated[t, b] else float(target[t][chosen.argmax()])
            if batch.terminated[t, b] or batch.truncated[t, b]:
                break
        y = total + discount * (slow_unrescale(bootstrap) if c.rescale else bootstrap)
        errors.append((slow_rescale(y) if c.rescale else y) - rows[start][batch.action[start, b]])
    return errors


def slow_loss(learner: QLearning[Any], batch: Batch) -> torch.Tensor:
    columns = [torch.stack([e**2 / 2 for e in slow_errors(learner, batch, b)]).mean() for b in range(ENVS)]
    return torch.stack(columns) @ batch.weight / ENVS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"core": "gru", "last_inputs": True, "rescale": False, "double": False, "gamma": 0.7},
        {"core": "none", "dueling": False},
        {"n_step": 20},
    ],
)
def test_loss_and_gradient_equal_a_walk_row_by_row(changes: dict[str, Any], seed: int) -> None:
    learner = recurrent(**changes)
    _, batch = sequences(learner, seed=seed)
    learner.net.double()
    learner.target.double()
    batch = batch.to("cpu").map(lambda array: array.double() if array.is_floating_point() else array)
    batch.weight = torch.tensor(np.random.default_rng(seed).random(ENVS))
    assert (batch.terminated | batch.truncated)[BURN_IN:].any()
    assert_same_loss_and_gradient(learner, batch, slow_loss)
    errors = [torch.stack(slow_errors(learner, batch, b)).detach().abs() for b in range(ENVS)]
    mixed = [0.9 * e.max() + 0.1 * e.mean() for e in errors]
    np.testing.assert_allclose(learner.errors, mixed, rtol=1e-5)


def test_no_gradient_flows_through_the_burn_in() -> None:
    """But its rows decide the state that the trained ones begin in."""
    learner = recurrent()
    _, batch = sequences(learner, ends=0.0)
    batch.obs = batch.obs.copy()
    tensors = batch.to("cpu")
    tensors.obs.requires_grad_()
    learner.loss(tensors)[0].backward()
    by_row = tensors.obs.grad.abs().sum(dim=(1, 2))
    assert (by_row[:BURN_IN] == 0).all()
    assert (by_row[BURN_IN:-1] > 0).all()
    learner.loss(batch.to("cpu"))
    before = learner.errors
    batch.obs[0] += 1
    learner.loss(batch.to("cpu"))
    assert np.abs(learner.errors - before).max() > 1e-4


def test_burn_in_leads_to_the_state_that_acting_had() -> None:
    """With the same weights, whatever the stored state; with others, both networks begin in states of their own."""
    learner = recurrent(core_size=5)
    played, batch = sequences(learner, ends=0.05)
    states: list[torch.Tensor] = []
    core = learner.net.core
    run = core._run
    core._run = lambda rows, carried: states.append(carried) or run(rows, carried)
    learner.loss(batch.to("cpu"))
    # The layer runs from row 0, from each row that an episode begins at, from the first trained row, and once for
    # final observations.
    begun = (batch.terminated | batch.truncated).any(axis=1)
    cuts = sorted({0, BURN_IN, *(np.flatnonzero(begun) + 1)})
    for row, carried in zip(cuts, states, strict=False):
        for name, array in zip(("h", "c"), carried, strict=True):
            np.testing.assert_allclose(array[0].detach(), played.states[4 + row][name], atol=1e-5)
    assert abs(played.states[4 + BURN_IN]["h"]).max() > 0.01


# ── priorities


def test_sequences_overlap_by_the_burn_in() -> None:
    found = R2d2.windows(R2d2Config(unroll=10, burn_in=4, alpha=0.7, beta=0.2))
    assert found == Windows(rows=14, overlap=4, length=14, starts=1, alpha=0.7, beta=0.2)


@pytest.mark.parametrize("changes", [{}, {"rescale": False, "core": "none"}])
def test_acting_errors_are_the_learners(changes: dict[str, Any]) -> None:
    """With the same weights in all three places; but for what the actor could not see: final observations, and the row
    after the last."""
    learner = recurrent(**changes)
    learner.target.load_state_dict(learner.net.state_dict())
    played, batch = sequences(learner, start=0, ends=0.06)
    found = R2d2.acting_errors(learner.config, played.rows, played.record)
    errors = learner.loss(batch.to("cpu"))[1]["td_error"]
    compared = 0
    for b in range(ENVS):
        for t in range(BURN_IN, BURN_IN + UNROLL):
            ended = np.flatnonzero((batch.terminated | batch.truncated)[t : t + 3, b])
            last = t + (int(ended[0]) if len(ended) else 2)
            if batch.truncated[min(last, len(batch.reward) - 1), b] or last >= len(batch.reward) - 1:
                continue
            assert found[t, b] == pytest.approx(errors[t - BURN_IN, b].item(), rel=1e-3, abs=1e-5)
            compared += 1
    assert compared > 20
    first = R2d2.priorities(learner.config, played.rows, played.record)
    trained = found[BURN_IN:]
    np.testing.assert_allclose(first, [0.9 * trained.max(axis=0) + 0.1 * trained.mean(axis=0)], rtol=1e-5)
    assert (first.dtype, first.shape) == (np.float32, (1, ENVS))


def test_a_first_priority_by_hand() -> None:
    """γ = ½, n = 2, no rescaling, one row of burn-in. Targets: 1 + ½·1 + ¼·40 = 11.5, cut by the sequence's end to
    1 + ½·1 + ¼·40 = 11.5, whose last row has no successor, and 1 + ½·40 = 21; Q is 0."""
    config = R2d2Config(burn_in=1, unroll=3, n_step=2, gamma=0.5, rescale=False, eta=0.75)
    ends = np.zeros((4, 1), bool)
    rows = {"terminated": ends, "truncated": ends, "reward": np.ones((4, 1), np.float32)}
    record = {"q": np.zeros((4, 1), np.float32), "max_q": np.array([[10], [20], [30], [40]], np.float32)}
    expected = 0.75 * 21 + 0.25 * (11.5 + 11.5 + 21) / 3
    assert R2d2.priorities(config, rows, record).tolist() == [[pytest.approx(expected)]]


# ── learning


def recall(rng: np.random.Generator) -> Batch:
    """A cue in the first row, ±1, decides which of two actions is worth 1 in the fourth; episodes of four rows."""
    count, length = 32, 8
    obs = np.zeros((length + 1, count, 2), np.float32)
    cue = rng.integers(0, 2, (3, count))
    for episode in range(3):
        obs[4 * episode :: 4][:1, :, 0] = 2 * cue[episode] - 1
    obs[3::4, :, 1] = 1
    action = rng.integers(0, 2, (length, count))
    terminated = np.zeros((length, count), bool)
    terminated[3::4] = True
    reward = np.where(terminated, action == np.repeat(cue[:2], 4, axis=0), 0).astype(np.float32)
    none = np.zeros(0, np.int64)
    state = {name: np.zeros((count, 8), np.float32) for name in ("h", "c")}
    return Batch(obs, action, reward, terminated, np.zeros_like(terminated), {}, action, obs[0, :0], none, state)


@pytest.mark.parametrize("core", ["lstm", "none"])
def test_a_core_remembers_a_cue_and_the_memoryless_control_does_not(core: str) -> None:
    rng = np.random.default_rng(0)
    spaces = dataclasses.replace(DISCRETE, obs_shape=(2,), num_actions=2)
    config = R2d2Config(
        hidden=(8,),
        core=core,
        core_size=8,
        burn_in=1,
        unroll=7,
        n_step=1,
        gamma=0.9,
        rescale=False,
        lr=0.02,
        target_every=10,
    )
    learner = R2d2(config, spaces, seed=0)
    for _ in range(250):
        learner.step(recall(rng))
    batch = recall(rng).to("cpu")
    with torch.no_grad():
        q = learner.net.unroll(batch)[: 8 * 32].view(8, 32, 2)
    worth = q[7].gather(1, ((batch.obs[4, :, 0:1] + 1) / 2).long()).squeeze(1)
    other = q[7].sum(1) - worth
    if core == "none":
        assert worth.mean() == pytest.approx(0.5, abs=0.1)
        assert other.mean() == pytest.approx(0.5, abs=0.1)
    else:
        assert worth.min() > 0.9
        assert other.max() < 0.1
