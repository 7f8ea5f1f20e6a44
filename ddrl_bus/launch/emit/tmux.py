"""A session of tmux: a window per host, the head's here, the others over ssh unless they are this machine too."""

from __future__ import annotations

import shlex

from ddrl_bus.launch.emit.common import Files, Options, label, start, with_keys
from ddrl_bus.launch.hosts import address_of, head_of, hosts_of
from ddrl_bus.topology import Plan
from ddrl_bus.topology.exposure import is_loopback


def tmux(plan: Plan, options: Options) -> Files:
    session, head = label(plan.name), head_of(plan)
    windows = [
        f"tmux new-window -d -t {session}: -n {shlex.quote(host)} {shlex.quote(_line(plan, host, options))}\n"
        for host in hosts_of(plan)
        if host != head
    ]
    keys = "# Each host has its keys in ~/.config/ddrl/keys, or where DDRL_KEYS says there.\n"
    script = f"""\
#!/bin/sh
# {plan.name}: run this on {head} ({plan.hosts[head]}), then `tmux attach -t {session}`.
{keys if with_keys(plan) else ""}\
set -eu
folder=$(mktemp -d)
cat >"$folder/{plan.name}.yaml" <<'TOPOLOGY'
{plan.lock()}TOPOLOGY
tmux new-session -d -s {session} -n {shlex.quote(head)} \\
    "{options.command} -t '$folder/{plan.name}.yaml' --host {head}; rm -r '$folder'; exec sh"
{"".join(windows)}"""
    return {f"{plan.name}.sh": script}


def _line(plan: Plan, host: str, options: Options) -> str:
    line = f"{options.command} {shlex.join(start(plan, host, ''))}"
    address = address_of(plan, host)
    return f"{line}; exec sh" if is_loopback(address) else f"ssh -t {shlex.quote(address)} {shlex.quote(line)}; exec sh"
