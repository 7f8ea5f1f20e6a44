"""What a network sees, against plain loops over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ddrl_bus.algos import Batch, Spaces, inputs, memory
from ddrl_bus.algos.config import AgentConfig

T, B = 9, 5


def make_batch(spaces: Spaces, ends: float, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def observed(*leading: int) -> Any:
        return rng.integers(1, 256, (*leading, *spaces.obs_shape)).astype(spaces.obs_dtype)

    end = rng.random((T, B))
    terminated, truncated = end < ends / 2, (end >= ends / 2) & (end < ends)
    index = np.flatnonzero(truncated)
    discrete = spaces.action_kind == "discrete"
    state = memory.initial(AgentConfig(last_inputs=True), spaces, B)
    if memory.FRAMES in state:
        state[memory.FRAMES] = observed(B, spaces.stack - 1)
        state[memory.FRAMES][0, :1] = 0  # its episode is one frame shorter
    state[memory.LAST_ACTION] = rng.integers(0, 3, B) if discrete else rng.normal(size=(B, 2)).astype("f")
    state[memory.LAST_REWARD] = rng.normal(size=B).clip(-1, 1).astype("f")
    return Batch(
        obs=observed(T + 1, B),
        action=rng.integers(0, 2, (T, B)) if discrete else rng.normal(size=(T, B, 2)).astype("f"),
        reward=2 * rng.normal(size=(T, B)).astype("f"),
        terminated=terminated,
        truncated=truncated,
        record={},
        version=np.zeros((T, B), np.int64),
        final_obs=observed(len(index)),
        final_index=index,
        state=state,
    )


def slow_stack(batch: Batch, stack: int) -> list[Any]:
    """Deques of observations, an environment after the other; final observations at the end."""
    rows, finals = {}, {}
    for b in range(B):
        seen = list(batch.state[memory.FRAMES][b])
        for t in range(T + 1):
            rows[t * B + b] = np.stack([*seen, batch.obs[t, b]])
            seen = [*seen[1:], batch.obs[t, b]]
            if t < T and batch.truncated[t, b]:
                finals[t * B + b] = np.stack([*seen, batch.final_obs[list(batch.final_index).index(t * B + b)]])
            if t < T and (batch.terminated[t, b] or batch.truncated[t, b]):
                seen = [np.zeros_like(seen[0])] * (stack - 1)
    return [rows[i] for i in sorted(rows)] + [finals[i] for i in batch.final_index]


@pytest.mark.parametrize("ends", [0.0, 0.4, 1.0])
def test_successors_are_the_next_rows_or_the_final_observations(ends: float) -> None:
    batch = make_batch(Spaces((3,), "float32", "discrete", 2), ends)
    rows = torch.cat([torch.tensor(batch.obs).flatten(0, 1), torch.tensor(batch.final_obs)])
    found = rows[inputs.successors(batch.to("cpu"))]
    for t in range(T):
        for b in range(B):
            at = list(batch.final_index).index(t * B + b) if batch.truncated[t, b] else None
            expected = batch.obs[t + 1, b] if at is None else batch.final_obs[at]
            assert np.array_equal(found[t, b], expected)


@pytest.mark.parametrize("ends", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("stack", [2, 4, 12])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5), "uint8"), ((2, 3, 5), "bool"), ((6, 4, 2), "float32"), ((4,), "float32")]
)
def test_stacked_observations(shape: tuple[int, ...], dtype: str, stack: int, ends: float) -> None:
    spaces = Spaces(shape, dtype, "discrete", 2, stack=stack)
    batch = make_batch(spaces, ends)
    seen = inputs.of_batch(spaces, batch.to("cpu")).obs
    expected = np.stack(slow_stack(batch, stack))
    if shape[-1] == 2:  # channels come last
        expected = np.moveaxis(expected, -1, 2)
    assert seen.shape[1:] == inputs.shape(spaces)
    assert str(seen.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(seen, expected.reshape(seen.shape))


@pytest.mark.parametrize("ends", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_last_actions_and_rewards(kind: Any, ends: float) -> None:
    spaces = Spaces((4,), "float32", kind, 2, (-1.0, -1.0), (1.0, 1.0))
    batch = make_batch(spaces, ends)

    def encoded(action: Any, reward: float) -> list[float]:
        if kind == "discrete":
            action = [float(action == 1), float(action == 2)]
        return [*action, np.float32(np.clip(reward, -1, 1))]

    after = np.array(batch.action) + (kind == "discrete")
    expected = [encoded(batch.state[memory.LAST_ACTION][b], batch.state[memory.LAST_REWARD][b]) for b in range(B)]
    for t in range(T):
        for b in range(B):
            ended = batch.terminated[t, b] or batch.truncated[t, b]
            expected.append([0.0] * 3 if ended else encoded(after[t, b], batch.reward[t, b]))
    for index in batch.final_index:
        expected.append(encoded(after[index // B, index % B], batch.reward[index // B, index % B]))
    last = inputs.of_batch(spaces, batch.to("cpu")).last
    assert last is not None
    np.testing.assert_array_equal(last, np.array(expected, np.float32))


def test_a_step_passes_on_the_frames_that_the_next_one_stacks() -> None:
    spaces = Spaces((2, 2), "uint8", "discrete", 2, stack=3)
    state = {"frames": torch.tensor([[1, 2], [0, 5]], dtype=torch.uint8)[..., None, None].expand(2, 2, 2, 2)}
    seen, carried = inputs.of_step(spaces, torch.full((2, 2, 2), 9, dtype=torch.uint8), state)
    assert seen.obs[:, :, 0, 0].tolist() == [[1, 2, 9], [0, 5, 9]]
    assert carried["frames"][:, :, 0, 0].tolist() == [[2, 9], [5, 9]]
    assert seen.last is None
