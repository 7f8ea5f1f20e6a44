"""What rules that learn Q share: acting and exploring, both forwards, weights, the target network."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from played import play
from rows import CONTINUOUS, DISCRETE, B, T, make_batch, truncating

from ddrl_bus.algos import REGISTRY, Spaces, make_policy, memory
from ddrl_bus.algos.config import AgentConfig
from ddrl_bus.algos.dqn import Dqn, DqnConfig
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_policy import NumpyPolicy
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.q_learning import QLearning, epsilons
from ddrl_bus.algos.torch_policy import TorchPolicy
from ddrl_bus.errors import UsageError

SETTINGS: dict[str, dict[str, Any]] = {
    "dqn": {"hidden": (8,), "batch": B, "n_step": T},
    "r2d2": {"hidden": (8,), "batch": B, "unroll": T - 2, "burn_in": 2, "core_size": 4},
}
RULES = sorted(SETTINGS)


def learner_of(rule: str, spaces: Spaces = DISCRETE, *, seed: int = 1, **changes: Any) -> QLearning[Any]:
    """With every parameter away from where initialisation leaves it, and a target network of other weights."""
    cls = REGISTRY[rule]
    learner = cls(cls.Config(**{**SETTINGS[rule], **changes}), spaces, seed=seed)
    assert isinstance(learner, QLearning)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*learner.net.parameters(), *learner.target.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner


# ── acting


@pytest.mark.parametrize("count", [1, 2, 5])
def test_epsilons_are_ape_xs(count: int) -> None:
    place = np.linspace(0, 1, count, dtype=np.float32)
    found = epsilons(DqnConfig(), Explore(place))
    assert found.tolist() == pytest.approx([0.4 ** (1 + 7 * i / max(1, count - 1)) for i in range(count)], rel=1e-5)
    assert found[0] == pytest.approx(0.4)
    alike = epsilons(DqnConfig(epsilon=0.1, epsilon_spread=0), Explore(place))
    assert alike.tolist() == pytest.approx([0.1] * count)


def test_epsilon_falls_linearly_from_one() -> None:
    config, place = DqnConfig(epsilon=0.2, epsilon_spread=1, epsilon_steps=1000), np.array([0, 1], np.float32)
    at = {steps: epsilons(config, Explore(place, steps)).tolist() for steps in (0, 500, 1000, 9999)}
    assert at[0] == [1, 1]
    assert at[500] == pytest.approx([0.6, 0.52])
    assert at[1000] == at[9999] == pytest.approx([0.2, 0.04])


def test_without_exploration_the_lowest_of_the_best_actions_is_taken() -> None:
    q = np.array([[1, 3, 3], [0, 0, 0], [5, 2, 6], [-1, -2, -1]], np.float32)
    action, record = Dqn.act(DqnConfig(epsilon=1), DISCRETE, {"q": q}, Noise(0), None)
    assert action.tolist() == [1, 0, 2, 0]
    assert action.dtype == np.int64
    assert record["q"].tolist() == record["max_q"].tolist() == [3, 0, 6, -1]


def test_actions_are_drawn_uniformly_with_probability_epsilon() -> None:
    n, config = 30_000, DqnConfig(epsilon=0.3, epsilon_spread=2)
    q = np.tile(np.array([0, 9, 1], np.float32), (2 * n, 1))
    place = np.repeat(np.array([0, 1], np.float32), n)
    action, record = Dqn.act(config, DISCRETE, {"q": q}, Noise(0), Explore(place))
    for half, epsilon in ((action[:n], 0.3), (action[n:], 0.027)):
        share = np.bincount(half, minlength=3) / n
        np.testing.assert_allclose(share, [epsilon / 3, 1 - epsilon * 2 / 3, epsilon / 3], atol=0.01)
    assert record["q"].tolist() == q[0, action].tolist()
    assert set(record["max_q"]) == {9}
    assert {name: array.dtype.name for name, array in record.items()} == {"q": "float32", "max_q": "float32"}


FLAT = Spaces((5,), "float32", "discrete", 3)
SCREEN = Spaces((36, 40), "uint8", "discrete", 4, stack=3)
CASES: dict[str, tuple[str, Spaces, dict[str, Any]]] = {
    "dqn": ("dqn", FLAT, {}),
    "plain": ("dqn", FLAT, {"dueling": False, "activation": "tanh"}),
    "linear": ("dqn", FLAT, {"hidden": ()}),
    "stack": ("dqn", Spaces((5,), "float32", "discrete", 3, stack=3), {}),
    "screen": ("dqn", SCREEN, {}),
    "lstm": ("r2d2", FLAT, {}),
    "gru_last_plain": ("r2d2", FLAT, {"core": "gru", "last_inputs": True, "dueling": False}),
    "memoryless": ("r2d2", FLAT, {"core": "none"}),
    "screen_lstm_last": ("r2d2", SCREEN, {"last_inputs": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("burn_in", [0, 4])
def test_the_learning_network_says_what_the_acting_one_said(case: str, burn_in: int) -> None:
    """From the state before any row on, burnt in or not, though weights are the same only here."""
    rule, spaces, changes = CASES[case]
    learner = learner_of(rule, spaces, **changes)
    policy = make_policy(type(learner), learner.config, spaces, seed=3)
    assert isinstance(policy, NumpyPolicy if spaces is FLAT else TorchPolicy)
    policy.load(learner.weights())
    played = play(policy, spaces, 14)
    for start in (0, 3, 5):
        batch = played.window(start, 9).to("cpu")
        length, columns = batch.reward.shape
        with torch.no_grad():
            q = learner.net.unroll(batch, burn_in)[: length * columns].view(length, columns, -1)
        for name, ours in {"q": q.gather(2, batch.action.unsqueeze(2)).squeeze(2), "max_q": q.amax(2)}.items():
            np.testing.assert_allclose(ours, played.record[name][start : start + length], atol=2e-5)
        assert q.std() > 1e-3


def test_dueling_by_hand() -> None:
    """V = 10, A = (1, 3, 8): Q = V + A - 4; without it Q is the layer's."""
    for dueling, expected in ((True, [7.0, 9.0, 14.0]), (False, [1.0, 3.0, 8.0])):
        learner = learner_of("dqn", hidden=(), dueling=dueling)
        with torch.no_grad():
            for parameter in learner.net.parameters():
                parameter.zero_()
            learner.net.q.bias[:] = torch.tensor([1.0, 3, 8])
            if dueling:
                learner.net.value.bias[:] = 10
        policy = make_policy(Dqn, learner.config, DISCRETE, seed=0)
        policy.load(learner.weights())
        said = learner.net.step(torch.ones(1, 4), {})[0].q[0].tolist()
        assert said == expected
        acted = policy.act(np.ones((300, 4), np.float32), {}, Explore(np.zeros(1, np.float32)))
        assert {round(q, 4) for q in acted.record["q"].tolist()} == set(expected)


@pytest.mark.parametrize("rule", RULES)
def test_continuous_actions_are_refused(rule: str) -> None:
    cls = REGISTRY[rule]
    with pytest.raises(UsageError, match=rf"algo.name: '{rule}' takes the best .* expected a discrete action space"):
        cls(cls.Config(), CONTINUOUS, seed=0)
    with pytest.raises(UsageError, match="expected a discrete action space"):
        cls.record(cls.Config(), CONTINUOUS)


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("dqn", {"core": "lstm"}, r"algo.core: 'lstm', expected none \(a window begins anywhere"),
        ("dqn", {"last_inputs": True}, r"algo.last_inputs: True, expected false \(a window begins anywhere"),
        ("dqn", {"n_step": 0}, r"algo.n_step: 0, expected at least 1"),
        ("dqn", {"target_every": 0}, r"algo.target_every: 0, expected at least 1"),
        ("dqn", {"epsilon": 1.1}, r"algo.epsilon: 1.1, expected a number from 0 to 1"),
        ("dqn", {"epsilon_spread": -1}, r"algo.epsilon_spread: -1, expected a number not below 0"),
        ("dqn", {"huber": -0.5}, r"algo.huber: -0.5, expected a number not below 0"),
        ("r2d2", {"burn_in": -1}, r"algo.burn_in: -1, expected a number not below 0"),
        ("r2d2", {"eta": 2}, r"algo.eta: 2, expected a number from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(rule: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        REGISTRY[rule].Config(**changes)


# ── learning


@pytest.mark.parametrize("rule", RULES)
def test_columns_count_by_their_importance_weights(rule: str) -> None:
    """The weighted loss is the mean of each column's own, weighed; errors are not."""
    learner = learner_of(rule)
    batch = dataclasses.replace(make_batch(), state=memory.initial(learner.config, DISCRETE, B))
    weight = np.array([1, 0.5, 0.25, 0, 0.125], np.float32)
    loss = learner.loss(dataclasses.replace(batch, weight=weight).to("cpu"))[0].item()
    errors = learner.errors
    alone = []
    for column in range(B):
        only = np.zeros(B, np.float32)
        only[column] = 1
        alone.append(learner.loss(dataclasses.replace(batch, weight=only).to("cpu"))[0].item())
    assert loss == pytest.approx(float(weight @ np.array(alone)), rel=1e-5)
    assert learner.loss(batch.to("cpu"))[0].item() == pytest.approx(sum(alone), rel=1e-5)
    assert len(set(alone)) == B
    assert errors is not None
    assert errors.dtype == np.float32
    np.testing.assert_array_equal(learner.errors, errors)


@pytest.mark.parametrize("rule", RULES)
def test_priorities_are_not_looked_at_where_all_are_drawn_alike(rule: str) -> None:
    for alpha in (0.0, 0.5):
        learner = learner_of(rule, alpha=alpha)
        assert learner.errors is None  # nothing was trained on
        learner.step(dataclasses.replace(make_batch(), state=memory.initial(learner.config, DISCRETE, B)))
        assert (learner.errors is None) == (not alpha)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dead", "rescale"), [(False, False), (False, True), (True, False)])
def test_a_time_limit_is_not_a_death(rule: str, dead: bool, rescale: bool) -> None:
    """Reward 1 forever, cut every third row: Q = 1/(1-γ) = 10, or h(10). As a death it is 1 + .9 + .81 on the first of
    three rows, on which dqn trains, and less on the others, which r2d2 averages in, as it sees no difference."""
    changes: dict[str, Any] = {"core": "none"} if rule == "r2d2" else {}
    learner = learner_of(
        rule,
        hidden=(),
        gamma=0.9,
        reward_scale=1.0,
        rescale=rescale,
        target_every=3,
        optimizer="sgd",
        lr=0.1,
        **changes,
    )
    for _ in range(250):
        learner.step(truncating(dead=dead))
    q = learner.net.unroll(truncating(dead=dead).to("cpu"))[0, 0].item()
    expected = np.sqrt(11) - 1 + 0.01 if rescale else 10
    if dead:
        expected = {"dqn": 2.71, "r2d2": (1 + 2.71 + 1.9 + 1) / 4}[rule]
    assert q == pytest.approx(expected, rel=0.01)


# ── the target network


@pytest.mark.parametrize("rule", RULES)
def test_the_target_network_is_the_network_of_every_third_update(rule: str) -> None:
    learner = learner_of(rule, target_every=3)
    before = [p.clone() for p in learner.target.parameters()]
    for update in range(1, 8):
        learner.step(dataclasses.replace(make_batch(update), state=memory.initial(learner.config, DISCRETE, B)))
        now = list(learner.target.parameters())
        if update % 3 == 0:
            before = [p.clone() for p in learner.net.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_loaded_weights_become_the_targets_as_updates_pass() -> None:
    """Gorila: pulled from the server every so many of its updates, and when a server went back to its checkpoint."""
    learner, refreshed = learner_of("dqn", target_every=10), []
    for updates in (7, 8, 9, 10, 11, 19, 25, 26, 50, 12, 13):
        weights = {name: np.full_like(array, updates) for name, array in learner.weights().items()}
        learner.load(weights, updates)
        assert next(learner.net.parameters()).mean() == updates
        if next(learner.target.parameters()).mean() == updates:
            refreshed.append(updates)
    assert refreshed == [7, 10, 25, 50, 12]


def test_rules_of_fresh_unrolls_have_no_windows_and_no_errors() -> None:
    for name, cls in REGISTRY.items():
        if name not in RULES:
            assert cls.windows(cls.Config()) is None
            assert cls(cls.Config(hidden=(2,)), DISCRETE, seed=0).errors is None
    assert not isinstance(AgentConfig(), DqnConfig)
