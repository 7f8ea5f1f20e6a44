"""Recurrent cores: layers with a state that is zero at the start of an episode. Imports torch for real."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import nn

from ddrl_bus.algos.memory import CORES
from ddrl_bus.algos.torsos import initialised

KINDS: Final = {"lstm": nn.LSTM, "gru": nn.GRU}


class Core(nn.Module):
    """One recurrent layer; a state is {name: [N, size]} as `memory.CORES` names them.

    Source: Hochreiter & Schmidhuber 1997 (lstm); Cho et al. 2014, arXiv 1406.1078 (gru); orthogonal weights, gain 1.
    """

    def __init__(self, kind: str, inputs: int, size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.names: tuple[str, ...] = CORES[kind]
        self.rnn = initialised(KINDS[kind](inputs, size, device="meta"), 1.0, generator)

    def step(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step of N environments.  Shapes: x [N, inputs] -> [N, size], and the state after it."""
        y, after = self._run(x.unsqueeze(0), self._carried(state))
        return y[0], dict(zip(self.names, (array[0] for array in after), strict=True))

    def unroll(
        self,
        rows: torch.Tensor,
        begins: torch.Tensor,
        state: dict[str, torch.Tensor],
        final: torch.Tensor,
        final_index: torch.Tensor,
        burn_in: int = 0,
    ) -> torch.Tensor:
        """All rows of B columns, the state zeroed before each row that begins an episode, and the final rows, each in
        the state that its own episode ended in. The first `burn_in` rows only lead to a state: no gradient flows
        through them.

        Shapes: rows [T+1, B, inputs], begins [T+1, B] bool, state {name: [B, size]} before row 0, final [K, inputs]
        at `final_index` [K] (t·B + b of the row that each follows) -> [(T+1)·B + K, size].
        """
        # The layer runs at once over the rows between two that any column begins at. With long episodes that halves
        # the time of a loop over rows, with an episode's begin in every row it takes a third longer.
        cuts = sorted({0, burn_in, *begins.any(1).nonzero().flatten().tolist(), len(rows)})
        carried = self._carried(state)
        outputs, ends = [], []
        for start, stop in pairwise(cuts):
            if start:
                carried = tuple(array * ~begins[start].unsqueeze(-1) for array in carried)
            with torch.set_grad_enabled(torch.is_grad_enabled() and start >= burn_in):
                y, carried = self._run(rows[start:stop], carried)
            outputs.append(y)
            ends.append(carried)
        features = torch.cat(outputs).flatten(0, 1)
        if not len(final):
            return features
        t, column = final_index // rows.shape[1], final_index % rows.shape[1]
        segment = torch.searchsorted(torch.tensor(cuts[1:], device=t.device), t + 1)
        after = tuple(torch.cat(array)[segment, column].unsqueeze(0) for array in zip(*ends, strict=True))
        return torch.cat([features, self._run(final.unsqueeze(0), after)[0][0]])

    def _carried(self, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(state[name].to(self.rnn.weight_hh_l0.dtype).unsqueeze(0) for name in self.names)

    def _run(
        self, rows: torch.Tensor, carried: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """[T, N, inputs] -> [T, N, size]; what is carried is [1, N, size] each."""
        if len(self.names) == 2:
            y, after = self.rnn(rows, carried)
            return y, after
        y, h = self.rnn(rows, carried[0])
        return y, (h,)
