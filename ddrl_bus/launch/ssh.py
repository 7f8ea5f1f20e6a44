"""Starting the other hosts' shares of a run by the system's ssh.

Nothing is copied there: what ssh starts joins the run, and gets the topology from its head. Users, ports and keys are
an ssh_config's business. ssh holds the far end's stdin: when it ends, because the run does or because this machine is
gone, that share drains, so that no process is left behind.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddrl_bus.errors import UsageError
from ddrl_bus.launch.hosts import address_of, head_of, hosts_of, join_words
from ddrl_bus.topology import Plan

OPTIONS: Final = {
    "BatchMode": "yes",  # a question would wait for ever
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}


@dataclass(frozen=True, slots=True)
class Far:
    """How other hosts are reached."""

    command: str = "ddrl-node"
    """What a shell there calls it."""
    config: Path | None = None
    """An ssh_config to use instead of the user's."""

    def remotes(self, plan: Plan, here: str) -> dict[str, Sequence[str]]:
        """Process name → command, for every host but this one.

        Raises:
            UsageError: there are no others, or this is not the head.
        """
        others = [host for host in hosts_of(plan) if host != here]
        if not others:
            raise UsageError(f"{plan.name} has one host only; --ssh is for starting others")
        if here != head_of(plan):
            raise UsageError(f"this machine is {here}; start with --ssh on the head, {head_of(plan)}")
        return {f"ssh {host}": self._ssh(plan, host) for host in others}

    def _ssh(self, plan: Plan, host: str) -> Sequence[str]:
        options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
        config = ["-F", str(self.config)] if self.config else []
        there = f"exec {self.command} {shlex.join(['--leash', *join_words(plan, host)])}"
        return ["ssh", *config, *options, "--", address_of(plan, host), there]


def leash() -> None:
    """Have this process drain, as by SIGTERM, when its stdin ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="leash", daemon=True).start()
