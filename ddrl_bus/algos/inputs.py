"""What a network sees of each step: stacked observations, the last action and the last reward.

An actor carries the past (`memory`); from a batch the same is made anew here, out of the batch's own rows and the state
before row 0. The K final observations of truncated rows follow the rows as if their episodes had gone on.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.memory import FRAMES, LAST_ACTION, LAST_REWARD
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError

State: TypeAlias = "dict[str, torch.Tensor]"


class Inputs(NamedTuple):
    obs: torch.Tensor
    """[N, *shape(spaces)], dtype of the observations"""
    last: torch.Tensor | None
    """[N, num_actions + 1]: the last action, one-hot if discrete, and the last reward; None where they are no input"""

    def at(self, rows: torch.Tensor | slice) -> Inputs:
        """Of some of the N rows."""
        return Inputs(self.obs[rows], None if self.last is None else self.last[rows])


def shape(spaces: Spaces) -> tuple[int, ...]:
    """Of what a network sees at once: (features,) or (channels, height, width), stacked observations in the first.

    Raises: UsageError for observations that are neither flat nor images.
    """
    match spaces.obs_shape:
        case (features,):
            return (spaces.stack * features,)
        case (height, width):
            return (spaces.stack, height, width)
        case (height, width, channels) if channels < min(height, width):
            return (spaces.stack * channels, height, width)
        case (channels, height, width):
            return (spaces.stack * channels, height, width)
    raise UsageError(
        f"no network for observations of shape {spaces.obs_shape}: expected (features,), (height, width) or "
        "(channels, height, width)"
    )


def of_step(spaces: Spaces, obs: torch.Tensor, state: State) -> tuple[Inputs, State]:
    """Of one step of N environments, and the state that they carry on.  Shapes: obs [N, *obs_shape]."""
    seen = obs.unsqueeze(1)
    if FRAMES in state:
        seen = torch.cat([state[FRAMES], seen], dim=1)
        state = {**state, FRAMES: seen[:, 1:]}
    last = _last(spaces, state[LAST_ACTION], state[LAST_REWARD]) if LAST_ACTION in state else None
    return Inputs(_rows(spaces, seen), last), state


def of_batch(spaces: Spaces, batch: Batch) -> Inputs:
    """Of the T+1 rows of B columns and the K final observations, (T+1)·B + K rows."""
    state, index = batch.state, batch.final_index
    seen, final = batch.obs.unsqueeze(2), batch.final_obs.unsqueeze(1)
    if FRAMES in state:
        seen = _stacked(state[FRAMES], batch.obs, begins(batch))
        final = torch.cat([seen.flatten(0, 1)[index, 1:], final], dim=1)
    last = None
    if LAST_ACTION in state:
        action, reward = batch.action, batch.reward.clamp(-1, 1)
        if spaces.action_kind == "discrete":
            action = action + 1
        last = torch.cat(
            [
                _last(spaces, state[LAST_ACTION], state[LAST_REWARD]),
                _last(spaces, action.flatten(0, 1), reward.flatten()) * ~begins(batch)[1:].reshape(-1, 1),
                _last(spaces, action.flatten(0, 1)[index], reward.flatten()[index]),
            ]
        )
    return Inputs(_rows(spaces, torch.cat([seen.flatten(0, 1), final])), last)


def begins(batch: Batch) -> torch.Tensor:
    """[T+1, B] bool: rows that begin an episode inside the batch; row 0 never does, the state before it tells."""
    ended = batch.terminated | batch.truncated
    return torch.cat([torch.zeros_like(ended[:1]), ended])


def successors(batch: Batch) -> torch.Tensor:
    """[T, B] int64, where among the rows of `of_batch` each row's true successor is: the row after it, or the final
    observation where it was truncated."""
    length, columns = batch.reward.shape
    device, rows = batch.final_index.device, (length + 1) * columns
    index = torch.arange(columns, rows, device=device)
    index[batch.final_index] = rows + torch.arange(len(batch.final_index), device=device)
    return index.view(length, columns)


def _stacked(before: torch.Tensor, obs: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """Each row with those before it, oldest first, zeros where an earlier episode was.

    Shapes: before [B, S-1, ...], obs [T+1, B, ...], begins [T+1, B] -> [T+1, B, S, ...].
    """
    stack = before.shape[1] + 1
    windows = torch.cat([before.transpose(0, 1), obs]).unfold(0, stack, 1).movedim(-1, 2)
    row = torch.arange(len(obs), device=obs.device).unsqueeze(1)
    age = row - torch.where(begins, row, -stack).cummax(0).values
    inside = age.unsqueeze(-1) >= torch.arange(stack - 1, -1, -1, device=obs.device)
    return windows * inside.view(*inside.shape, *[1] * (obs.dim() - 2))


def _last(spaces: Spaces, action: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """[N] (0 for none) or [N, D], and [N] -> [N, num_actions + 1]."""
    if spaces.action_kind == "discrete":
        action = action.unsqueeze(-1) == torch.arange(1, spaces.num_actions + 1, device=action.device)
    return torch.cat([action.to(reward.dtype), reward.unsqueeze(-1)], dim=-1)


def _rows(spaces: Spaces, seen: torch.Tensor) -> torch.Tensor:
    """[N, S, *obs_shape] -> [N, *shape(spaces)]."""
    dims = len(spaces.obs_shape)
    if dims == 3 and seen.shape[-1] < min(seen.shape[2:4]):  # (height, width, channels)
        seen = seen.movedim(-1, 2)
    return seen if dims == 2 else seen.flatten(1, 2)
