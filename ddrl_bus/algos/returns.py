"""Returns, advantages and V-trace targets: pure functions of time-major tensors.

Common to all: `reward, value, next_value [T, B]` float, `terminated, truncated [T, B]` bool, given by position. Row t
holds what action t led to; `value[t]` is V(obs_t), and `next_value[t]` is V of the *true* successor of row t: of
obs_{t+1} inside an episode, of the episode's final observation at a truncation, and any finite number at a termination,
where it counts for nothing (`next_values` builds it). Recursions stop at any end of an episode; the bootstrap is
dropped only at a termination. The results are targets: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from ddrl_bus.algos.lazy import torch

P = ParamSpec("P")
R = TypeVar("R")


def _lean(function: Callable[P, R]) -> Callable[P, R]:
    """Detaches the tensors given, and on the CPU runs `function` on numpy views of them, whose small operations cost a
    quarter of torch's. Such a function uses operators, slices and methods that the two libraries share."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
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


def next_values(value: torch.Tensor, final_value: torch.Tensor, final_index: torch.Tensor) -> torch.Tensor:
    """V of the true successor of each row.

    Shapes: value [T+1, B] of obs, final_value [K] of the final observations of truncated rows, final_index [K] int64
    (t·B + b of each); returns [T, B], without gradient.
    """
    successor = value[1:].detach().clone()
    successor.view(-1)[final_index] = final_value.detach()
    return successor


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
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    *,
    gamma: float,
    n: int,
) -> torch.Tensor:
    """R_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(successor of row t+m-1), m ≤ n rows to the end of the segment or episode.

    Shapes: all [T, B]. With n ≥ T this is A3C's return (Mnih et al. 2016, arXiv 1602.01783, algorithm S3). It is
    summed as V_t + Σ_{k<m} γ^k δ_{t+k}, which is the same: the values between telescope.
    """
    delta = _td_errors(reward, value, next_value, terminated, gamma)
    inside = ~(terminated | truncated)
    advantage = delta
    for _ in range(min(n, len(delta)) - 1):  # the (k+1)-step advantage of row t is δ_t + γ times row t+1's k-step one
        longer = delta + 0.0
        longer[:-1] += gamma * (advantage[1:] * inside[:-1])
        advantage = longer
    return value + advantage


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
