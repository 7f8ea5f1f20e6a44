from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ddrl_bus.algos import Spaces
from ddrl_bus.envs import EnvConfig, Step, VectorEnv, describe
from ddrl_bus.envs.backends import Native
from ddrl_bus.errors import EnvError


class Counter(gym.Env[np.ndarray, int]):
    """Observes (episode, step within it). Terminates when `die` steps are over; action 2 raises, 3 shows a NaN."""

    observation_space = gym.spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = gym.spaces.Discrete(5)

    def __init__(self, die: int = 10**6) -> None:
        self._die, self._episode, self._step = die, -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action == 2:
            raise ZeroDivisionError("the axle broke")
        self._step += 1
        obs = self._observe()
        if action == 3:
            obs[1] = np.nan
        return obs, np.inf if action == 4 else 10.0 * self._step, self._step >= self._die, False, {"seen": 1}

    def _observe(self) -> np.ndarray:
        return np.array([self._episode, self._step], np.float32)


class Bare(gym.Env[Any, Any]):
    """An environment that exists for its spaces."""

    def __init__(self, observation_space: Any, action_space: Any, obs: Any) -> None:
        self.observation_space, self.action_space, self._obs = observation_space, action_space, obs

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._obs, float(np.asarray(action).sum()), False, False, {}


def _vectors(mode: AutoresetMode) -> Any:
    def make(num_envs: int, max_episode_steps: int, **kwargs: Any) -> SyncVectorEnv:
        def one() -> gym.Env[Any, Any]:
            return gym.wrappers.TimeLimit(Counter(**kwargs), max_episode_steps)

        return SyncVectorEnv([one] * num_envs, autoreset_mode=mode)

    return make


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    before = dict(gym.registry)
    gym.register("Counter-v0", entry_point=Counter, max_episode_steps=3)
    for mode in AutoresetMode:
        name = f"Counter{mode.name.title().replace('_', '')}-v0"
        gym.register(name, entry_point=Counter, vector_entry_point=_vectors(mode), max_episode_steps=3)
    gym.register("Bare-v0", entry_point=Bare)
    yield
    gym.registry.clear()
    gym.registry.update(before)


def make(id: str, n: int = 2, seed: int = 0, **config: Any) -> VectorEnv:
    return VectorEnv(EnvConfig(id, **config), n, np.random.SeedSequence([seed, 1, 0, 0]))


MODES = [
    pytest.param("Counter-v0", "auto", id="sync"),
    pytest.param("CounterNextStep-v0", "auto", id="next_step"),
    pytest.param("CounterSameStep-v0", "native", id="same_step"),
    pytest.param("CounterDisabled-v0", "native", id="disabled"),
]


@pytest.mark.parametrize(("id", "vectorization"), MODES)
@pytest.mark.parametrize(("die", "limit"), [(3, 7), (7, 3), (3, 3)])
def test_every_autoreset_mode_has_one_normal_form(id: str, vectorization: Any, die: int, limit: int) -> None:
    env = make(id, kwargs={"die": die}, max_episode_steps=limit, vectorization=vectorization)
    assert env.reset().tolist() == [[0, 0], [0, 0]]
    for t in range(1, 10):  # every row is a transition: three episodes of three steps, no dummy rows
        step = env.step(np.zeros(2, np.int64))
        episode, within = divmod(t, 3)
        assert step.obs.tolist() == [[episode, within]] * 2
        assert step.reward.tolist() == [10.0 * (within or 3)] * 2
        assert step.terminated.tolist() == [within == 0 and die == 3] * 2
        assert step.truncated.tolist() == [within == 0 and limit == 3] * 2
        if within:
            assert len(step.final_index) == len(step.final_obs) == len(step.episodes) == 0
        else:
            assert step.final_index.tolist() == [0, 1]
            assert step.final_obs.tolist() == [[episode - 1, 3]] * 2
            assert list(step.episodes) == [(60.0, 3)] * 2
        check_types(step, env.spaces, 2)
    env.close()


def check_types(step: Step, spaces: Spaces, n: int) -> None:
    assert step.obs.shape == (n, *spaces.obs_shape)
    assert step.final_obs.shape == (len(step.final_index), *spaces.obs_shape)
    assert str(step.obs.dtype) == str(step.final_obs.dtype) == spaces.obs_dtype
    assert step.reward.dtype == np.float32
    assert step.terminated.dtype == step.truncated.dtype == np.bool_
    assert step.final_index.dtype == np.int64


@pytest.mark.parametrize(("id", "vectorization"), MODES)
def test_a_reset_starts_new_episodes_and_counts_anew(id: str, vectorization: Any) -> None:
    env = make(id, max_episode_steps=3, vectorization=vectorization)
    env.reset()
    env.step(np.zeros(2, np.int64))
    assert env.reset().tolist() == [[1, 0], [1, 0]]
    steps = [env.step(np.zeros(2, np.int64)) for _ in range(3)]
    assert list(steps[-1].episodes) == [(60.0, 3)] * 2


def test_native_is_refused_where_rows_cannot_be_reset_alone() -> None:
    with pytest.raises(EnvError, match=r"CounterNextStep-v0: vectorization 'native' is not possible: its vector class"):
        make("CounterNextStep-v0", vectorization="native")
    with pytest.raises(EnvError, match=r"Acrobot-v1: vectorization 'native' is not possible: .*vector entry point"):
        make("Acrobot-v1", vectorization="native")


# ---- CartPole, the native class with a row reset of ours


def is_native(env: VectorEnv) -> bool:
    return isinstance(env._vector, Native)


def test_native_cartpole_has_the_dynamics_of_the_single_environment() -> None:
    native, sync = (make("CartPole-v1", 8, vectorization=how) for how in ("native", "sync"))
    assert (is_native(native), is_native(sync), is_native(make("CartPole-v1"))) == (True, False, True)
    native.reset()
    sync.reset()
    vector = native._vector._env.unwrapped  # type: ignore[attr-defined]
    singles = [env.unwrapped for env in sync._vector._envs]  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(300):
        for i, single in enumerate(singles):
            single.state = vector.state[:, i].copy()
        action = rng.integers(0, 2, 8)
        ours, theirs = native.step(action), sync.step(action)
        going = ~(ours.terminated | ours.truncated)
        np.testing.assert_allclose(ours.obs[going], theirs.obs[going], atol=1e-6)
        for name in ("reward", "terminated", "truncated", "final_index"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_allclose(ours.final_obs, theirs.final_obs, atol=1e-6)
        assert list(ours.episodes) == list(theirs.episodes)
        ended += len(ours.episodes)
    assert ended > 50


def test_native_cartpole_resets_rows_to_the_reset_distribution() -> None:
    env = make("CartPole-v1", 16)
    env.reset()
    first = []
    rng = np.random.default_rng(0)
    while len(first) < 4000:
        step = env.step(rng.integers(0, 2, 16))
        first += step.obs[step.final_index].tolist()
        assert all(length == total for total, length in step.episodes)
    states = np.array(first)
    assert np.abs(states).max() <= 0.05
    np.testing.assert_allclose(states.mean(axis=0), 0.0, atol=0.003)
    np.testing.assert_allclose(states.std(axis=0), 0.1 / np.sqrt(12), atol=0.002)


def test_native_cartpole_truncates_at_its_limit() -> None:
    env = make("CartPole-v1", 3, max_episode_steps=5)
    env.reset()
    for t in range(1, 21):
        step = env.step(np.full(3, t % 2))
        assert not step.terminated.any()
        assert step.truncated.all() == step.truncated.any() == (t % 5 == 0)
        assert list(step.episodes) == ([(5.0, 5)] * 3 if t % 5 == 0 else [])


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_runs_follow_from_their_seeds(vectorization: Any) -> None:
    def run(seed: int) -> list[Any]:
        env = make("CartPole-v1", 4, seed, vectorization=vectorization)
        rng = np.random.default_rng(0)
        rows = [env.reset().tolist()]
        rows += [env.step(rng.integers(0, 2, 4)).obs.tolist() for _ in range(60)]
        rows += [env.reset().tolist()]
        assert len({tuple(row) for row in rows[0]}) == 4, "each environment has a seed of its own"
        return rows

    first = run(1)
    assert run(1) == first
    assert run(2)[0] != first[0]
    assert first[-1] != first[0], "a later reset goes on with the generator"


# ---- errors


@pytest.mark.parametrize("id", ["Counter-v0", "CounterSameStep-v0", "CounterDisabled-v0"])
def test_an_environment_that_raises_is_named(id: str) -> None:
    env = make(id, 3)
    env.reset()
    env.step(np.zeros(3, np.int64))
    where = "environment 1, step 2" if id == "Counter-v0" else "step 2"
    with pytest.raises(EnvError, match=f"^{id}: {where}: ZeroDivisionError: the axle broke$"):
        env.step(np.array([0, 2, 0]))


@pytest.mark.parametrize("id", ["Counter-v0", "CounterSameStep-v0"])
def test_numbers_that_are_not_finite_are_named(id: str) -> None:
    env = make(id, 3)
    env.reset()
    with pytest.raises(EnvError, match=rf"^{id}: environment 2, step 1: observation \[ ?0. nan\] is not finite$"):
        env.step(np.array([0, 0, 3]))
    env = make(id, 3)
    env.reset()
    with pytest.raises(EnvError, match=f"^{id}: environment 1, step 1: reward inf is not finite$"):
        env.step(np.array([0, 4, 0]))


def test_a_final_observation_that_is_not_finite_is_named() -> None:
    env = make("Counter-v0", 3, kwargs={"die": 1})
    env.reset()
    with pytest.raises(EnvError, match=r"Counter-v0: environment 2, step 1: observation .* is not finite"):
        env.step(np.array([0, 0, 3]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EnvConfig("CartPoel-v1"), "CartPoel-v1: no such environment; did you mean 'CartPole-v1'?"),
        (EnvConfig("no_such_module:Thing-v0"), "no_such_module:Thing-v0: no such environment; .*no_such_module"),
        (EnvConfig("CartPole-v1", kwargs={"colour": "red"}), "CartPole-v1: cannot be made: .*colour"),
        (EnvConfig("ddrl_bus/TMase-v0"), "ddrl_bus/TMase-v0: no such environment; did you mean 'ddrl_bus/TMaze-v0'?"),
        (EnvConfig("Counter-v0", kwargs={"dye": 1}), "Counter-v0: cannot be made: .*dye"),
    ],
)
def test_environments_that_cannot_be_made(config: EnvConfig, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        describe(config)


@pytest.mark.parametrize(
    ("id", "module", "extra"),
    [
        ("LunarLander-v3", "Box2D", "box2d"),
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("MinAtar/Breakout-v1", "minatar", "minatar"),
        ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
        ("HalfCheetah-v5", "mujoco", "mujoco"),
    ],
)
def test_missing_packages_are_named(id: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)  # importing it fails now, whether installed or not
    for name in [name for name in sys.modules if name.startswith((f"gymnasium.envs.{extra}", f"{module}."))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in gym.registry if id.startswith(("ALE/", "Min")) and name[:4] == id[:4]]:
        monkeypatch.delitem(gym.registry, name)
    with pytest.raises(EnvError, match=rf"{id}: .*pip install 'ddrl-bus\[{extra}\]'"):
        describe(EnvConfig(id))


def test_no_environments_are_refused() -> None:
    with pytest.raises(EnvError, match="CartPole-v1: 0 environments asked for, expected at least 1"):
        make("CartPole-v1", 0)


# ---- spaces


def test_describe_gives_plain_numbers() -> None:
    assert describe(EnvConfig("CartPole-v1")) == Spaces((4,), "float32", "discrete", 2)
    assert describe(EnvConfig("Pendulum-v1")) == Spaces((3,), "float32", "continuous", 1, (-2.0,), (2.0,))


def bare(observation_space: Any, action_space: Any, obs: Any) -> dict[str, Any]:
    return {"observation_space": observation_space, "action_space": action_space, "obs": obs}


BOX = gym.spaces.Box(-1, 1, (2,), np.float32)


def test_float64_observations_become_float32_and_discrete_actions_count_from_0() -> None:
    space = gym.spaces.Box(-1, 1, (2,), np.float64)
    env = make("Bare-v0", kwargs=bare(space, gym.spaces.Discrete(3, start=5), np.array([0.5, 0.25])))
    assert env.spaces == Spaces((2,), "float32", "discrete", 3)
    assert env.reset().dtype == np.float32
    step = env.step(np.array([0, 2]))
    assert step.obs.dtype == np.float32
    assert step.reward.tolist() == [5.0, 7.0]


def test_integer_observations_keep_their_dtype() -> None:
    obs = np.full((2, 2), 7, np.uint8)
    env = make("Bare-v0", kwargs=bare(gym.spaces.Box(0, 255, (2, 2), np.uint8), gym.spaces.Discrete(3), obs))
    assert env.spaces == Spaces((2, 2), "uint8", "discrete", 3)
    assert env.reset().dtype == env.step(np.zeros(2, np.int64)).obs.dtype == np.uint8


@pytest.mark.parametrize(
    ("space", "obs", "flat"),
    [
        (gym.spaces.Discrete(4, start=2), 3, [0, 1, 0, 0]),
        (gym.spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
        (gym.spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (gym.spaces.Tuple((gym.spaces.Discrete(2), BOX)), (1, np.array([0.5, -1], np.float32)), [0, 1, 0.5, -1]),
        (
            gym.spaces.Dict({"b": gym.spaces.Discrete(2), "a": gym.spaces.Box(0, 255, (1, 2), np.uint8)}),
            {"b": 0, "a": np.array([[7, 8]], np.uint8)},
            [7, 8, 1, 0],
        ),
    ],
    ids=["Discrete", "MultiDiscrete", "MultiBinary", "Tuple", "Dict"],
)
def test_observations_that_are_no_box_are_flattened_by_one_rule(space: Any, obs: Any, flat: list[float]) -> None:
    env = make("Bare-v0", kwargs=bare(space, gym.spaces.Discrete(3), obs))
    assert env.spaces == Spaces((len(flat),), "float32", "discrete", 3)
    first, step = env.reset(), env.step(np.zeros(2, np.int64))
    assert first.tolist() == step.obs.tolist() == [flat] * 2
    check_types(step, env.spaces, 2)


def test_actions_outside_the_bounds_are_clipped_for_the_environment_alone() -> None:
    low, high = np.array([-1, -np.inf], np.float32), np.array([2, 0.5], np.float32)
    env = make("Bare-v0", kwargs=bare(BOX, gym.spaces.Box(low, high), np.zeros(2)))
    env.reset()
    action = np.array([[-3, -9], [7, 7]], np.float32)
    step = env.step(action)  # Bare's reward is the sum of the action
    assert step.reward.tolist() == [-10, 2.5]
    assert action.tolist() == [[-3, -9], [7, 7]]


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (gym.spaces.Sequence(BOX), gym.spaces.Discrete(2), r"observation space Sequence.* does not flatten to a"),
        (BOX, gym.spaces.MultiDiscrete([2, 2]), "action space MultiDiscrete.* is not supported"),
        (BOX, gym.spaces.Box(-1, 1, (2, 2), np.float32), "action space Box.* is not supported"),
    ],
)
def test_spaces_that_are_not_supported(space: Any, action: Any, message: str) -> None:
    with pytest.raises(EnvError, match=f"Bare-v0: .*{message}"):
        describe(EnvConfig("Bare-v0", kwargs=bare(space, action, 0)))
