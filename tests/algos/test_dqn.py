"""DQN's loss and first priorities against twins written from the papers, and chains whose Q is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from played import ENVS, play
from rows import DISCRETE, B, T, assert_same_loss_and_gradient, make_batch
from test_q_learning import learner_of
from test_returns import slow_rescale, slow_unrescale

from ddrl_bus.algos import Batch, Spaces, make_policy, memory
from ddrl_bus.algos.base import Windows
from ddrl_bus.algos.dqn import Dqn, DqnConfig


def slow_targets(learner: Dqn, batch: Batch) -> list[float]:
    """y of each column: rewards summed to the first end, and Q of what is there."""
    c, targets = learner.config, []
    final = dict(zip(batch.final_index.tolist(), batch.final_obs, strict=True))
    columns = batch.reward.shape[1]
    for b in range(columns):
        total, discount, following = 0.0, 1.0, None
        for t in range(len(batch.reward)):
            total += discount * c.reward_scale * float(batch.reward[t, b])
            discount *= c.gamma
            following = final[t * columns + b] if batch.truncated[t, b] else batch.obs[t + 1, b]
            if batch.terminated[t, b]:
                following = None
            if batch.terminated[t, b] or batch.truncated[t, b]:
                break
        if following is not None:
            q, target_q = (net.step(following[None], {})[0].q[0] for net in (learner.net, learner.target))
            bootstrap = float(target_q[q.argmax()] if c.double else target_q.max())
            total += discount * (slow_unrescale(bootstrap) if c.rescale else bootstrap)
        targets.append(slow_rescale(total) if c.rescale else total)
    return targets


def slow_loss(learner: Dqn, batch: Batch) -> torch.Tensor:
    total, targets = torch.zeros((), dtype=torch.float64), slow_targets(learner, batch)
    for b, target in enumerate(targets):
        error = target - learner.net.step(batch.obs[0, b][None], {})[0].q[0, batch.action[0, b]]
        delta = learner.config.huber
        large = delta and abs(error.item()) > delta
        loss = delta * (error.abs() - delta / 2) if large else error**2 / 2
        total = total + (1.0 if batch.weight is None else float(batch.weight[b])) * loss
    return total / len(targets)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"double": False, "dueling": False, "gamma": 0.5, "hidden": ()},
        {"rescale": True, "huber": 0.5, "activation": "tanh"},
        {"reward_clip": "one", "huber": 0.01},
    ],
)
def test_loss_and_gradient_equal_the_papers_column_by_column(changes: dict[str, Any], seed: int) -> None:
    learner = learner_of("dqn", **{"reward_scale": 1.0, **changes})
    learner.net.double()
    learner.target.double()
    batch = make_batch(seed, dtype=np.float64)
    if "reward_clip" in changes:
        batch.reward = 3 * batch.reward
        slow = dataclasses.replace(batch, reward=batch.reward.clip(-1, 1)).to("cpu")
        assert_same_loss_and_gradient(learner, batch.to("cpu"), lambda learner, _: slow_loss(learner, slow))
        return
    batch.weight = np.random.default_rng(seed).random(B)
    assert_same_loss_and_gradient(learner, batch.to("cpu"), slow_loss)
    assert learner.errors is not None


def test_double_q_by_hand() -> None:
    """One row: r = 1, γ = ½; the network likes action 2 best, which the target network values at 4, and 1 most, 6."""
    one = np.ones((2, 1, 4), np.float32)
    row = np.zeros((1, 1), np.float32)
    batch = Batch(one, row.astype(int), row + 1, row > 0, row > 0, {}, row.astype(int), one[0, :0], np.zeros(0, int))
    for double, target in ((True, 1 + 0.5 * 4), (False, 1 + 0.5 * 6)):
        learner = learner_of("dqn", hidden=(), dueling=False, double=double, n_step=1, gamma=0.5, reward_scale=1.0)
        with torch.no_grad():
            learner.net.q.weight.zero_()
            learner.target.q.weight.zero_()
            learner.net.q.bias[:] = torch.tensor([0.5, 1.0, 2.0])
            learner.target.q.bias[:] = torch.tensor([5.0, 6.0, 4.0])
        loss, report = learner.loss(batch.to("cpu"))
        assert report["target"].item() == target
        assert loss.item() == pytest.approx((target - 0.5) ** 2 / 2)
        assert learner.errors == pytest.approx([target - 0.5])


def test_a_stack_is_what_was_seen_and_goes_on_into_final_observations() -> None:
    """The same loss as of a network that is given the stacked observations as they are."""
    stacked, plain = (Spaces((shape,), "float32", "discrete", 3, stack=stack) for shape, stack in ((2, 3), (6, 1)))
    learner = learner_of("dqn", stacked, n_step=4)
    twin = Dqn(learner.config, plain, seed=0)
    twin.load_state(learner.state())
    policy = make_policy(Dqn, learner.config, stacked, seed=0)
    played = play(policy, stacked, 12, ends=0.15)
    assert played.finals
    for start in range(8):
        batch = played.window(start, 4)
        rows = [
            np.concatenate([played.states[t][memory.FRAMES], played.obs[t][:, None]], axis=1)
            for t in range(start, start + 5)
        ]
        finals = [
            np.concatenate([rows[t][n, 1:], obs[None]])
            for (t, n), obs in zip(
                (divmod(int(index), ENVS) for index in batch.final_index), batch.final_obs, strict=True
            )
        ]
        flat = dataclasses.replace(
            batch,
            obs=np.stack(rows).reshape(5, ENVS, 6),
            final_obs=np.array(finals, np.float32).reshape(-1, 6),
            state={},
        )
        learner.loss(batch.to("cpu"))
        twin.loss(flat.to("cpu"))
        assert learner.errors is not None
        assert twin.errors is not None
        np.testing.assert_allclose(learner.errors, twin.errors, rtol=1e-4, atol=1e-6)


# ── first priorities


def test_windows_begin_at_every_row_and_overlap_by_their_length() -> None:
    found = Dqn.windows(DqnConfig(unroll=10, n_step=3, alpha=0.7, beta=0.2))
    assert found == Windows(rows=13, overlap=3, length=3, starts=10, alpha=0.7, beta=0.2)


@pytest.mark.parametrize("changes", [{}, {"rescale": True, "reward_clip": "one"}, {"dueling": False, "double": False}])
@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_first_priorities_are_the_learners_errors(n_step: int, changes: dict[str, Any]) -> None:
    """With the same weights in all three places; but for what the actor could not see: final observations."""
    settings = {"n_step": n_step, "unroll": 12, "reward_scale": 1.0, **changes}
    learner = learner_of("dqn", **settings)
    learner.target.load_state_dict(learner.net.state_dict())
    policy = make_policy(Dqn, learner.config, DISCRETE, seed=0)
    policy.load(learner.weights())
    played = play(policy, DISCRETE, 12 + n_step, ends=0.06)
    first = Dqn.priorities(learner.config, played.rows, played.record)
    assert first.shape == (12, ENVS)
    assert first.dtype == np.float32
    seen = 0
    for start in range(12):
        batch = played.window(start, n_step)
        learner.loss(batch.to("cpu"))
        cut = batch.truncated.any(axis=0)
        seen += int((~cut).sum())
        assert learner.errors is not None
        np.testing.assert_allclose(first[start, ~cut], learner.errors[~cut], rtol=1e-3, atol=1e-5)
    assert seen > 30


def test_a_first_priority_bootstraps_from_the_last_value_known_before_a_time_limit() -> None:
    """By hand: r = 1, γ = ½, n = 2; Q of the actions taken 0, and the best 10, 20, 30 row by row."""
    config = DqnConfig(unroll=1, n_step=2, gamma=0.5, reward_scale=1.0)
    rows = {name: np.zeros((3, 4), bool) for name in ("terminated", "truncated")}
    rows["reward"] = np.ones((3, 4), np.float32)
    rows["truncated"][0, 0] = rows["truncated"][1, 1] = rows["terminated"][1, 2] = True
    record = {"q": np.zeros((3, 4), np.float32), "max_q": np.tile(np.array([[10], [20], [30]], np.float32), (1, 4))}
    expected = [1 + 0.5 * 10, 1.5 + 0.25 * 20, 1.5, 1.5 + 0.25 * 30]
    assert Dqn.priorities(config, rows, record).tolist() == [expected]


# ── learning


def chain(n: int, count: int, rng: np.random.Generator) -> Batch:
    """Windows of two states, one-hot. In either, action 0 leads to the other one, with reward 1 out of state 1, and
    action 1 ends the episode, with reward ½. The first action is anything, those after it
    are the best; a fifth of the rows meets a time limit, after which another episode begins anywhere.
    """
    state, action = np.empty((n + 1, count), int), np.zeros((n, count), int)
    state[0], action[0] = rng.integers(0, 2, count), rng.integers(0, 2, count)
    reward, terminated, truncated = np.empty((n, count), np.float32), action == 1, rng.random((n, count)) < 0.2
    truncated &= ~terminated
    finals = []
    for t in range(n):
        reward[t] = np.where(terminated[t], 0.5, state[t])
        following = 1 - state[t]
        finals.append(following[truncated[t]])
        state[t + 1] = np.where(terminated[t] | truncated[t], rng.integers(0, 2, count), following)
    eye = np.eye(2, dtype=np.float32)
    version = np.zeros((n, count), np.int64)
    index = np.flatnonzero(truncated)
    return Batch(eye[state], action, reward, terminated, truncated, {}, version, eye[np.concatenate(finals)], index)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"dueling": False, "double": False}, {"rescale": True}])
def test_a_chain_reaches_its_known_q(n: int, changes: dict[str, Any]) -> None:
    """Q(1, 0) = 1 + γ Q(0, 0) and Q(0, 0) = γ Q(1, 0), which is more than to end it."""
    rng, gamma = np.random.default_rng(n), 0.6
    settings = DqnConfig(
        hidden=(), n_step=n, gamma=gamma, reward_scale=1.0, optimizer="sgd", lr=0.7, target_every=4, **changes
    )
    learner = Dqn(settings, Spaces((2,), "float32", "discrete", 2), seed=0)
    for _ in range(160):
        learner.step(chain(n, 32, rng))
    loop = 1 / (1 - gamma**2)
    expected = np.array([[gamma * loop, 0.5], [loop, 0.5]])
    if "rescale" in changes:
        expected = np.vectorize(slow_rescale)(expected)
    q = learner.net.step(torch.eye(2), {})[0].q.detach().numpy()
    np.testing.assert_allclose(q, expected, atol=0.01)


def test_a_window_of_rows_after_an_end_does_not_count() -> None:
    learner = learner_of("dqn")
    batch = make_batch()
    batch.terminated[:], batch.truncated[:] = False, False
    batch.terminated[2, :] = True
    batch.final_obs, batch.final_index = batch.final_obs[:0], batch.final_index[:0]
    loss = learner.loss(batch.to("cpu"))[0].item()
    batch.reward[3:], batch.obs[3:] = 99, 99
    assert learner.loss(batch.to("cpu"))[0].item() == loss
    batch.reward[2] += 1
    assert learner.loss(batch.to("cpu"))[0].item() != loss
    assert T > 3
