"""PPO's loss and advantages against twins written from the equations, its minibatches, and what several learners would
agree on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from played import ENVS, play
from rows import CONTINUOUS, DISCRETE, SMALL, B, T, assert_same_loss_and_gradient, columns, make_batch, truncating

from ddrl_bus.algos import Batch, Spaces, make_policy
from ddrl_bus.algos.ppo import Ppo, PpoConfig
from ddrl_bus.errors import UsageError


def config(**changes: Any) -> PpoConfig:
    return PpoConfig(**{**SMALL, **changes})


def learner_of(spaces: Spaces = DISCRETE, seed: int = 0, **changes: Any) -> Ppo:
    """Away from the nearly uniform policy of its initialisation."""
    learner = Ppo(config(**changes), spaces, seed=seed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner


def ppo_batch(seed: int = 0, *, dtype: type = np.float32, spaces: Spaces = DISCRETE) -> Batch:
    batch = make_batch(seed, dtype=dtype, spaces=spaces)
    batch.record["value"] = np.random.default_rng(seed).normal(size=(T, B)).astype(dtype)
    return batch


def played_batch(learner: Ppo, seed: int = 0) -> Batch:
    """That the learner's own policy played, some rows after its first episodes began."""
    policy = make_policy(Ppo, learner.config, learner.spaces, seed)
    policy.load(learner.weights())
    played = play(policy, learner.spaces, T + 3, seed=seed)
    return replace(played.window(3, T), record={name: array[3:] for name, array in played.record.items()})


def descended(learner: Ppo, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """What is reported of each minibatch of an update."""
    for minibatch in learner.passes(batch.to("cpu")):
        yield learner._backward(minibatch)
        learner._descend()


# ── equations


def slow_advantages(learner: Ppo, batch: Batch) -> torch.Tensor:
    """Σ (γλ)^k δ_{t+k}, each sum written out to the end of the unroll or of the episode; raw rewards."""
    c, value = learner.config, batch.record["value"]
    final = dict(zip(batch.final_index.tolist(), batch.final_obs, strict=True))

    def delta(t: int, b: int) -> float:
        if batch.terminated[t, b]:
            after = 0.0
        elif batch.truncated[t, b]:
            after = learner.net(final[t * B + b][None]).value.item()
        else:
            after = float(value[t + 1, b]) if t + 1 < T else learner.net(batch.obs[T, b][None]).value.item()
        return float(c.reward_scale * batch.reward[t, b] + c.gamma * after - value[t, b])

    def advantage(t: int, b: int) -> float:
        total = 0.0
        for k in range(T - t):
            total += (c.gamma * c.gae_lambda) ** k * delta(t + k, b)
            if batch.terminated[t + k, b] or batch.truncated[t + k, b]:
                break
        return total

    return torch.tensor([[advantage(t, b) for b in range(B)] for t in range(T)], dtype=torch.float64)


def slow_loss(learner: Ppo, batch: Batch) -> torch.Tensor:
    c, total = learner.config, torch.zeros((), dtype=torch.float64)
    advantages = slow_advantages(learner, batch)
    normal = advantages
    if c.advantage_norm != "none":
        normal = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for b, rows in enumerate(columns(learner, batch)):
        for t, row in enumerate(rows):
            r, before = (row.log_pi - row.mu.log_prob(row.action)).exp(), batch.record["value"][t, b]
            target = advantages[t, b] + before
            error = (row.value - target) ** 2
            if c.value_clip:
                clipped = before + torch.clamp(row.value - before, -c.value_clip, c.value_clip)
                error = torch.max(error, (clipped - target) ** 2)
            total = total - torch.min(r * normal[t, b], r.clamp(1 - c.clip, 1 + c.clip) * normal[t, b])
            total = total + c.value_cost * 0.5 * error - c.entropy_cost * row.pi.entropy()
    return total / (T * B) if c.reduction == "mean" else total


@pytest.mark.parametrize("spaces", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "sum", "gamma": 0.9, "gae_lambda": 0.7, "value_clip": 0.3, "advantage_norm": "none"},
        {"advantage_norm": "batch", "clip": 0.4, "entropy_cost": 0.1, "value_cost": 2.0, "shared_torso": False},
    ],
)
def test_loss_and_gradient_equal_the_paper_row_by_row(changes: dict[str, Any], spaces: Spaces) -> None:
    learner = learner_of(spaces, **{"reward_scale": 1.0, "minibatches": 1, **changes})
    learner.net.double()
    batch = ppo_batch(dtype=np.float64, spaces=spaces).to("cpu")
    whole = next(iter(learner.passes(batch)))
    assert 0 < learner.loss(whole)[1]["ratio_clipped"].float().mean() < 1
    assert_same_loss_and_gradient(learner, whole, lambda learner, _: slow_loss(learner, batch))


@pytest.mark.parametrize(("gae_lambda", "gamma"), [(0.0, 0.9), (0.6, 0.9), (1.0, 1.0)])
def test_advantages_equal_the_sum_of_td_errors(gae_lambda: float, gamma: float) -> None:
    learner = learner_of(gae_lambda=gae_lambda, gamma=gamma, advantage_norm="none", reward_scale=1.0)
    batch = ppo_batch().to("cpu")
    expected = slow_advantages(learner, batch).float()
    found = learner._with_advantages(batch).record
    torch.testing.assert_close(found["advantage"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["target"], expected + batch.record["value"], rtol=1e-5, atol=1e-5)


def constant(learner: Ppo, *, ratio: float, advantage: float, value: float, target: float) -> Batch:
    """Rows that are all alike, of a learner that `flat` made: its policy is uniform, and V_old is 0."""
    old = 1 / (3 * ratio)
    numbers = {"advantage": advantage, "value": 0.0, "target": target}
    with torch.no_grad():
        learner.net.value.bias.fill_(value)
    batch = make_batch().to("cpu")
    batch.action[:] = 0
    batch.record["policy"][:] = torch.tensor([old, (1 - old) / 2, (1 - old) / 2]).log()
    batch.record |= {name: torch.full((T, B), number) for name, number in numbers.items()}
    return batch


def flat(**changes: Any) -> Ppo:
    learner = Ppo(config(hidden=(), entropy_cost=0.0, value_cost=1.0, **changes), DISCRETE, seed=0)
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter.zero_()
    return learner


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "pushes"),
    [(1.5, 2, -2.4, False), (1.1, 2, -2.2, True), (0.5, 2, -1.0, True), (1.5, -2, 3.0, True), (0.5, -2, 1.6, False)],
)
def test_the_surrogate_by_hand(ratio: float, advantage: float, loss: float, pushes: bool) -> None:
    """It stops pushing where π has left π_old by ε in the direction of the advantage, and only there."""
    learner = flat(clip=0.2)
    total, report = learner.loss(constant(learner, ratio=ratio, advantage=advantage, value=0, target=0))
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(report["policy_loss"], torch.full((T, B), loss))
    assert bool(learner.net.policy.bias.grad.abs().max() > 0.01) == pushes
    assert bool(report["ratio_clipped"].all()) == (abs(ratio - 1) > 0.2)
    old = 1 / (3 * ratio)
    kl = old * math.log(3 * old) + (1 - old) * math.log(1.5 * (1 - old))
    torch.testing.assert_close(report["kl"], torch.full((T, B), kl), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("value_clip", "value", "loss", "pushes"),
    [
        (0.2, 0.1, 0.5 * 0.81, True),
        (0.2, 0.5, 0.5 * 0.64, False),  # has come nearer to the target by more than the limit
        (0.2, -0.5, 0.5 * 2.25, True),  # has gone away from it
        (0.0, 0.5, 0.5 * 0.25, True),
    ],
)
def test_the_value_loss_by_hand(value_clip: float, value: float, loss: float, pushes: bool) -> None:
    learner = flat(value_clip=value_clip)
    total, report = learner.loss(constant(learner, ratio=1, advantage=0, value=value, target=1))
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(report["value_loss"], torch.full((T, B), loss))
    assert bool(learner.net.value.bias.grad.abs() > 0.1) == pushes


def test_a_state_that_only_truncates_learns_the_value_of_going_on() -> None:
    """V must become 1/(1-γ) = 5, not what three rows pay."""
    settings = {"gamma": 0.8, "lr": 0.05, "hidden": (), "reward_scale": 1.0, "epochs": 1, "minibatches": 1}

    def value_after(batch: Batch) -> float:
        learner = Ppo(config(**settings), DISCRETE, seed=0)
        for _ in range(200):
            value = float(learner.net(torch.ones(1, 4)).value.item())
            batch.record["value"] = np.full((T, B), value, np.float32)
            learner.step(batch)
        return value

    assert value_after(truncating()) == pytest.approx(5.0, abs=0.05)
    assert value_after(truncating(dead=True)) < 2.5


# ── minibatches


AGENTS: dict[str, tuple[Spaces, dict[str, Any]]] = {
    "discrete": (DISCRETE, {}),
    "continuous": (CONTINUOUS, {}),
    "own_torsos": (DISCRETE, {"shared_torso": False}),
    "lstm": (DISCRETE, {"core": "lstm", "core_size": 5, "last_inputs": True}),
    "gru_continuous": (CONTINUOUS, {"core": "gru", "core_size": 5}),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_the_policy_that_played_is_the_one_that_the_passes_begin_with(agent: str) -> None:
    """Ratio ≡ 1, KL ≡ 0 and V = V_old until the first gradient is applied, in whatever columns; then no more."""
    spaces, changes = AGENTS[agent]
    learner = learner_of(spaces, batch=ENVS, lr=0.03, minibatches=3, **changes)
    batch = played_batch(learner)
    assert batch.truncated.any()
    assert batch.terminated.any()
    for minibatch in learner.passes(batch.to("cpu")):
        _, report = learner.loss(minibatch)
        torch.testing.assert_close(report["rho"], torch.ones(T, 2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(report["kl"], torch.zeros(T, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(report["value"], minibatch.record["value"], rtol=1e-5, atol=1e-5)
        assert not report["ratio_clipped"].any()
    reports = list(descended(learner, batch))
    assert len(reports) == learner.config.epochs * 3
    assert reports[-1]["kl"].mean() > 1e-3


def shorter(batch: Batch, rows: int) -> Batch:
    """The first `rows` of it."""
    inside = batch.final_index < rows * B
    return replace(
        batch,
        obs=batch.obs[: rows + 1],
        **{name: getattr(batch, name)[:rows] for name in ("action", "reward", "terminated", "truncated", "version")},
        record={name: array[:rows] for name, array in batch.record.items()},
        final_obs=batch.final_obs[inside],
        final_index=batch.final_index[inside],
    )


@pytest.mark.parametrize(("minibatches", "rows"), [(1, T), (2, T), (4, T), (4, 2), (B, 1)])
def test_each_epoch_deals_all_columns_out_anew(minibatches: int, rows: int) -> None:
    """As many minibatches however many rows there are, and each with all that belongs to its columns."""
    learner = learner_of(minibatches=minibatches, epochs=6, core="lstm", core_size=3)
    batch = shorter(ppo_batch(), rows)
    batch.version[:] = np.arange(B)
    batch.state = {name: np.random.default_rng(0).normal(size=(B, 3)).astype(np.float32) for name in ("h", "c")}
    batch = batch.to("cpu")
    dealt: list[list[int]] = []
    for each in learner.passes(batch):
        mine = each.version[0]
        for name in ("obs", "action", "reward", "terminated", "truncated"):
            assert torch.equal(getattr(each, name), getattr(batch, name)[:, mine]), name
        assert all(torch.equal(each.record[name], array[:, mine]) for name, array in batch.record.items())
        assert all(torch.equal(each.state[name], array[mine]) for name, array in batch.state.items())
        dealt.append(mine.tolist())
    assert len(dealt) == 6 * minibatches
    epochs = [dealt[k : k + minibatches] for k in range(0, len(dealt), minibatches)]
    orders = [list(chain(*epoch)) for epoch in epochs]
    assert all(sorted(order) == list(range(B)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert all(max(map(len, epoch)) - min(map(len, epoch)) <= 1 for epoch in epochs)


@pytest.mark.parametrize("norm", ["minibatch", "batch", "none"])
def test_advantages_are_normalised_over_what_is_asked_for(norm: str) -> None:
    learner = learner_of(advantage_norm=norm, minibatches=2, epochs=1, reward_scale=1.0)
    batch = ppo_batch().to("cpu")
    each = [minibatch.record["advantage"] for minibatch in learner.passes(batch)]
    over = each if norm == "minibatch" else [torch.cat(each, dim=1)]
    normal = [abs(float(x.mean())) < 1e-6 and abs(float(x.std()) - 1) < 1e-5 for x in over]
    assert all(normal) == (norm != "none")
    if norm == "batch":
        assert all(abs(float(x.mean())) > 1e-3 for x in each)
    one_row = replace(learner._with_advantages(batch), record={"advantage": torch.full((1, 1), 3.0)})
    assert learner._normalised([one_row])[0].record["advantage"].item() == 0


# ── updates


@pytest.mark.parametrize(("kl_stop", "epochs"), [(0.0, 4), (0.019, 3), (0.021, 4), (0.009, 2), (1e-9, 1)])
def test_an_update_ends_where_the_policy_has_strayed(kl_stop: float, epochs: int) -> None:
    """The last minibatch of each epoch decides."""
    learner = learner_of(kl_stop=kl_stop, minibatches=2)
    measured = [9.0, 0.001, 9.0, 0.01, 9.0, 0.02, 9.0, 9.0]
    seen = 0
    for _ in learner.passes(ppo_batch().to("cpu")):
        learner._kl = torch.full((T, B), measured[seen])
        seen += 1
    assert seen == 2 * epochs


def test_large_steps_end_an_update_early() -> None:
    def minibatches(lr: float) -> list[int]:
        """Of two updates: the second one's first epoch is not the first update's fault."""
        learner = learner_of(batch=ENVS, lr=lr, minibatches=2, kl_stop=0.02)
        return [len(list(descended(learner, played_batch(learner)))) for _ in range(2)]

    assert minibatches(1e-5) == [8, 8]
    assert minibatches(0.3) == [2, 2]


def test_an_update_is_many_gradient_steps() -> None:
    learner, by_hand = (learner_of(optimizer="sgd", lr=0.1, max_grad_norm=0.5, epochs=2) for _ in range(2))
    learner.step(ppo_batch())
    assert (learner.updates, learner.env_steps) == (1, T * B)
    parameters, clipped = list(by_hand.net.parameters()), 0
    for minibatch in by_hand.passes(ppo_batch().to("cpu")):
        gradients = torch.autograd.grad(by_hand.loss(minibatch)[0], parameters)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        clipped += norm > 0.5
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * min(1, 0.5 / norm) * gradient
    assert clipped > 0
    for ours, theirs in zip(learner.weights().values(), by_hand.weights().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_resumed_learner_draws_the_same_minibatches() -> None:
    straight, resumed = (learner_of(seed=seed, anneal_steps=1000) for seed in (0, 9))
    for seed in range(2):
        straight.step(ppo_batch(seed))
    resumed.load_state(straight.state())
    for learner in (straight, resumed):
        learner.step(ppo_batch(2))
    ours, theirs = straight.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_its_gradient_is_not_sent_away() -> None:
    with pytest.raises(UsageError, match="ppo makes several passes over a batch"):
        learner_of().gradients(ppo_batch())


# ── several learners


class Sum:
    """Adds up over threads, as an all-reduce does."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = Barrier(ranks), dict[int, torch.Tensor]()

    def __call__(self, rank: int, tensor: torch.Tensor) -> None:
        self.given[rank] = tensor.clone()
        self.barrier.wait(timeout=30)
        total = torch.stack([self.given[each] for each in sorted(self.given)]).sum(0)
        self.barrier.wait(timeout=30)
        tensor.copy_(total)


@pytest.mark.parametrize("changes", [{}, {"advantage_norm": "batch"}, {"kl_stop": 0.0055, "advantage_norm": "none"}])
def test_learners_of_two_shares_equal_one_of_all(changes: dict[str, Any]) -> None:
    """What must be pooled is: moments, KL (.0060 and .0052 after three epochs, .0054 over all rows), and gradients
    before their norm is clipped; of 2 and of 4 columns."""
    settings = config(
        batch=ENVS, optimizer="sgd", lr=0.5, minibatches=1, max_grad_norm=0.2, reward_scale=1.0, **changes
    )
    one = Ppo(settings, DISCRETE, seed=0)
    batch = played_batch(one).to("cpu")
    add = Sum(2)

    def update(rank: int, share: list[int]) -> Ppo:
        learner = Ppo(settings, DISCRETE, seed=0)
        learner.all_reduce = partial(add, rank)
        mine = [(k, b) for k, b in enumerate((batch.final_index % ENVS).tolist()) if b in share]
        rows = [int(batch.final_index[k]) // ENVS * len(share) + share.index(b) for k, b in mine]
        columns = {
            name: getattr(batch, name)[:, share]
            for name in ("obs", "action", "reward", "terminated", "truncated", "version")
        }
        learner.step(
            replace(
                batch,
                **columns,
                record={name: array[:, share] for name, array in batch.record.items()},
                final_obs=batch.final_obs[[k for k, _ in mine]],
                final_index=torch.tensor(rows, dtype=torch.int64),
            )
        )
        return learner

    before = one.weights()
    one.step(batch)
    with ThreadPoolExecutor() as threads:
        several = list(threads.map(update, (0, 1), ([0, 3], [1, 2, 4, 5])))
    for name, expected in one.weights().items():
        for learner in several:
            np.testing.assert_allclose(learner.weights()[name], expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(before[name], expected, rtol=1e-3, atol=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(*(each.weights().values() for each in several), strict=True))


# ── settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 1.0}, r"algo.clip: 1.0, expected a number above 0 and below 1"),
        ({"epochs": 0}, r"algo.epochs: 0, expected at least 1"),
        ({"minibatches": B + 1}, rf"algo.minibatches: {B + 1}, expected from 1 to batch, {B}"),
        ({"gae_lambda": 1.5}, r"algo.gae_lambda: 1.5, expected a number from 0 to 1"),
        ({"value_clip": -0.1}, r"algo.value_clip: -0.1, expected a number not below 0"),
        ({"kl_stop": -1.0}, r"algo.kl_stop: -1.0, expected a number not below 0"),
        ({"advantage_norm": "all"}, r"algo.advantage_norm: 'all', expected one of minibatch, batch, none"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)
