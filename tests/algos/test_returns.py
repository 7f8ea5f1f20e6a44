"""The recursions against slow twins written from the equations, with ends in every place, and their identities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddrl_bus.algos import returns

T, GAMMA = 5, 0.9


class Rows(NamedTuple):
    """One segment of many columns, float64 so that twins agree to rounding."""

    reward: torch.Tensor
    value: torch.Tensor
    next_value: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Every way to put no end, a termination, a truncation or both on each of T rows: one column each."""
    ends = np.array(list(itertools.product(range(4), repeat=T))).T  # [T, 4^T]
    rng = np.random.default_rng(0)
    value = rng.normal(size=(T + 1, ends.shape[1]))
    truncated = (ends & 2).astype(bool)
    next_value = np.where(truncated, rng.normal(size=ends.shape), value[1:])
    arrays = (rng.normal(size=ends.shape), value[:-1], next_value, (ends & 1).astype(bool), truncated)
    return Rows(*map(torch.tensor, arrays))


@pytest.fixture(scope="module")
def ratio(rows: Rows) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(1).lognormal(sigma=0.7, size=rows.reward.shape))


def columns(rows: Rows) -> Iterator[tuple[int, list[list[float]]]]:
    for b in range(rows.reward.shape[1]):
        yield b, [x[:, b].tolist() for x in rows]


def slow_n_step(r: list, v: list, nv: list, term: list, trunc: list, *, n: int) -> list[float]:
    out = []
    for s in range(T):
        total, discount = 0.0, 1.0
        for t in range(s, min(s + n, T)):
            total += discount * r[t]
            discount *= GAMMA
            if term[t] or trunc[t]:
                break
        out.append(total + (0.0 if term[t] else discount * nv[t]))
    return out


def n_step(rows: Rows, n: int) -> torch.Tensor:
    result: torch.Tensor = returns.n_step_returns(rows.reward, *rows[2:], gamma=GAMMA, n=n)
    return result


def slow_rescale(x: float) -> float:
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + 1e-3 * x


def slow_unrescale(y: float) -> float:
    low, high = 0.0, 1000 * abs(y) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slow_rescale(middle) < abs(y) else (low, middle)
    return math.copysign(low, y)


def slow_vtrace(
    r: list, v: list, nv: list, term: list, trunc: list, *, ratio: list, lam: float, rho_bar: float, c_bar: float
) -> tuple[list[float], list[float]]:
    """Equation 1 of the paper, the sum over t and the product over i written out; episodes end both."""
    rho = [min(rho_bar, x) for x in ratio]
    c = [lam * min(c_bar, x) for x in ratio]
    successor = [0.0 if term[t] else nv[t] for t in range(T)]
    vs = []
    for s in range(T):
        total = v[s]
        for t in range(s, T):
            product = float(np.prod([c[i] for i in range(s, t)]))
            total += GAMMA ** (t - s) * product * rho[t] * (r[t] + GAMMA * successor[t] - v[t])
            if term[t] or trunc[t]:
                break
        vs.append(total)
    advantage = []
    for s in range(T):
        goes_on = s + 1 < T and not (term[s] or trunc[s])
        advantage.append(r[s] + GAMMA * (vs[s + 1] if goes_on else successor[s]) - v[s])
    return vs, advantage


@pytest.mark.parametrize("n", [1, 2, 3, T, T + 3])
def test_n_step_returns_equal_their_sum(rows: Rows, n: int) -> None:
    result = n_step(rows, n)
    for b, column in columns(rows):
        assert result[:, b].tolist() == pytest.approx(slow_n_step(*column, n=n))


def test_rescaled_returns_discount_in_plain_units(rows: Rows) -> None:
    """R2D2's y = h(Σ γ^k r + γ^m h⁻¹(Q)), from the definitions of h and, by bisection, of h⁻¹."""
    result = returns.n_step_returns(rows.reward, *rows[2:], gamma=GAMMA, n=3, rescaled=True)
    for b, (r, v, nv, term, trunc) in columns(rows):
        plain = slow_n_step(r, v, [slow_unrescale(q) for q in nv], term, trunc, n=3)
        assert result[:, b].tolist() == pytest.approx([slow_rescale(x) for x in plain], abs=1e-9)


@given(st.floats(-1e6, 1e6))
def test_rescaling_equals_its_definition_and_is_undone(x: float) -> None:
    scaled = returns.rescale(np.array([x]))
    assert scaled[0] == pytest.approx(slow_rescale(x), rel=1e-9, abs=1e-12)
    assert returns.unrescale(scaled)[0] == pytest.approx(x, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("library", [np.float32, torch.tensor])
def test_rescaling_keeps_the_digits_of_float32(library: Any) -> None:
    """The inverse as it is usually written is wrong by 1e-4 near 0."""
    x = np.concatenate([-np.logspace(-6, 5, 500), np.zeros(1), np.logspace(-6, 5, 500)]).astype(np.float32)
    exact = np.array([slow_rescale(float(each)) for each in x])
    scaled = returns.rescale(library(x))
    assert str(scaled.dtype).endswith("float32")
    np.testing.assert_allclose(scaled, exact, rtol=1e-6)
    np.testing.assert_allclose(returns.unrescale(library(x)), [slow_unrescale(float(y)) for y in x], rtol=1e-6)


@pytest.mark.parametrize(("lam", "rho_bar", "c_bar"), [(1.0, 1.0, 1.0), (0.7, 1.0, 1.0), (0.95, 2.0, 1.3)])
def test_vtrace_equals_equation_1(rows: Rows, ratio: torch.Tensor, lam: float, rho_bar: float, c_bar: float) -> None:
    bars = {"lam": lam, "rho_bar": rho_bar, "c_bar": c_bar}
    result = returns.vtrace(ratio, *rows, gamma=GAMMA, **bars)
    for b, column in columns(rows):
        target, advantage = slow_vtrace(*column, ratio=ratio[:, b].tolist(), **bars)
        assert result.target[:, b].tolist() == pytest.approx(target)
        assert result.advantage[:, b].tolist() == pytest.approx(advantage)
    assert torch.equal(result.rho, ratio.clamp(max=rho_bar))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_is_a_mixture_of_n_step_advantages(rows: Rows, lam: float) -> None:
    """Eq. 16: (1-λ) Σ_n λ^{n-1} A^{(n)}, the last term taking all that is left; short segments repeat the last one."""
    advantage = [n_step(rows, n) - rows.value for n in range(1, T + 1)]
    mixture = sum((1 - lam) * lam**k * a for k, a in enumerate(advantage[:-1])) + lam ** (T - 1) * advantage[-1]
    result = returns.gae(*rows, gamma=GAMMA, lam=lam)
    torch.testing.assert_close(result, mixture)


def test_on_policy_vtrace_is_the_full_return(rows: Rows) -> None:
    on_policy = returns.vtrace(torch.ones_like(rows.reward), *rows, gamma=GAMMA)
    full = n_step(rows, T)
    torch.testing.assert_close(on_policy.target, full)
    torch.testing.assert_close(on_policy.advantage, full - rows.value)


def test_vtrace_with_impossible_actions_keeps_the_values(rows: Rows) -> None:
    result = returns.vtrace(torch.zeros_like(rows.reward), *rows, gamma=GAMMA)
    torch.testing.assert_close(result.target, rows.value)


def test_gae_ends_of_lambda(rows: Rows) -> None:
    full, one_step = n_step(rows, T), n_step(rows, 1)
    torch.testing.assert_close(returns.gae(*rows, gamma=GAMMA, lam=1.0), full - rows.value)
    torch.testing.assert_close(returns.gae(*rows, gamma=GAMMA, lam=0.0), one_step - rows.value)


def test_log_ratios_of_60_and_overflow_stay_finite(rows: Rows) -> None:
    ratio = torch.exp(torch.tensor([60.0, -60.0, 200.0, -200.0, 0.0], dtype=torch.float32)).view(T, 1)
    assert torch.isinf(ratio).any()
    result = returns.vtrace(
        ratio.expand(T, rows.reward.shape[1]), *(x.float() for x in rows[:3]), *rows[3:], gamma=GAMMA
    )
    assert all(torch.isfinite(x).all() for x in result)


def test_targets_carry_no_gradient(rows: Rows, ratio: torch.Tensor) -> None:
    value = rows.value.clone().requires_grad_()
    rest = (value, rows.next_value, rows.terminated, rows.truncated)
    results = [
        returns.gae(rows.reward, *rest, gamma=GAMMA, lam=0.9),
        returns.n_step_returns(rows.reward, value, *rest[2:], gamma=GAMMA, n=2, rescaled=True),
        *returns.vtrace(ratio.clone().requires_grad_(), rows.reward, *rest, gamma=GAMMA),
    ]
    assert not any(x.requires_grad for x in results)


def test_inputs_are_left_alone(rows: Rows, ratio: torch.Tensor) -> None:
    before = [x.clone() for x in (*rows, ratio)]
    returns.gae(*rows, gamma=GAMMA, lam=0.9)
    n_step(rows, 3)
    returns.vtrace(ratio, *rows, gamma=GAMMA)
    assert all(torch.equal(a, b) for a, b in zip(before, (*rows, ratio), strict=True))


def test_float32_on_numpy_views_equals_torch_operations(rows: Rows, ratio: torch.Tensor) -> None:
    """What a GPU runs is the undecorated function on tensors."""
    single = [x.float() for x in (ratio, *rows[:3])]
    views = returns.vtrace(*single, rows.terminated, rows.truncated, gamma=GAMMA, lam=0.9)
    tensors = returns.vtrace.__wrapped__(*single, rows.terminated, rows.truncated, gamma=GAMMA, lam=0.9)  # type: ignore[attr-defined]
    for a, b in zip(views, tensors, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    gae = returns.gae(*single[1:], rows.terminated, rows.truncated, gamma=GAMMA, lam=0.9)
    torch.testing.assert_close(
        gae,
        returns.gae.__wrapped__(*single[1:], rows.terminated, rows.truncated, gamma=GAMMA, lam=0.9),  # type: ignore[attr-defined]
    )
    assert gae.dtype == torch.float32
    for rescaled in (False, True):
        arguments = (*(x.float() for x in (rows.reward, rows.next_value)), *rows[3:])
        n_step = returns.n_step_returns(*arguments, gamma=GAMMA, n=3, rescaled=rescaled)
        assert n_step.dtype == torch.float32
        slow = returns.n_step_returns.__wrapped__(*arguments, gamma=GAMMA, n=3, rescaled=rescaled)  # type: ignore[attr-defined]
        torch.testing.assert_close(n_step, slow)
        arrays = returns.n_step_returns(*(x.numpy() for x in arguments), gamma=GAMMA, n=3, rescaled=rescaled)
        assert isinstance(arrays, np.ndarray)
        np.testing.assert_array_equal(arrays, n_step.numpy())


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_constant_reward_that_only_truncates_has_the_value_of_going_on_for_ever(lam: float) -> None:
    """With V = r/(1-γ) everywhere, V is its own target: a time limit is not a death."""
    shape = (6, 3)
    truncated = torch.tensor(np.random.default_rng(2).random(shape) < 0.4)
    assert truncated.any()
    value = torch.full(shape, 1.0 / (1.0 - 0.99))
    rows = (torch.ones(shape), value, value, torch.zeros(shape, dtype=torch.bool), truncated)
    result = returns.vtrace(torch.full(shape, 0.8), *rows, gamma=0.99, lam=lam)
    torch.testing.assert_close(result.target, value)
    assert result.advantage.abs().max() < 1e-4
