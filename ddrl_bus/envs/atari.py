"""Atari as the DQN and A3C papers play it, by two paths that are one decision process.

One object per environment: ale-py's AtariEnv, `_Start`, gymnasium's AtariPreprocessing and TimeLimit. Many in C++:
ale-py's AtariVectorEnv, which needs no thread of Python's. Each frame is given once: the receiver stacks them.

Their frames, rewards and ends are equal, bit by bit where both resize with the same OpenCV, but for one frame: at the
time limit (27,000 steps) the vector class breaks off before it looks at the last screen, so that the final observation
of a truncated episode is the maximum of the one before it and of the screen between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import gymnasium as gym
import numpy as np

from ddrl_bus.envs.backends import Array, Stepped

SCREEN: Final = 84


@dataclass(frozen=True)
class Options:
    """`env.kwargs` of the preset."""

    frameskip: int = 4
    """frames that an action lasts; the observation is the maximum of the last two"""
    noop_max: int = 30
    """an episode starts after fewer than so many frames without action, drawn anew each time"""
    fire_reset: bool = True
    """press FIRE first where the game knows it: some wait for it"""
    episodic_life: bool = False
    """losing a life terminates the episode, and the next one is a new game"""
    repeat_action_probability: float = 0.0
    """sticky actions; gymnasium's ALE/…-v5 ids have 0.25"""
    full_action_space: bool = False
    """all 18 actions instead of those that the game knows"""
    num_threads: int = 1
    """threads that step the environments of one group (vector path)"""


class _Start(gym.Wrapper[Any, Any, Any, Any]):
    """Starts episodes as the vector class does: FIRE for a frame, then no-ops."""

    def __init__(self, env: gym.Env[Any, Any], noop_max: int, fire: bool) -> None:
        super().__init__(env)
        meanings: list[str] = self.get_wrapper_attr("get_action_meanings")()
        self._noop_max = max(noop_max, 1)
        self._fire = meanings.index("FIRE") if fire and "FIRE" in meanings else None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        first = self.env.reset(**kwargs)
        frames = int(self.np_random.integers(0, self._noop_max))
        if self._fire is not None:
            self.env.step(self._fire)
            frames -= 1
        for _ in range(frames):
            if self.env.step(0)[2]:
                self.env.reset()
        return first


def one(spec: gym.envs.registration.EnvSpec, max_episode_steps: int, **kwargs: Any) -> gym.Env[Any, Any]:
    """One environment with observations [84, 84] uint8. Raises: TypeError for `kwargs` that `Options` has not."""
    options = Options(**kwargs)
    env: gym.Env[Any, Any] = gym.make(
        spec,
        disable_env_checker=True,
        obs_type="grayscale",
        frameskip=1,
        repeat_action_probability=options.repeat_action_probability,
        full_action_space=options.full_action_space,
        max_num_frames_per_episode=None,  # TimeLimit counts from the first observation, as the vector class does
    )
    env = _Start(env, options.noop_max, options.fire_reset)
    env = gym.wrappers.AtariPreprocessing(
        env, noop_max=0, frame_skip=options.frameskip, screen_size=SCREEN, terminal_on_life_loss=options.episodic_life
    )
    return gym.wrappers.TimeLimit(env, max_episode_steps)


class Vector:
    """Many environments in C++, each the same as `one`."""

    def __init__(self, spec: gym.envs.registration.EnvSpec, n: int, max_episode_steps: int, **kwargs: Any) -> None:
        from ale_py.vector_env import AtariVectorEnv

        options = Options(**kwargs)
        self._env = AtariVectorEnv(
            spec.kwargs["game"],
            n,
            num_threads=options.num_threads,
            max_num_frames_per_episode=max_episode_steps * options.frameskip,
            repeat_action_probability=options.repeat_action_probability,
            full_action_space=options.full_action_space,
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            img_height=SCREEN,
            img_width=SCREEN,
            stack_num=1,
            frameskip=options.frameskip,
            noop_max=options.noop_max,
            episodic_life=options.episodic_life,
            reward_clipping=False,
            use_fire_reset=options.fire_reset,
        )
        self.observation_space: gym.Space[Any] = gym.spaces.Box(0, 255, (SCREEN, SCREEN), np.uint8)
        self.action_space: gym.Space[Any] = self._env.single_action_space

    def reset(self, seeds: list[int] | None) -> Array:
        positive = None if seeds is None else np.array(seeds) & 0x7FFF_FFFF  # -1 would mean no seed
        obs: Array = self._env.reset(seed=positive)[0]
        return obs[:, 0]

    def step(self, action: Array) -> Stepped:
        obs, reward, terminated, truncated, infos = self._env.step(action)
        index = np.flatnonzero(terminated | truncated)
        # Only the rows of episodes that ended are written in `final_obs`.
        final = infos["final_obs"][index, 0] if len(index) else obs[:0, 0]
        return obs[:, 0], reward, terminated, truncated, index, final

    def close(self) -> None:
        self._env.close()
