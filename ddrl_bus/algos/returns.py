"""Returns, advantages, V-trace targets and rescaled values: pure functions of time-major tensors.

Targets take `reward, value, next_value [T, B]` float, `terminated, truncated [T, B]` bool, given by position. Row t
holds what action t led to; `value[t]` is V(obs_t), and `next_value[t]` is V of the *true* successor of row t: of
obs_{t+1} inside an episode, of the episode's final observation at a truncation, and any finite number at a termination,
where it counts for nothing. Recursions stop at any end of an episode; the bootstrap is
dropped only at a termination. The results are targets: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np

from ddrl_bus.algos.base import Array
from ddrl_bus.algos.lazy import library, torch

P = ParamSpec("P")
R = TypeVar("R")


def _lean(function: Callable[P, R]) -> Callable[P, R]:
    """Detaches the tensors given, and on the CPU runs `function` on numpy views of them, whose small operations cost a
    quarter of torch's. Such a function uses operators, slices and methods that the two libraries share; given numpy
    arrays, it returns such."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if isinstance(args[0], np.ndarray):
            return function(*args, **kwargs)
        tensors: list[Any] = [cast("torch.Tensor", arg).detach() for arg in args]
        if tensors[0].device.type != "cpu":
            return function(*tensors, **kwargs)
        result: Any = function(*(tensor.numpy() for tensor in tensors), **kwargs)
        back = torch.from_numpy
        return cast(R, VTrace(*map(back, result)) if isinstance(result, VTrace) else back(result))

    return run


def _reverse_scan(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """y_t = x_t + decay_t · y_{t+1} with y_T = 0, down the first axis.  Shapes: all [T, B]."""
    y = x + 0.0  # a copy, in both libraries
    for t in range(len(y) - 2, -1, -1):
        y[t] += decay[t] * y[t + 1]
    return y


def _td_errors(
    reward: torch.Tensor, value: torch.Tensor, next_value: torch.Tensor, terminated: torch.Tensor, gamma: float
) -> torch.Tensor:
    """δ_t = r_t + γ·(1 - terminated_t)·V(successor) - V(obs_t).  Shapes: all [T, B]."""
    return reward + gamma * (next_value * ~terminated) - value


@_lean
def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Generalised advantage estimates  A_t = δ_t + γλ·A_{t+1}, cut at ends.

    Shapes: all [T, B]; the value target is A + value.
    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    delta = _td_errors(reward, value, next_value, terminated, gamma)
    return _reverse_scan(delta, (gamma * lam) * ~(terminated | truncated))


@_lean
def n_step_returns(
    reward: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: float,
    n: int,
    rescaled: bool = False,
) -> Array:
    """R_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(successor of row t+m-1), m ≤ n rows to the end of the segment or episode.

    Where values are `rescaled` V stands for h⁻¹(V), and the result is h(R_t): discounting is done in plain units.

    Shapes: all [T, B]. With n ≥ T this is A3C's return (Mnih et al. 2016, arXiv 1602.01783, algorithm S3); rescaled it
    is R2D2's target (Kapturowski et al. 2019, section 2.3).
    """
    if rescaled:
        next_value = unrescale(next_value)
    inside = ~(terminated | truncated)[:-1]
    one_step = reward + gamma * (next_value * ~terminated)
    target = one_step
    for _ in range(min(n, len(reward)) - 1):  # a row's (k+1)-step return is its reward and the next row's k-step one
        longer = one_step + 0.0
        longer[:-1] = library(reward).where(inside, reward[:-1] + gamma * target[1:], one_step[:-1])
        target = longer
    return rescale(target) if rescaled else target


RESCALE_EPS: Final = 1e-3
"""ε of `rescale`: R2D2's"""


def rescale(x: Array) -> Array:
    """h(x) = sign(x)(√(|x|+1) - 1) + εx: large returns in the scale of their roots.  Shapes: any, the same.

    Source: Pohlen et al. 2018 (arXiv 1805.11593); written so that no digits are lost near 0.
    """
    return x / ((abs(x) + 1) ** 0.5 + 1) + RESCALE_EPS * x


def unrescale(y: Array) -> Array:
    """h⁻¹(y) = sign(y)(((√(1 + 4ε(|y| + 1 + ε)) - 1)/2ε)² - 1).  Shapes: any, the same.

    As it stands it loses four of float32's seven digits. With w for the square's root less 1, εw² + (1 + 2ε)w = |y|,
    whose solution below has no differences, and h⁻¹ = w(w + 2) with y's sign.
    """
    b = 1 + 2 * RESCALE_EPS
    w = 2 * y / (b + (b * b + 4 * RESCALE_EPS * abs(y)) ** 0.5)
    return w * (abs(w) + 2)


class VTrace(NamedTuple):
    """Shapes: all [T, B], without gradient."""

    target: torch.Tensor
    """v_s, the value target"""
    advantage: torch.Tensor
    """r_s + γ v_{s+1} - V(x_s), to be weighted by `rho`"""
    rho: torch.Tensor
    """min(ρ̄, π/μ), the truncated importance weight"""


@_lean
def vtrace(
    ratio: torch.Tensor,
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """V-trace targets and policy-gradient advantages; `ratio` [T, B] is π(a|x)/μ(a|x), which may overflow to inf.

    v_s = V_s + Σ_{t≥s} γ^{t-s} (Π_{s≤i<t} c_i) δ_t,  δ_t = ρ_t (r_t + γ V_{t+1} - V_t),  c_i = λ min(c̄, ratio_i).
    The advantage bootstraps from v_{s+1}, and from V where there is none: on the last row and at a truncation.
    Source: Espeholt et al. 2018 (arXiv 1802.01561), eq. 1 and section 4.2. As there, λ enters c only (rlax also blends
    it into the advantage).
    """
    inside = ~(terminated | truncated)
    rho = ratio.clip(max=rho_bar)
    td = _td_errors(reward, value, next_value, terminated, gamma)
    # With correction_s = v_s - V_s: correction_s = ρ_s td_s + γ c_s correction_{s+1}, and the advantage is td_s + γ
    # correction_{s+1}.
    correction = _reverse_scan(rho * td, (gamma * lam) * (ratio.clip(max=c_bar) * inside))
    advantage = td
    advantage[:-1] += gamma * (correction[1:] * inside[:-1])
    return VTrace(value + correction, advantage, rho)
