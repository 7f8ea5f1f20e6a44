"""Open files: a node needs one for each connection that others make to it, and with hundreds of actors the limit of a
shell is soon reached. libzmq would not say so: who comes too late is never heard."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Final

from ddrl_bus.errors import UsageError
from ddrl_bus.topology import Plan

OWN: Final = 128
"""What a process has open beside its connections, generously."""
ENOUGH: Final = 65536


def raise_limit(plan: Plan, names: Iterable[str]) -> None:
    """Let this process open as many files as it may, for these nodes of it and for those that are added to the run.

    Raises:
        UsageError: it may not open enough; says what to type.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    counts = {name: plan.connections(name) for name in names}
    needed = OWN + sum(counts.values())
    if max(soft, most) < needed:
        who = ", ".join(f"{name} has {count:,} connections" for name, count in counts.items())
        raise UsageError(
            f"{who}, but its process may open {max(soft, most):,} files; type  ulimit -n {needed}  in the "
            "shell that starts it, as root if that is refused"
        )
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
