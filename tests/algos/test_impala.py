"""The loss against plain re-implementations, and what `Algorithm` promises about steps, weights and state."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ddrl_bus.algos import Batch, Spaces, make_policy
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.algos.optim import RMSPropTF
from ddrl_bus.errors import RefusedFileError, UsageError

SPACES = Spaces((4,), "float32", "discrete", 3)
T, B = 6, 5


def config(**changes: Any) -> ImpalaConfig:
    return ImpalaConfig(**{"hidden": (8,), "unroll": T, "batch": B, **changes})


def make_batch(seed: int = 0, *, dtype: type = np.float32) -> Batch:
    """Random rows with terminations, truncations and their final observations."""
    rng = np.random.default_rng(seed)
    end = rng.random((T, B))
    terminated, truncated = end < 0.1, (end > 0.1) & (end < 0.3)
    terminated[0, 0], truncated[1, 1] = True, True
    index = np.flatnonzero(truncated)
    return Batch(
        obs=rng.normal(size=(T + 1, B, 4)).astype(dtype),
        action=rng.integers(0, 3, (T, B)),
        reward=rng.normal(size=(T, B)).astype(dtype),
        terminated=terminated,
        truncated=truncated,
        record={"logits": rng.normal(size=(T, B, 3)).astype(dtype)},
        version=np.zeros((T, B), np.int64),
        final_obs=rng.normal(size=(len(index), 4)).astype(dtype),
        final_index=index,
    )


def slow_loss(learner: Impala, batch: Batch) -> torch.Tensor:
    """The paper's three terms, row by row, every forward on its own."""
    c, final = learner.config, dict(zip(batch.final_index.tolist(), batch.final_obs, strict=True))

    def net(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, value = learner.net(obs[None])
        return torch.log_softmax(logits[0], dim=0), value[0]

    total: Any = 0.0
    for b in range(B):
        v_next = 0.0  # v_{s+1} - V_{s+1}
        for t in reversed(range(T)):
            a = int(batch.action[t, b])
            log_pi, value = net(batch.obs[t, b])
            log_mu = torch.log_softmax(batch.record["logits"][t, b], dim=0)
            value_here = value.item()
            ratio = (log_pi[a] - log_mu[a]).exp().item()
            reward = c.reward_scale * float(batch.reward[t, b])
            if batch.terminated[t, b]:
                successor, v_next = 0.0, 0.0
            elif batch.truncated[t, b]:
                successor, v_next = net(final[t * B + b])[1].item(), 0.0
            else:
                successor = net(batch.obs[t + 1, b])[1].item()
            rho, trace = min(c.rho_bar, ratio), c.lam * min(c.c_bar, ratio)
            advantage = reward + c.gamma * (successor + v_next) - value_here
            delta = rho * (reward + c.gamma * successor - value_here)
            v = value_here + delta + c.gamma * trace * v_next
            v_next = v - value_here
            entropy = -(log_pi.exp() * log_pi).sum()
            total = (
                total - rho * advantage * log_pi[a] + c.value_cost * 0.5 * (v - value) ** 2 - c.entropy_cost * entropy
            )
    return total / (T * B) if c.reduction == "mean" else total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "sum", "lam": 0.8, "rho_bar": 1.5, "c_bar": 1.1, "gamma": 0.9},
        {"shared_torso": False, "activation": "tanh", "entropy_cost": 0.1, "value_cost": 2.0, "reward_scale": 0.3},
    ],
)
def test_loss_and_gradient_equal_the_paper_row_by_row(changes: dict[str, Any]) -> None:
    learner = Impala(config(**changes), SPACES, seed=0)
    learner.net.double()
    batch = make_batch(dtype=np.float64).to("cpu")
    slow = torch.autograd.grad(slow_loss(learner, batch), list(learner.net.parameters()))
    loss, _ = learner.loss(batch)
    assert loss.item() == pytest.approx(slow_loss(learner, batch).item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, list(learner.net.parameters())), slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf"])
@pytest.mark.parametrize("clip", [0.05, 40.0])
def test_one_step_by_hand(optimizer: str, clip: float) -> None:
    """Gradient, global-norm clipping and the optimiser's first update, written out."""
    lr, eps, decay = 0.01, 1e-3, 0.9
    settings = config(optimizer=optimizer, lr=lr, eps=eps, rms_decay=decay, max_grad_norm=clip)
    learner = Impala(settings, SPACES, seed=0)
    before = [p.detach().clone() for p in learner.net.parameters()]
    loss, _ = learner.loss(make_batch().to("cpu"))
    grads = torch.autograd.grad(loss, list(learner.net.parameters()))
    norm = float(torch.sqrt(sum((g * g).sum() for g in grads)))  # type: ignore[arg-type]
    assert 0.05 < norm < 40.0
    report = learner.step(make_batch())
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for p, old, g in zip(learner.net.parameters(), before, grads, strict=True):
        g = g * min(1.0, clip / norm)
        update = {
            "adam": g / (g.abs() + eps),
            "rmsprop": g / (torch.sqrt((1 - decay) * g * g) + eps),
            "rmsprop_tf": g / torch.sqrt(decay + (1 - decay) * g * g + eps),
        }[optimizer]
        torch.testing.assert_close(p.detach(), old - lr * update, rtol=1e-4, atol=1e-7)


def test_rmsprop_tf_over_several_steps_with_a_parameter_left_out() -> None:
    p, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = RMSPropTF([p, unused], lr=0.1, alpha=0.9, eps=0.01)
    theta, s = np.ones(3), np.ones(3)
    for g in (np.array([1.0, -2.0, 0.0]), np.array([0.5, 0.5, 3.0])):
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        s = 0.9 * s + 0.1 * g * g
        theta = theta - 0.1 * g / np.sqrt(s + 0.01)
    np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-6)
    assert unused.tolist() == [1.0, 1.0, 1.0]


def test_rows_that_the_actor_just_chose_have_ratio_one() -> None:
    settings = config(hidden=(64, 64))
    learner = Impala(settings, SPACES, seed=3)
    policy = make_policy(Impala, settings, SPACES, seed=0)
    policy.load(learner.weights())
    batch = make_batch()
    acted = policy.act(batch.obs[:T].reshape(T * B, 4), {})
    batch.action = acted.action.reshape(T, B)
    batch.record = {"logits": acted.record["logits"].reshape(T, B, 3)}
    _, report = learner.loss(batch.to("cpu"))
    torch.testing.assert_close(report["rho"], torch.ones(T, B), atol=1e-5, rtol=0)
    assert not report["rho_clipped"].any()


def test_final_observations_count_at_truncated_rows_only() -> None:
    learner = Impala(config(), SPACES, seed=0)
    batch = make_batch().to("cpu")
    loss = learner.loss(batch)[0].item()
    moved = dataclasses.replace(batch, final_obs=batch.final_obs + 1.0)
    assert learner.loss(moved)[0].item() != pytest.approx(loss, rel=1e-6)
    alone = dataclasses.replace(batch, truncated=torch.zeros_like(batch.truncated))
    alone.final_obs, alone.final_index = batch.final_obs[:0], batch.final_index[:0]
    assert np.isfinite(learner.loss(alone)[0].item())


def test_a_state_that_only_truncates_learns_the_value_of_going_on() -> None:
    """One state, reward 1, a time limit after every third row: V must become 1/(1-γ) = 5, not what three rows pay."""
    settings = config(gamma=0.8, lr=0.05, hidden=(), reward_scale=1.0, entropy_cost=0.0, value_cost=1.0)
    learner = Impala(settings, SPACES, seed=0)
    truncated = np.zeros((T, B), bool)
    truncated[2::3] = True
    index = np.flatnonzero(truncated)
    one = np.ones((T + 1, B, 4), np.float32)
    batch = Batch(
        obs=one,
        action=np.zeros((T, B), np.int64),
        reward=np.ones((T, B), np.float32),
        terminated=np.zeros((T, B), bool),
        truncated=truncated,
        record={"logits": np.zeros((T, B, 3), np.float32)},
        version=np.zeros((T, B), np.int64),
        final_obs=one[0, 0][None].repeat(len(index), axis=0),
        final_index=index,
    )

    def value_after(batch: Batch) -> float:
        for _ in range(150):
            learner.step(batch)
        return float(learner.net(torch.ones(1, 4)).value.item())

    assert value_after(batch) == pytest.approx(5.0, abs=0.05)
    dead = dataclasses.replace(batch, terminated=truncated, truncated=np.zeros((T, B), bool))
    dead.final_obs, dead.final_index = batch.final_obs[:0], batch.final_index[:0]
    assert value_after(dead) < 2.5


def test_no_truncation_at_all() -> None:
    learner = Impala(config(), SPACES, seed=0)
    batch = make_batch()
    batch.truncated[:] = False
    batch.final_obs, batch.final_index = batch.final_obs[:0], batch.final_index[:0]
    assert np.isfinite(learner.step(batch)["loss"])


def test_reports_come_every_tenth_update() -> None:
    learner = Impala(config(), SPACES, seed=0)
    reports = [learner.step(make_batch(seed)) for seed in range(11)]
    assert [bool(report) for report in reports] == [True] + [False] * 9 + [True]
    expected = {"loss", "grad_norm", "policy_loss", "value_loss", "entropy", "value", "rho", "rho_clipped", "c_clipped"}
    assert set(reports[0]) == expected
    assert all(np.isfinite(value) for value in reports[10].values())


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf"])
def test_a_resumed_learner_takes_the_same_step_bit_for_bit(optimizer: str) -> None:
    settings = config(optimizer=optimizer, anneal_steps=1000)
    straight, resumed = Impala(settings, SPACES, seed=0), Impala(settings, SPACES, seed=9)
    for seed in range(3):
        straight.step(make_batch(seed))
    state = {name: array.copy() for name, array in straight.state().items()}
    for array in state.values():
        array.setflags(write=False)  # as a checkpoint hands them out
    resumed.load_state(state)
    for seed in range(3, 6):
        straight.step(make_batch(seed))
        resumed.step(make_batch(seed))
    ours, theirs = straight.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert straight.updates == resumed.updates == 6
    assert not all(np.array_equal(state[name], ours[name]) for name in state)


def test_a_state_of_another_network_or_optimizer_is_refused_and_changes_nothing() -> None:
    learner = Impala(config(), SPACES, seed=0)
    learner.step(make_batch())
    before = learner.state()
    foreign = Impala(config(hidden=(9,)), SPACES, seed=0)
    foreign.step(make_batch())
    other = Impala(config(optimizer="rmsprop_tf"), SPACES, seed=0)
    other.step(make_batch())
    for state in (foreign.state(), other.state(), {}, {k: v for k, v in before.items() if k != "rng"}):
        with pytest.raises(RefusedFileError, match="state does not fit algorithm 'impala'"):
            learner.load_state(state)
    after = learner.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_fresh_state_loads_too() -> None:
    learner, fresh = (Impala(config(), SPACES, seed=seed) for seed in (0, 1))
    learner.step(make_batch())
    learner.load_state(fresh.state())
    assert (learner.updates, learner.env_steps) == (0, 0)
    learner.step(make_batch())
    fresh.step(make_batch())
    assert all(np.array_equal(a, b) for a, b in zip(learner.weights().values(), fresh.weights().values(), strict=True))


def test_learning_rate_falls_linearly_over_trained_env_steps() -> None:
    learner = Impala(config(lr=0.1, anneal_steps=4 * T * B), SPACES, seed=0)
    rates = []
    for _ in range(6):
        rates.append(learner.learning_rate)
        learner.step(make_batch())
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
    constant = Impala(config(lr=0.1), SPACES, seed=0)
    constant.step(make_batch())
    assert constant.learning_rate == 0.1


def test_weights_are_a_snapshot_and_seeds_decide_them() -> None:
    learner = Impala(config(), SPACES, seed=0)
    weights = learner.weights()
    kept = {name: array.copy() for name, array in weights.items()}
    learner.step(make_batch())
    assert all(np.array_equal(kept[name], weights[name]) for name in kept)
    assert set(weights) == set(learner.net.state_dict())
    same, other = Impala(config(), SPACES, seed=0).weights(), Impala(config(), SPACES, seed=1).weights()
    assert all(np.array_equal(kept[name], same[name]) for name in kept)
    assert not np.array_equal(kept["policy.weight"], other["policy.weight"])


def test_making_and_stepping_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    Impala(config(), SPACES, seed=0).step(make_batch())
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, r"algo.gamma: 1.5, expected a number from 0 to 1"),
        ({"lr": 0.0}, r"algo.lr: 0.0, expected a number above 0"),
        ({"c_bar": 2.0}, r"algo.c_bar: 2.0, expected at most rho_bar, 1.0"),
        ({"optimizer": "sgd"}, r"algo.optimizer: 'sgd', expected one of adam, rmsprop_tf, rmsprop"),
        ({"unroll": 0}, r"algo.unroll: 0, expected at least 1"),
        ({"hidden": (64, 0)}, r"algo.hidden: \(64, 0\), expected sizes of at least 1"),
        ({"entropy_cost": -1.0}, r"algo.entropy_cost: -1.0, expected a number not below 0"),
        ({"gamma": float("nan")}, r"algo.gamma: nan, expected a number from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=r"device 'cuda' asked for, but torch .* finds no CUDA device"):
        Impala(config(), SPACES, seed=0, device="cuda")
    assert Impala(config(), SPACES, seed=0, device="auto").device.type == "cpu"


def test_every_setting_says_what_it_is() -> None:
    """The topology's help is made of these docstrings."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(ImpalaConfig)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for here, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(here, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(here)
            assert isinstance(after.value, ast.Constant)


def test_a_first_update_does_not_import_torchs_compiler() -> None:
    """It takes longer than torch itself, and a learner would wait for it before its first gradient."""
    code = """
import sys
import numpy as np
from ddrl_bus.algos import Batch, Spaces, algorithm

rule = algorithm("impala")
learner = rule(rule.Config(unroll=1, batch=1), Spaces((2,), "float32", "discrete", 2), seed=0)
row = np.zeros((1, 1), np.float32)
learner.step(
    Batch(
        obs=np.zeros((2, 1, 2), np.float32),
        action=row.astype(np.int64),
        reward=row,
        terminated=row > 0,
        truncated=row > 0,
        record={"logits": np.zeros((1, 1, 2), np.float32)},
        version=row.astype(np.int64),
        final_obs=np.zeros((0, 2), np.float32),
        final_index=np.zeros(0, np.int64),
    )
)
learner.load_state(learner.state())
assert learner.updates == 1
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
