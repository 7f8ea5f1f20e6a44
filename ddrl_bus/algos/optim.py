"""Optimisers by name. This module imports torch for real: only learners reach it.

RMSProp has dialects whose step sizes for small gradients differ by 1/√ε (3.2× at ε = .1, 316× at 1e-5), so a learning
rate belongs to one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

SLOTS = {
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "rmsprop_tf": {"square_avg"},
    "rmsprop": {"step", "square_avg"},
    "sgd": set(),
    "rmsprop_centred": {"grad_avg", "square_avg"},
    "adagrad": {"step", "sum"},
}
"""What each optimiser keeps per parameter."""


class _Light(torch.optim.Optimizer):
    """torch's optimisers without the wrappers that keep torch.compile out of some methods.

    The first call of such a wrapper imports torch's compiler, a second and a half that a learner would wait before its
    first update.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class Adam(_Light, torch.optim.Adam):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class RMSProp(_Light, torch.optim.RMSprop):
    step = torch.no_grad()(inspect.unwrap(torch.optim.RMSprop.step))


class Adagrad(_Light, torch.optim.Adagrad):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adagrad.step))


class SGD(_Light, torch.optim.SGD):
    """Plain gradient descent: the order of gradients does not matter."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class RMSPropTF(_Light):
    """θ ← θ - lr · g / √(s + ε),  s ← α s + (1 - α) g²,  s₀ = 1: RMSProp of A3C and TensorFlow, ε inside the root.

    Source: Mnih et al. 2016 (arXiv 1602.01783), eqs. 8, 9 (there s₀ = 0); s₀ = 1 as TensorFlow and stable-baselines3.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, alpha: float = 0.99, eps: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            squares = [self.state[p].setdefault("square_avg", torch.ones_like(p)) for p in params]
            torch._foreach_mul_(squares, group["alpha"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["alpha"])
            root = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_addcdiv_(params, grads, root, -group["lr"])
        return loss


class RMSPropCentred(_Light):
    """θ ← θ - lr · g / √(s - m² + ε),  m ← α m + (1 - α) g,  s ← α s + (1 - α) g²,  m₀ = s₀ = 0.

    Source: Graves 2013 (arXiv 1308.0850), eqs. 38 to 41, without momentum; DQN (Mnih et al. 2015), α .95 and ε .01;
    Ape-X (Horgan et al. 2018, arXiv 1803.00933), α .95 and ε 1.5e-7.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, alpha: float = 0.95, eps: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            means = [self.state[p].setdefault("grad_avg", torch.zeros_like(p)) for p in params]
            squares = [self.state[p].setdefault("square_avg", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["alpha"])
            torch._foreach_mul_(squares, group["alpha"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["alpha"])
            root = torch._foreach_addcmul(squares, means, means, -1)
            torch._foreach_clamp_min_(root, 0)  # rounding may leave a variance of less
            torch._foreach_add_(root, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_addcdiv_(params, grads, root, -group["lr"])
        return loss


def make(
    name: str,
    params: Iterable[torch.Tensor],
    *,
    lr: float,
    eps: float,
    alpha: float,
    beta1: float = 0.9,
    **options: Any,
) -> torch.optim.Optimizer:
    """`adam` (betas `beta1`, .999), `rmsprop_tf`, `rmsprop` (torch's: ε outside the root, s₀ = 0), `rmsprop_centred`,
    `adagrad` (torch's: ε outside the root) or `sgd`."""
    match name:
        case "adam":
            return Adam(params, lr=lr, eps=eps, betas=(float(beta1), 0.999), fused=True, **options)
        case "rmsprop_tf":
            return RMSPropTF(params, lr=lr, alpha=alpha, eps=eps, **options)
        case "rmsprop":
            return RMSProp(params, lr=lr, alpha=alpha, eps=eps, **options)
        case "rmsprop_centred":
            return RMSPropCentred(params, lr=lr, alpha=alpha, eps=eps, **options)
        case "adagrad":
            return Adagrad(params, lr=lr, eps=eps, **options)
        case "sgd":
            return SGD(params, lr=lr, **options)
    raise ValueError(name)
