from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ddrl_bus.algos import Spaces, algorithm, make_policy
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.policy import Explore
from ddrl_bus.errors import UsageError

EXPLORE = Explore(np.zeros(1, np.float32))

SPACES = Spaces((5,), "float32", "discrete", 3)


def config(**changes: Any) -> ImpalaConfig:
    return ImpalaConfig(**{"hidden": (16, 8), **changes})


def trained_weights(settings: ImpalaConfig, spaces: Spaces = SPACES) -> tuple[Impala, dict[str, np.ndarray]]:
    """Weights with every bias and head away from where initialisation leaves them."""
    learner = Impala(settings, spaces, seed=1)
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return learner, learner.weights()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("hidden", [(), (16,), (64, 64)])
def test_the_numpy_forward_equals_the_network(activation: str, shared: bool, hidden: tuple[int, ...]) -> None:
    settings = config(activation=activation, shared_torso=shared, hidden=hidden)
    learner, weights = trained_weights(settings)
    policy = make_policy(Impala, settings, SPACES, seed=0)
    policy.load(weights)
    for n in (7, 1, 32):  # the buffers follow the number of environments
        obs = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
        logits = policy.act(obs, {}, EXPLORE).record["policy"]
        with torch.no_grad():
            expected = learner.net(torch.from_numpy(obs)).policy.numpy()
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_other_dtypes_of_observations_are_converted() -> None:
    spaces = Spaces((5,), "uint8", "discrete", 3)
    learner, weights = trained_weights(config(), spaces)
    policy = make_policy(Impala, config(), spaces, seed=0)
    policy.load(weights)
    obs = np.random.default_rng(0).integers(0, 9, (4, 5), dtype=np.uint8)
    with torch.no_grad():
        expected = learner.net(torch.from_numpy(obs)).policy.numpy()
    np.testing.assert_allclose(policy.act(obs, {}, EXPLORE).record["policy"], expected, atol=1e-5)


def test_actions_are_drawn_from_the_softmax() -> None:
    settings = config()
    _, weights = trained_weights(settings)
    policy = make_policy(Impala, settings, SPACES, seed=3)
    policy.load(weights)
    obs = np.repeat(np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32), 20_000, axis=0)
    acted = policy.act(obs, {}, EXPLORE)
    logits = acted.record["policy"][0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    share = np.bincount(acted.action, minlength=3) / len(obs)
    assert expected.min() > 0.01
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / len(obs)))
    assert acted.action.dtype == np.int64


def test_greedy_takes_the_largest_logit() -> None:
    _, weights = trained_weights(config())
    policy = make_policy(Impala, config(), SPACES, seed=3)
    policy.load(weights)
    acted = policy.act(np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32), {}, None)
    assert acted.action.tolist() == acted.record["policy"].argmax(axis=1).tolist()
    assert len(set(acted.action.tolist())) > 1


def test_seeds_decide_the_actions() -> None:
    def actions(seed: int) -> list[list[int]]:
        policy = make_policy(Impala, config(), SPACES, seed=seed)
        return [policy.act(np.zeros((9, 5), np.float32), {}, EXPLORE).action.tolist() for _ in range(20)]

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)


def test_read_only_weights_are_taken_and_not_kept() -> None:
    _, weights = trained_weights(config())
    policy = make_policy(Impala, config(), SPACES, seed=0)
    policy.load(weights)
    obs = np.ones((2, 5), np.float32)
    before = policy.act(obs, {}, EXPLORE).record["policy"].copy()
    for array in weights.values():
        array *= 2  # the message's buffer is used again
    np.testing.assert_array_equal(policy.act(obs, {}, EXPLORE).record["policy"], before)
    for array in weights.values():
        array.setflags(write=False)
    policy.load(weights)
    assert np.abs(policy.act(obs, {}, EXPLORE).record["policy"] - before).max() > 1e-3


@pytest.mark.parametrize("name", ["torso.0.weight", "policy.bias"])
def test_weights_that_do_not_fit_are_refused(name: str) -> None:
    _, weights = trained_weights(config())
    policy = make_policy(Impala, config(), SPACES, seed=0)
    with pytest.raises(UsageError, match=f"weights: {name} has shape None, expected"):
        policy.load({k: v for k, v in weights.items() if k != name})
    with pytest.raises(UsageError, match=rf"weights: {name} has shape \(2, 2\), expected"):
        policy.load(weights | {name: np.zeros((2, 2), np.float32)})


def test_gumbel_noise_has_its_mean_and_variance_across_blocks() -> None:
    noise = Noise(0)
    drawn = np.concatenate([noise.gumbel((33, 3)).ravel() for _ in range(1000)])
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0.5772, abs=0.02)
    assert drawn.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    assert len(np.unique(drawn)) > 0.98 * len(drawn)  # no block is used twice


def test_more_noise_than_a_block_holds() -> None:
    assert np.isfinite(Noise(0).gumbel((20_000, 3))).all()


@pytest.mark.parametrize("settings", ["", "core='lstm', core_size=8, last_inputs=True"])
def test_acting_imports_no_torch(settings: str) -> None:
    code = f"""
import sys
import numpy as np
from ddrl_bus.algos import REGISTRY, Spaces, algorithm, make_policy
impala = algorithm("impala")
config = impala.Config({settings})
policy = make_policy(impala, config, Spaces((4,), "float32", "discrete", 2), 0)
shapes = {{"torso.0.weight": (64, 4), "torso.0.bias": 64, "torso.1.weight": (64, 64), "torso.1.bias": 64,
          "core.rnn.weight_ih_l0": (32, 67), "core.rnn.weight_hh_l0": (32, 8),
          "core.rnn.bias_ih_l0": 32, "core.rnn.bias_hh_l0": 32,
          "policy.weight": (2, 64 if config.core == "none" else 8), "policy.bias": 2}}
policy.load({{name: np.ones(shape, "f") for name, shape in shapes.items()}})
policy.act(np.zeros((3, 4), "f"), policy.initial_state(3), None)
assert "torch" not in sys.modules
from ddrl_bus.algos.lazy import torch
assert torch.zeros(2).tolist() == [0.0, 0.0] and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_algorithms_name_the_nearest() -> None:
    assert algorithm("impala") is Impala
    with pytest.raises(UsageError, match="no algorithm named 'impalla'; did you mean 'impala'"):
        algorithm("impalla")
    with pytest.raises(UsageError, match=r"no algorithm named 'xyz'; have .*impala"):
        algorithm("xyz")
