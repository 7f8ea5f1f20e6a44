"""A compose file: a service per host, which the others find by its name."""

from __future__ import annotations

import json
from textwrap import indent

from ddrl_bus.launch.emit.common import (
    KEYS,
    Files,
    Options,
    container_command,
    grace_s,
    label,
    labels,
    placed,
    with_keys,
)
from ddrl_bus.launch.hosts import head_of
from ddrl_bus.topology import Plan

_HEAD = """\
    configs:
      - {source: topology, target: /etc/ddrl/topology.yaml}
    healthcheck:
      test: [CMD, ddrl, status, /run-dir]
      interval: 30s
      timeout: 20s
      start_period: 60s
"""


def compose(plan: Plan, options: Options) -> Files:
    names = labels(plan)
    plan = placed(plan, names)
    services = "".join(_service(plan, host, name, options) for host, name in names.items())
    volumes = "".join(f"  {name}: {{}}\n" for name in names.values())
    keys = "".join(
        f"# before: keys/{host} beside it, of the user that containers run as, by DDRL_KEYS=keys/{host} ddrl keys …\n"
        for host in with_keys(plan)
    )
    text = f"""\
# {plan.name}: docker compose -f THIS_FILE up (compose 2.23.1 or newer: the topology is in `configs`)
{keys}name: {label(plan.name)}
services:
{services}volumes:
{volumes}configs:
  topology:
    content: |
{indent(plan.lock().replace("$", "$$"), "      ")}"""
    return {f"{plan.name}.compose.yaml": text}


def _service(plan: Plan, host: str, name: str, options: Options) -> str:
    volumes, environment = [f"{name}:/run-dir"], ""
    if host in with_keys(plan):  # the folder, not its files: a list that is replaced is seen inside
        volumes.append(f"./keys/{host}:{KEYS}:ro")
        environment = f"    environment: {{DDRL_KEYS: {KEYS}}}\n"
    return f"""\
  {name}:
    image: {json.dumps(options.image)}
    command: {container_command(plan, host, options, "/etc/ddrl/topology.yaml")}
    init: true
    restart: on-failure
    stop_grace_period: {grace_s(plan)}s
    volumes: {json.dumps(volumes)}
{environment}\
{_HEAD if host == head_of(plan) else ""}"""
