"""What every rule promises about steps, gradients, weights and state."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rows import DISCRETE, SMALL, B, T, make_batch

from ddrl_bus.algos import REGISTRY, Algorithm, Batch, memory
from ddrl_bus.algos.config import AgentConfig, OptimizerName, PolicyGradientConfig, QLearningConfig
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.algos.optim import RMSPropCentred, RMSPropTF
from ddrl_bus.algos.policy_gradient import PolicyGradient
from ddrl_bus.errors import RefusedFileError, UsageError

RULES = sorted(REGISTRY)
OPTIMIZERS = OptimizerName.__args__  # type: ignore[attr-defined]


TARGETS: dict[str, dict[str, Any]] = {  # of a target network that is one update old when it is saved
    "appo": {"target_every": 2, "kl_target": 1e-4},
    "dqn": {"target_every": 2, "n_step": T},
    "r2d2": {"target_every": 2, "unroll": T - 2, "burn_in": 2, "core_size": 4},
}


def make(rule: str = "impala", *, seed: int = 0, **changes: Any) -> Algorithm[Any]:
    cls = REGISTRY[rule]
    return cls(cls.Config(**{**SMALL, **TARGETS.get(rule, {}), **changes}), DISCRETE, seed=seed)


def batch_of(learner: Algorithm[Any], seed: int = 0) -> Batch:
    return dataclasses.replace(make_batch(seed), state=memory.initial(learner.config, DISCRETE, B))


def config(**changes: Any) -> ImpalaConfig:
    return ImpalaConfig(**{**SMALL, **changes})


def same(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ── gradients that somebody else applies


@pytest.mark.parametrize("rule", ["a2c", "impala", "dqn"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_applying_a_gradient_elsewhere_is_a_step_bit_for_bit(rule: str, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "anneal_steps": 1000, "max_grad_norm": 0.1}
    alone, server, worker = (make(rule, seed=seed, **settings) for seed in (0, 0, 9))
    for seed in range(4):
        report = alone.step(make_batch(seed))
        worker.load(server.weights(), server.updates)
        gradient, said = worker.gradients(make_batch(seed))
        server.apply(gradient, T * B)
        assert report in (said, {})
    assert same(alone.state(), server.state())
    assert (worker.updates, worker.env_steps) == (0, 0)
    assert not same(make(rule, **settings).weights(), server.weights())


def test_gradients_come_clipped_and_are_applied_as_they_are() -> None:
    """A server that holds a part of the parameters cannot know the norm of all."""
    whole, _ = make().gradients(make_batch())
    gradient, report = make(max_grad_norm=0.01).gradients(make_batch())
    assert report["grad_norm"] == pytest.approx(np.sqrt(sum((g * g).sum() for g in whole.values())))
    for name, array in gradient.items():
        np.testing.assert_allclose(array, whole[name] * 0.01 / report["grad_norm"], rtol=1e-3)
    server = make(optimizer="sgd", lr=1.0, max_grad_norm=0.01)
    before = server.weights()
    server.apply({"policy.bias": np.full(3, 5, np.float32)}, 1)
    np.testing.assert_allclose(server.weights()["policy.bias"], before["policy.bias"] - 5)


def test_a_gradient_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    learner = make(optimizer="adam")
    gradient, _ = learner.gradients(make_batch())
    learner.apply(gradient, T * B)
    before = learner.state()
    wrong = [
        {**gradient, "policy.weight": gradient["policy.weight"].T},
        {**gradient, "other.weight": gradient["policy.weight"]},
        {"value.bias": np.zeros((), np.float32)},
    ]
    for each in wrong:
        with pytest.raises(UsageError, match=r"gradients .* do not fit the parameters"):
            learner.apply(each, T * B)
    assert same(before, learner.state())


def test_a_parameter_that_a_gradient_leaves_out_stays() -> None:
    learner = make(optimizer="sgd")
    before = learner.weights()
    gradient, _ = learner.gradients(make_batch())
    learner.apply({"policy.bias": gradient["policy.bias"]}, T * B)
    moved = {name for name, array in learner.weights().items() if not np.array_equal(array, before[name])}
    assert moved == {"policy.bias"}


def test_sgd_takes_gradients_in_any_order() -> None:
    """To rounding: what the parameter server's fault tests count on."""
    learner = make()
    gradients = [learner.gradients(make_batch(seed))[0] for seed in range(4)]
    forth, back = (make(optimizer="sgd", lr=0.1) for _ in range(2))
    for gradient in gradients:
        forth.apply(gradient, 1)
    for gradient in reversed(gradients):
        back.apply(gradient, 1)
    for ours, theirs in zip(forth.weights().values(), back.weights().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ── steps


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf", "rmsprop_centred", "adagrad"])
@pytest.mark.parametrize("clip", [0.05, 40.0])
def test_one_step_by_hand(optimizer: str, clip: float) -> None:
    """Gradient, global-norm clipping and the optimiser's first update, written out."""
    lr, eps, decay = 0.01, 1e-3, 0.9
    settings = config(optimizer=optimizer, lr=lr, eps=eps, rms_decay=decay, max_grad_norm=clip)
    learner = Impala(settings, DISCRETE, seed=0)
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
            "rmsprop_centred": g / torch.sqrt(decay * (1 - decay) * g * g + eps),
            "adagrad": g / (g.abs() + eps),
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


def test_rmsprop_centred_over_several_steps() -> None:
    """The second parameter's gradient is constant, so that its variance tends to 0, from where rounding must not take
    it below."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = RMSPropCentred([p], lr=0.1, alpha=0.9, eps=1e-9)
    theta, m, s = np.ones(2), np.zeros(2), np.zeros(2)
    for step in range(400):
        g = np.array([np.sin(step), 300.0])
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        m, s = 0.9 * m + 0.1 * g, 0.9 * s + 0.1 * g * g
        theta = theta - 0.1 * g / np.sqrt(s - m * m + 1e-9)
        if step in (0, 4, 40):
            expected = theta if step < 40 else theta[:1]
            np.testing.assert_allclose(p.detach().numpy()[: len(expected)], expected, rtol=1e-4)
    assert p.isfinite().all()


def test_adagrad_over_several_steps() -> None:
    learner = make(optimizer="adagrad", lr=0.1, eps=1e-6)
    theta, s = learner.weights()["policy.bias"].astype(float), np.zeros(3)
    for g in np.array([[1.0, -2.0, 0.5], [0.5, 0.5, -3.0]], np.float32):
        learner.apply({"policy.bias": g}, 1)
        s += g.astype(float) ** 2
        theta = theta - 0.1 * g / (np.sqrt(s) + 1e-6)
    np.testing.assert_allclose(learner.weights()["policy.bias"], theta, rtol=1e-5)


def test_adam_without_momentum() -> None:
    """SEED RL's: the first two updates with β1 = 0, written out."""
    learner = make(optimizer="adam", adam_beta1=0, lr=0.01, eps=3.125e-7)
    gradients = [np.array([1.0, -2.0, 0.5], np.float32), np.array([0.5, 0.5, -3.0], np.float32)]
    theta, s = learner.weights()["policy.bias"].astype(float), np.zeros(3)
    for update, g in enumerate(gradients, start=1):
        learner.apply({"policy.bias": g}, 1)
        s = 0.999 * s + 0.001 * g.astype(float) ** 2
        theta = theta - 0.01 * g / (np.sqrt(s / (1 - 0.999**update)) + 3.125e-7)
    np.testing.assert_allclose(learner.weights()["policy.bias"], theta, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_reports_come_every_tenth_update(rule: str) -> None:
    learner = make(rule)
    reports = [learner.step(batch_of(learner, seed)) for seed in range(11)]
    assert [bool(report) for report in reports] == [True] + [False] * 9 + [True]
    policy = {"policy_loss", "value_loss", "entropy", "value", "rho"}
    said = policy if issubclass(REGISTRY[rule], PolicyGradient) else {"q", "target", "td_error"}
    assert {"loss", "grad_norm"} | said <= reports[0].keys()
    assert all(np.isfinite(value) for value in reports[10].values())


def test_learning_rate_falls_linearly_over_trained_env_steps() -> None:
    learner = Impala(config(lr=0.1, anneal_steps=4 * T * B), DISCRETE, seed=0)
    rates = []
    for _ in range(6):
        rates.append(learner.learning_rate)
        learner.step(make_batch())
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
    constant = Impala(config(lr=0.1), DISCRETE, seed=0)
    constant.step(make_batch())
    assert constant.learning_rate == 0.1


# ── state and weights


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_learner_takes_the_same_step_bit_for_bit(rule: str, optimizer: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "anneal_steps": 1000}
    straight, resumed = make(rule, seed=0, **settings), make(rule, seed=9, **settings)
    for seed in range(3):
        straight.step(batch_of(straight, seed))
    state = {name: array.copy() for name, array in straight.state().items()}
    for array in state.values():
        array.setflags(write=False)  # as a checkpoint hands them out
    resumed.load_state(state)
    for seed in range(3, 6):
        straight.step(batch_of(straight, seed))
        resumed.step(batch_of(straight, seed))
    assert same(straight.state(), resumed.state())
    assert straight.updates == resumed.updates == 6
    assert not same(state, straight.state())


def test_a_state_of_two_networks_holds_both() -> None:
    learner = make("appo")
    for seed in range(2):
        learner.step(make_batch(seed))
    state = learner.state()
    assert {f"target.{name}" for name in learner.weights()} < state.keys()
    assert not np.array_equal(state["net.policy.weight"], state["target.policy.weight"])
    halved = {name: array for name, array in state.items() if not name.startswith("target.")}
    with pytest.raises(RefusedFileError, match="state does not fit algorithm 'appo'"):
        learner.load_state(halved)
    assert same(state, learner.state())


def test_a_state_of_another_network_or_optimizer_is_refused_and_changes_nothing() -> None:
    learner = Impala(config(), DISCRETE, seed=0)
    learner.step(make_batch())
    before = learner.state()
    foreign = Impala(config(hidden=(9,)), DISCRETE, seed=0)
    foreign.step(make_batch())
    other = Impala(config(optimizer="rmsprop_tf"), DISCRETE, seed=0)
    other.step(make_batch())
    for state in (foreign.state(), other.state(), {}, {k: v for k, v in before.items() if k != "rng"}):
        with pytest.raises(RefusedFileError, match="state does not fit algorithm 'impala'"):
            learner.load_state(state)
    after = learner.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_fresh_state_loads_too() -> None:
    learner, fresh = (Impala(config(), DISCRETE, seed=seed) for seed in (0, 1))
    learner.step(make_batch())
    learner.load_state(fresh.state())
    assert (learner.updates, learner.env_steps) == (0, 0)
    learner.step(make_batch())
    fresh.step(make_batch())
    assert all(np.array_equal(a, b) for a, b in zip(learner.weights().values(), fresh.weights().values(), strict=True))


def test_weights_are_a_snapshot_and_seeds_decide_them() -> None:
    learner = Impala(config(), DISCRETE, seed=0)
    weights = learner.weights()
    kept = {name: array.copy() for name, array in weights.items()}
    learner.step(make_batch())
    assert all(np.array_equal(kept[name], weights[name]) for name in kept)
    assert set(weights) == set(learner.net.state_dict())
    same, other = Impala(config(), DISCRETE, seed=0).weights(), Impala(config(), DISCRETE, seed=1).weights()
    assert all(np.array_equal(kept[name], same[name]) for name in kept)
    assert not np.array_equal(kept["policy.weight"], other["policy.weight"])


# ── replicas


def with_parameters(count: int, seed: int = 0) -> Algorithm[Any]:
    """A learner of so many parameters, as `digest` sees them, all random."""
    learner = make()
    learner._params = [torch.nn.Parameter(torch.randn(count, generator=torch.Generator().manual_seed(seed)))]
    return learner


def bits_of(learner: Algorithm[Any]) -> NDArray[np.uint32]:
    (flat,) = learner._params
    found: NDArray[np.uint32] = flat.detach().numpy().view(np.uint32)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_equal_parameters_have_equal_digests(rule: str) -> None:
    learner, other = make(rule, seed=0), make(rule, seed=9)
    assert learner.digest() != other.digest()
    learner.step(batch_of(learner))
    other.load_state(learner.state())
    assert learner.digest() == learner.digest() == other.digest()
    other.step(batch_of(other, seed=1))
    assert learner.digest() != other.digest()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_digest_tells_of_each_bit(count: int) -> None:
    learner = with_parameters(count)
    expected, bits = learner.digest(), bits_of(learner)
    seen = {expected}
    for place in range(count):
        for bit in range(32):
            bits[place] ^= np.uint32(1 << bit)
            seen.add(learner.digest())
            bits[place] ^= np.uint32(1 << bit)
    assert len(seen) == 1 + 32 * count
    assert learner.digest() == expected


@pytest.mark.parametrize("count", [8, 9])
def test_a_digest_tells_of_two_changes(count: int) -> None:
    """Of two parameters that change places, and of the same bit in two places: of signs, for one."""
    learner = with_parameters(count)
    expected, bits = learner.digest(), bits_of(learner)
    for one, other in ((a, b) for a in range(count) for b in range(a)):
        bits[[one, other]] = bits[[other, one]]
        assert learner.digest() != expected, (one, other)
        bits[[one, other]] = bits[[other, one]]
        for bit in range(32):
            bits[[one, other]] ^= np.uint32(1 << bit)
            assert learner.digest() != expected, (one, other, bit)
            bits[[one, other]] ^= np.uint32(1 << bit)
    assert learner.digest() == expected


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [(30, 30), (30, 6), (1, 29)])
def test_pooled_gradients_are_those_of_all_rows(reduction: str, rows: tuple[int, int]) -> None:
    """g is what a replica's loss has over its own rows: a sum over them, or their mean."""
    rng = np.random.default_rng(0)
    learners = [make(reduction=reduction) for _ in rows]
    gradients = [[torch.tensor(rng.normal(size=p.shape)).float() for p in learners[0]._params] for _ in rows]
    given: list[torch.Tensor] = []

    def pool(rank: int) -> None:
        learner = learners[rank]
        for p, gradient in zip(learner._params, gradients[rank], strict=True):
            p.grad = gradient.clone()
        learner._params[-1].grad = None  # of no use to this loss, at nobody's
        learner._pool_gradients(rows[rank])

    learners[0].all_reduce = given.append
    pool(0)
    (first,) = (tensor.clone() for tensor in given)
    for tensor in given:
        assert tensor.is_contiguous()
    scale = rows[0] if reduction == "mean" else 1
    held = learners[0]._params[:-1]
    mine = torch.cat([g.flatten() for g in gradients[0][:-1]])
    assert first.shape == (sum(p.numel() for p in held) + 1,)
    learners[1].all_reduce = lambda tensor: tensor.add_(torch.cat([mine * scale, torch.tensor([float(rows[0])])]))
    pool(1)
    weights = [n / sum(rows) for n in rows] if reduction == "mean" else [1, 1]
    for p, *both in zip(learners[1]._params[:-1], *(each[:-1] for each in gradients), strict=True):
        assert p.grad is not None
        expected = sum(w * g for w, g in zip(weights, both, strict=True))
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6)
    assert learners[1]._params[-1].grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_replica_alone_learns_what_nobody_pools(reduction: str) -> None:
    alone, replica = (make(reduction=reduction, optimizer="sgd", lr=0.1) for _ in range(2))
    sizes: list[int] = []
    replica.all_reduce = lambda tensor: sizes.append(tensor.numel())
    for seed in range(3):
        alone.step(make_batch(seed))
        replica.step(make_batch(seed))
    for ours, theirs in zip(alone.weights().values(), replica.weights().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert len(sizes) == 3  # one piece for each gradient


def test_gradients_are_pooled_before_they_are_clipped() -> None:
    """Each replica would clip another share of what is one gradient."""
    learner = make(max_grad_norm=0.01, optimizer="sgd", lr=1.0)
    learner.all_reduce = lambda tensor: tensor.mul_(100)
    before = learner.weights()
    learner.step(make_batch())
    moved = np.concatenate([(learner.weights()[name] - before[name]).ravel() for name in before])
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)


def test_sums_are_pooled_into_a_tensor_of_their_own() -> None:
    learner = make()
    mine = torch.tensor([1.0, 2.0])
    assert learner.pooled(mine) is mine
    learner.all_reduce = lambda tensor: tensor.add_(10)
    assert learner.pooled(mine).tolist() == [11, 12]
    assert mine.tolist() == [1, 2]


@pytest.mark.parametrize(("rule", "steps"), [("impala", 1), ("ppo", 6)])
def test_gradient_steps_are_part_of_the_state(rule: str, steps: int) -> None:
    """Who has made more of them is further, also within an update."""
    settings = {"epochs": 3, "minibatches": 2} if rule == "ppo" else {}
    learner, other = (make(rule, seed=seed, **settings) for seed in (0, 1))
    for seed in range(2):
        learner.step(batch_of(learner, seed))
    assert learner.gradient_steps == 2 * steps
    learner._descend()
    other.load_state(learner.state())
    assert (other.gradient_steps, other.updates, other.env_steps) == (2 * steps + 1, 2, 2 * T * B)


# ── settings, and what is left alone


def test_making_and_stepping_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    Impala(config(), DISCRETE, seed=0).step(make_batch())
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, r"algo.gamma: 1.5, expected a number from 0 to 1"),
        ({"lr": 0.0}, r"algo.lr: 0.0, expected a number above 0"),
        ({"optimizer": "lbfgs"}, r"algo.optimizer: 'lbfgs', expected one of adam, rmsprop_tf, rmsprop, sgd"),
        ({"unroll": 0}, r"algo.unroll: 0, expected at least 1"),
        ({"hidden": (64, 0)}, r"algo.hidden: \(64, 0\), expected sizes of at least 1"),
        ({"entropy_cost": -1.0}, r"algo.entropy_cost: -1.0, expected a number not below 0"),
        ({"gamma": float("nan")}, r"algo.gamma: nan, expected a number from 0 to 1"),
        ({"adam_beta1": 1.0}, r"algo.adam_beta1: 1.0, expected a number from 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PolicyGradientConfig(**changes)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=r"device 'cuda' asked for, but torch .* finds no CUDA device"):
        Impala(config(), DISCRETE, seed=0, device="cuda")
    assert Impala(config(), DISCRETE, seed=0, device="auto").device.type == "cpu"


@pytest.mark.parametrize(
    "cls", [AgentConfig, PolicyGradientConfig, QLearningConfig, *(REGISTRY[rule].Config for rule in RULES)]
)
def test_every_setting_says_what_it_is(cls: type) -> None:
    """The topology's help is made of these docstrings."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
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
        record={"policy": np.zeros((1, 1, 2), np.float32)},
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
