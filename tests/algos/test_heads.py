"""Heads against torch's distributions, and their draws against their densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from ddrl_bus.algos import Spaces
from ddrl_bus.algos.heads import head_of
from ddrl_bus.algos.noise import Noise

CHOICES = Spaces((3,), "float32", "discrete", 4)
TORQUES = Spaces((3,), "float32", "continuous", 2, (-1.0, -1.0), (1.0, 1.0))


@pytest.mark.parametrize("leading", [(5,), (3, 2)])
def test_log_probabilities_and_entropies_of_choices(leading: tuple[int, ...]) -> None:
    head = head_of(CHOICES)
    params, action = 3 * torch.randn(*leading, head.width), torch.randint(0, 4, leading)
    ours, theirs = head.of(params), Categorical(logits=params)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


@pytest.mark.parametrize("leading", [(5,), (3, 2)])
def test_log_probabilities_and_entropies_of_torques(leading: tuple[int, ...]) -> None:
    head = head_of(TORQUES)
    params, action = torch.randn(*leading, head.width), torch.randn(*leading, 2)
    theirs = Independent(Normal(params[..., :2], params[..., 2:].exp()), 1)
    ours = head.of(params)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_choices_that_are_all_but_impossible_stay_finite() -> None:
    pi = head_of(CHOICES).of(torch.tensor([[1e4, -1e4, 0.0, 0.0]]))
    assert pi.entropy().isfinite().all()
    assert pi.log_prob(torch.tensor([1])).isfinite().all()


def test_torques_are_drawn_from_their_density() -> None:
    params = np.repeat(np.array([[1.0, -2.0, 0.0, -1.0]], np.float32), 40_000, axis=0)
    drawn = head_of(TORQUES).sample(params, Noise(0), greedy=False)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(axis=0), [1.0, -2.0], atol=0.03)
    np.testing.assert_allclose(drawn.std(axis=0), [1.0, np.exp(-1.0)], rtol=0.03)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03


def test_greedy_torques_are_the_means_and_kept() -> None:
    params = np.array([[1.0, -2.0, 0.0, -1.0]], np.float32)
    action = head_of(TORQUES).sample(params, Noise(0), greedy=True)
    params[:] = 0  # the buffer is used again
    assert action.tolist() == [[1.0, -2.0]]
    assert action.dtype == np.float32
