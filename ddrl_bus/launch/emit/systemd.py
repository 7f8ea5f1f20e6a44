"""Units for systemd: a service per host, and the topology, which the head alone needs."""

from __future__ import annotations

import shlex

from ddrl_bus.errors import EnvError, FencedError, SecurityError, UsageError
from ddrl_bus.launch.emit.common import Files, Options, grace_s, start, with_keys
from ddrl_bus.launch.hosts import head_of, hosts_of
from ddrl_bus.topology import Plan


def systemd(plan: Plan, options: Options) -> Files:
    topology, state = f"/etc/ddrl/{plan.name}.yaml", f"/var/lib/ddrl/{plan.name}"
    not_retried = sorted(error.exit_code for error in (UsageError, EnvError, FencedError, SecurityError))
    units = {}
    for host in hosts_of(plan):
        needs = f", with {topology}" if host == head_of(plan) else ""
        account, keys = "DynamicUser=yes", ""
        if host in with_keys(plan):  # a user that comes and goes owns no files
            account = "User=ddrl\nEnvironment=DDRL_KEYS=/etc/ddrl/keys"
            keys = "# before: useradd --system ddrl; install -d -o ddrl -m 700 /etc/ddrl/keys\n"
            keys += "# sudo -u ddrl DDRL_KEYS=/etc/ddrl/keys ddrl keys …\n"
        units[f"ddrl-{plan.name}-{host}.service"] = f"""\
# For /etc/systemd/system of {host} ({plan.hosts[host]}){needs}.
{keys}[Unit]
Description=ddrl_bus run {plan.name}, host {host}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={options.command} {shlex.join(start(plan, host, topology, "--run-dir", state))}
{account}
StateDirectory=ddrl/{plan.name}
WorkingDirectory={state}
RuntimeDirectory=ddrl-{plan.name}
Environment=TMPDIR=/run/ddrl-{plan.name}
Restart=on-failure
RestartSec=5
RestartPreventExitStatus={" ".join(map(str, not_retried))}
KillMode=mixed
TimeoutStopSec={grace_s(plan)}

[Install]
WantedBy=multi-user.target
"""
    return {**units, f"{plan.name}.yaml": plan.lock()}
