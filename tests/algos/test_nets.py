"""Networks: the one that learns says of a batch what the one that acted said, row by row, whatever they carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from ddrl_bus.algos import Batch, Policy, Spaces, make_policy, memory
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_policy import NumpyPolicy
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.torch_policy import TorchPolicy
from ddrl_bus.errors import UsageError

EXPLORE = Explore(np.zeros(1, np.float32))

T, B = 7, 4


class Recording(Impala):
    """Records values too, to be compared."""

    @classmethod
    def record(cls, config: ImpalaConfig, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super().record(config, spaces), "value": ("float32", ())}

    @classmethod
    def act(
        cls, config: ImpalaConfig, spaces: Spaces, outputs: Mapping[str, Any], noise: Noise, explore: Explore | None
    ) -> tuple[Any, dict[str, Any]]:
        action, record = super().act(config, spaces, outputs, noise, explore)
        return action, {**record, "value": outputs["value"]}


def learner_of(spaces: Spaces, seed: int = 1, **changes: Any) -> Recording:
    """With every parameter away from where initialisation leaves it."""
    settings = ImpalaConfig(**{"hidden": (16, 8), "core_size": 6, **changes})
    learner = Recording(settings, spaces, seed=seed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


class Walk:
    """Random episodes of B environments that a policy plays unroll after unroll; `expected` [T, B] is what its values
    say of each row's successor, nan where it terminated."""

    def __init__(self, policy: Policy, spaces: Spaces, seed: int = 0) -> None:
        self.policy, self.spaces = policy, spaces
        self.rng = np.random.default_rng(seed)
        self.obs, self.state = self._observe(B), policy.initial_state(B)

    def _observe(self, n: int) -> Any:
        drawn = self.rng.normal(size=(n, *self.spaces.obs_shape))
        match self.spaces.obs_dtype:
            case "uint8":
                return (100 * np.abs(drawn)).astype(np.uint8)
            case "bool":
                return drawn > 0
        return drawn.astype(self.spaces.obs_dtype)

    def _value(self, obs: Any, state: memory.State) -> Any:
        return self.policy.act(obs, _copy(state), EXPLORE).record["value"].copy()

    def unroll(self, ends: float = 0.15) -> tuple[Batch, Any]:
        """`ends`: probability of a termination, and of a truncation, after each row."""
        before, rows, finals, indices, expected = _copy(self.state), [], [], [], []
        for t in range(T):
            obs, acted = self.obs, self.policy.act(self.obs, self.state, EXPLORE)
            action, record = acted.action.copy(), {name: array.copy() for name, array in acted.record.items()}
            drawn, reward = self.rng.random(B), (2 * self.rng.normal(size=B)).astype(np.float32)
            terminated, truncated = drawn < ends, (drawn >= ends) & (drawn < 2 * ends)
            onward = memory.carry(_copy(acted.state), action, reward, np.zeros(0, np.int64))
            self.obs = self._observe(B)
            self.state = memory.carry(acted.state, action, reward, np.flatnonzero(terminated | truncated))
            final = self._observe(B)
            value = np.where(truncated, self._value(final, onward), self._value(self.obs, self.state))
            expected.append(np.where(terminated, np.nan, value))
            indices.append(t * B + np.flatnonzero(truncated))
            finals.append(final[truncated])
            rows.append((obs, action, reward, terminated, truncated, record))
        obs, action, reward, terminated, truncated, record = zip(*rows, strict=True)
        return Batch(
            obs=np.stack([*obs, self.obs]),
            action=np.stack(action),
            reward=np.stack(reward),
            terminated=np.stack(terminated),
            truncated=np.stack(truncated),
            record={name: np.stack([each[name] for each in record]) for name in record[0]},
            version=np.zeros((T, B), np.int64),
            final_obs=np.concatenate(finals),
            final_index=np.concatenate(indices),
            state=before,
        ), np.stack(expected)


def _copy(state: memory.State) -> memory.State:
    return {name: array.copy() for name, array in state.items()}


FLAT = Spaces((5,), "float32", "discrete", 3)
TORQUES = Spaces((5,), "float32", "continuous", 2, (-1.0, -1.0), (1.0, 1.0))
SCREEN = Spaces((36, 40), "uint8", "discrete", 4, stack=4)
GRID = Spaces((4, 10, 10), "bool", "discrete", 3)
CASES: dict[str, tuple[Spaces, dict[str, Any]]] = {
    "mlp": (FLAT, {}),
    "separate": (FLAT, {"shared_torso": False}),
    "gaussian": (TORQUES, {}),
    "stack": (Spaces((5,), "float32", "discrete", 3, stack=3), {}),
    "lstm": (FLAT, {"core": "lstm"}),
    "gru": (FLAT, {"core": "gru", "activation": "tanh"}),
    "last": (FLAT, {"last_inputs": True}),
    "lstm_last": (FLAT, {"core": "lstm", "last_inputs": True}),
    "gru_last_gaussian": (TORQUES, {"core": "gru", "last_inputs": True}),
    "lstm_without_layers": (FLAT, {"core": "lstm", "hidden": ()}),
    "minatar": (GRID, {}),
    "minatar_separate_last": (GRID, {"shared_torso": False, "last_inputs": True}),
    "minatar_stack": (Spaces((2, 6, 5), "float32", "discrete", 3, stack=3), {"core": "gru"}),
    "channels_last": (Spaces((10, 9, 4), "bool", "discrete", 3), {}),
    "channels_last_stack": (Spaces((10, 9, 2), "uint8", "discrete", 3, stack=2), {}),
    "mlp_on_images": (GRID, {"net": "mlp"}),
    "nature": (SCREEN, {}),
    "nature_lstm_last": (SCREEN, {"core": "lstm", "last_inputs": True}),
    "impala_shallow": (SCREEN, {"net": "impala_shallow"}),
    "impala_deep": (Spaces((3, 9, 12), "uint8", "discrete", 3), {"net": "impala_deep", "core": "lstm"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_learning_network_says_what_the_acting_one_said(case: str) -> None:
    spaces, changes = CASES[case]
    learner = learner_of(spaces, **changes)
    policy = make_policy(Recording, learner.config, spaces, seed=3)
    policy.load(learner.weights())
    walk = Walk(policy, spaces)
    for ends in (0.15, 0.3, 0.0, 0.15):  # each unroll begins in what the one before left
        batch, expected = walk.unroll(ends)
        with torch.no_grad():
            ours = learner.net.unroll(batch.to("cpu"))
        np.testing.assert_allclose(ours.policy, batch.record["policy"], atol=2e-5)
        np.testing.assert_allclose(ours.value, batch.record["value"], atol=2e-5)
        here = ~batch.terminated
        np.testing.assert_allclose(ours.successor[here], expected[here], atol=2e-5)
        assert ours.successor.isfinite().all()
    assert ours.value.std() > 1e-3  # the rows differ, or nothing was compared


@pytest.mark.parametrize("case", CASES)
def test_a_policy_takes_halves_as_it_takes_the_numbers_that_they_are(case: str) -> None:
    spaces, changes = CASES[case]
    learner = learner_of(spaces, **changes)
    halves = {name: array.astype(np.float16) for name, array in learner.weights().items()}
    said = []
    for weights in (halves, {name: array.astype(np.float32) for name, array in halves.items()}):
        for array in weights.values():
            array.flags.writeable = False  # as of a message
        policy = make_policy(Recording, learner.config, spaces, seed=3)
        policy.load(weights)
        said.append(Walk(policy, spaces).unroll()[0].record["policy"])
    np.testing.assert_array_equal(*said)
    assert said[0].any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter(case: str) -> None:
    spaces, changes = CASES[case]
    learner = learner_of(spaces, **changes)
    policy = make_policy(Recording, learner.config, spaces, seed=3)
    policy.load(learner.weights())
    walk = Walk(policy, spaces)
    walk.unroll()
    gradients, _ = learner.gradients(walk.unroll()[0])
    assert gradients.keys() == learner.weights().keys()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, name


@pytest.mark.parametrize("case", ["mlp", "gaussian", "gru_last_gaussian", "nature_lstm_last", "impala_deep"])
def test_initialisation_is_orthogonal_and_its_generator_s_alone(case: str) -> None:
    spaces, changes = CASES[case]
    settings = ImpalaConfig(**{"hidden": (16, 8), "core_size": 6, **changes})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = Impala(settings, spaces, seed=1).weights()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again, other = (Impala(settings, spaces, seed=seed).weights() for seed in (1, 2))
    for name, array in weights.items():
        np.testing.assert_array_equal(array, again[name])
        if array.ndim == 1:
            assert not array.any(), name
            continue
        assert not np.array_equal(array, other[name])
        matrix = array.reshape(len(array), -1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        gain = 0.01 if name.startswith("policy") else 1.0 if name.startswith(("value", "core")) else math.sqrt(2)
        np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(len(matrix)), atol=1e-5)


@pytest.mark.parametrize(
    ("net", "parameters"),
    # by hand: kernels · channels in · out + out, and the layers after them
    [
        ("nature", (64 * 4 + 1) * 32 + (16 * 32 + 1) * 64 + (9 * 64 + 1) * 64 + (7 * 7 * 64 + 1) * 512),
        ("impala_shallow", (64 * 4 + 1) * 16 + (16 * 16 + 1) * 32 + (9 * 9 * 32 + 1) * 256),
        (
            "impala_deep",
            (9 * 4 + 1) * 16
            + (9 * 16 + 1) * (4 * 16 + 32)
            + (9 * 32 + 1) * (4 * 32 + 32 + 4 * 32)
            + (11 * 11 * 32 + 1) * 256,
        ),
    ],
)
def test_sizes_on_atari_frames_are_the_papers(net: str, parameters: int) -> None:
    learner = Impala(ImpalaConfig(net=net), Spaces((84, 84), "uint8", "discrete", 6, stack=4), seed=0)  # type: ignore[arg-type]
    assert sum(p.numel() for p in learner.net.torso.parameters()) == parameters


def test_auto_takes_the_network_that_fits() -> None:
    def torso(*shape: int) -> str:
        names = Impala(ImpalaConfig(), Spaces(shape, "uint8", "discrete", 2), seed=0).weights()
        return f"{sum('convolutions' in name and 'weight' in name for name in names)} convolutions"

    assert torso(9) == "0 convolutions"
    assert torso(4, 10, 10) == torso(35, 84) == torso(7, 7, 3) == "1 convolutions"
    assert torso(36, 36) == torso(96, 96, 3) == "3 convolutions"


@pytest.mark.parametrize(
    ("shape", "net", "message"),
    [
        ((), "auto", r"no network for observations of shape \(\): expected \(features,\), \(height, width\) or"),
        ((2, 3, 4, 5), "mlp", r"no network for observations of shape \(2, 3, 4, 5\)"),
        ((5,), "nature", r"algo.net: 'nature', expected mlp \(or auto\) for flat observations, \(5,\)"),
        ((35, 84), "nature", r"algo.net: 'nature', whose convolutions do not fit on images of \(35, 84\)"),
        ((10, 10), "impala_shallow", r"algo.net: 'impala_shallow', whose convolutions do not fit"),
        ((4, 2, 10), "minatar", r"algo.net: 'minatar', whose convolutions do not fit"),
    ],
)
def test_observations_that_a_network_does_not_cover_are_refused(shape: tuple[int, ...], net: Any, message: str) -> None:
    spaces = Spaces(shape, "float32", "discrete", 2)
    with pytest.raises(UsageError, match=message):
        Impala(ImpalaConfig(net=net), spaces, seed=0)
    with pytest.raises(UsageError, match=message):
        make_policy(Impala, ImpalaConfig(net=net), spaces, seed=0)


def test_a_core_goes_with_shared_layers_only() -> None:
    with pytest.raises(UsageError, match=r"algo.shared_torso: False, expected true with a core \(lstm\)"):
        ImpalaConfig(core="lstm", shared_torso=False)


def test_bytes_of_images_are_scaled_and_other_bytes_are_not() -> None:
    for spaces, factor in ((SCREEN, 255), (Spaces((5,), "uint8", "discrete", 3), 1)):
        learner = learner_of(spaces)
        batch, _ = Walk(TorchPolicy(Recording, learner.config, spaces, seed=0), spaces).unroll()
        batch = batch.to("cpu")
        with torch.no_grad():
            ours = learner.net.unroll(batch).policy
            for name in ("obs", "final_obs"):
                setattr(batch, name, getattr(batch, name) / factor)
            batch.state = {name: array / factor for name, array in batch.state.items()}
            torch.testing.assert_close(ours, learner.net.unroll(batch).policy, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_near_and_leaves_weights_and_outputs_float32() -> None:
    spaces, _ = CASES["nature"]
    exact, near = learner_of(spaces), learner_of(spaces, precision="bfloat16")
    policy = make_policy(Recording, near.config, spaces, seed=3)
    policy.load(near.weights())
    batch, _ = Walk(policy, spaces).unroll()
    outputs = [learner.net.unroll(batch.to("cpu")) for learner in (exact, near)]
    assert outputs[1].policy.dtype == outputs[1].value.dtype == torch.float32
    assert 1e-5 < (outputs[0].policy - outputs[1].policy).abs().max() < 0.1
    np.testing.assert_allclose(outputs[1].policy.detach(), batch.record["policy"], atol=0.05)
    near.step(batch)
    assert {array.dtype.name for array in near.weights().values()} == {"float32"}


def test_numpy_acts_where_it_can() -> None:
    assert isinstance(make_policy(Impala, ImpalaConfig(shared_torso=False), FLAT, seed=0), NumpyPolicy)
    assert isinstance(make_policy(Recording, ImpalaConfig(), FLAT, seed=0), NumpyPolicy)
    assert isinstance(make_policy(Recording, ImpalaConfig(shared_torso=False), FLAT, seed=0), TorchPolicy)


def test_a_torch_policy_acts_uniformly_until_weights_come_and_refuses_those_of_another_network() -> None:
    spaces, _ = CASES["minatar"]
    learner = learner_of(spaces)
    policy = make_policy(Impala, learner.config, spaces, seed=0)
    obs = np.ones((3, *spaces.obs_shape), bool)
    assert not policy.act(obs, {}, EXPLORE).record["policy"].any()
    weights = learner.weights()
    for array in weights.values():
        array.setflags(write=False)
    policy.load(weights)
    obs.setflags(write=False)
    said = policy.act(obs, {}, EXPLORE).record["policy"].copy()
    assert said.any()
    name = "torso.fc.weight"
    with pytest.raises(UsageError, match=f"weights: {name} has shape None, expected"):
        policy.load({k: v for k, v in weights.items() if k != name})
    changed = {k: np.zeros_like(v) for k, v in weights.items()}
    with pytest.raises(UsageError, match=rf"weights: {name} has shape \(2, 2\), expected"):
        policy.load(changed | {name: np.zeros((2, 2), np.float32)})
    np.testing.assert_array_equal(policy.act(obs, {}, EXPLORE).record["policy"], said)  # nothing of it was taken


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="device 'cuda' asked for"):
        make_policy(Impala, ImpalaConfig(), GRID, seed=0, device="cuda")
    assert isinstance(make_policy(Impala, ImpalaConfig(), GRID, seed=0, device="auto"), TorchPolicy)
