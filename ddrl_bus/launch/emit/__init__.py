"""What an existing engine runs: a file per engine, each one function from a plan to the texts of files.

All of them start the same two things: on the head `ddrl-node -t FILE --host HEAD`, and on every other host `ddrl-node
--join tcp://HEAD:PORT --host HOST`, so that only the head is given the topology. Where an engine has names of its own
for machines, these take the place of the addresses in `hosts:`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ddrl_bus.launch.emit.common import Files, Options
from ddrl_bus.launch.emit.compose import compose
from ddrl_bus.launch.emit.kubernetes import kubernetes
from ddrl_bus.launch.emit.slurm import slurm
from ddrl_bus.launch.emit.systemd import systemd
from ddrl_bus.launch.emit.tmux import tmux
from ddrl_bus.topology import Plan

ENGINES: Final[Mapping[str, Callable[[Plan, Options], Files]]] = {
    "slurm": slurm,
    "k8s": kubernetes,
    "compose": compose,
    "systemd": systemd,
    "tmux": tmux,
}

__all__ = ["ENGINES", "Files", "Options"]
