"""A compose file: a service per host, which the others find by its name."""

from __future__ import annotations

import json
from textwrap import indent

from ddrl_bus.launch.emit.common import Files, Options, container_command, grace_s, label, labels, placed
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
    text = f"""\
# {plan.name}: docker compose -f THIS_FILE up (compose 2.23.1 or newer: the topology is in `configs`)
name: {label(plan.name)}
services:
{services}volumes:
{volumes}configs:
  topology:
    content: |
{indent(plan.lock().replace("$", "$$"), "      ")}"""
    return {f"{plan.name}.compose.yaml": text}


def _service(plan: Plan, host: str, name: str, options: Options) -> str:
    return f"""\
  {name}:
    image: {json.dumps(options.image)}
    command: {container_command(plan, host, options, "/etc/ddrl/topology.yaml")}
    init: true
    restart: on-failure
    stop_grace_period: {grace_s(plan)}s
    volumes: ["{name}:/run-dir"]
{_HEAD if host == head_of(plan) else ""}"""
