"""Manifests for Kubernetes: a headless service, the topology, and a workload per host.

A workload is a Job where the run stops by itself, for a StatefulSet would start a finished run again; else it is a
StatefulSet. Either way its pod has the name by which the others find it.
"""

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


def kubernetes(plan: Plan, options: Options) -> Files:
    names, service = labels(plan), label(plan.name)
    plan = placed(plan, {host: f"{name}-0.{service}" for host, name in names.items()})
    stops = any(bound is not None for bound in (plan.stop.reward, plan.stop.steps, plan.stop.time))
    workloads = [
        (_job if stops else _stateful_set)(name, service, _pod(plan, host, name, service, options))
        for host, name in names.items()
    ]
    head = f"# {plan.name}: kubectl apply -f THIS_FILE; kubectl logs -f {'job' if stops else 'statefulset'}/"
    head += f"{names[head_of(plan)]}\n"
    for host in with_keys(plan):
        files = " ".join(f"--from-file=$DDRL_KEYS/{file}" for file in ("allowed", f"{host}.key"))
        head += f"# before: kubectl create secret generic {_secret(names[host])} {files}\n"
    return {f"{plan.name}.k8s.yaml": head + "---\n".join([_service(service), _topology(plan, service), *workloads])}


def _service(service: str) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {service}
spec:
  clusterIP: None
  publishNotReadyAddresses: true  # they find each other before they are ready
  selector: {{ddrl-run: {service}}}
"""


def _topology(plan: Plan, service: str) -> str:
    return f"""\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {service}
data:
  topology.yaml: |
{indent(plan.lock(), "    ")}"""


def _job(name: str, service: str, pod: str) -> str:
    return f"""\
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  backoffLimit: 6
  template:
    metadata:
      labels: {{ddrl-run: {service}, ddrl-host: {name}}}
    spec:
      restartPolicy: OnFailure
      hostname: {name}-0
      subdomain: {service}
{indent(pod, "      ")}"""


def _stateful_set(name: str, service: str, pod: str) -> str:
    return f"""\
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {name}
spec:
  serviceName: {service}
  replicas: 1
  selector:
    matchLabels: {{ddrl-host: {name}}}
  template:
    metadata:
      labels: {{ddrl-run: {service}, ddrl-host: {name}}}
    spec:
{indent(pod, "      ")}"""


def _secret(name: str) -> str:
    return f"{name}-keys"


def _pod(plan: Plan, host: str, name: str, service: str, options: Options) -> str:
    """What both have in common. Every pod is ready when the head answers it; the head alone is started again when it
    does not, for the others go on without it."""
    probe = "{exec: {command: [ddrl, status, /run-dir]}, periodSeconds: 30, timeoutSeconds: 20"
    has_keys = host in with_keys(plan)
    env = f"    env: [{{name: DDRL_KEYS, value: {KEYS}}}]\n"
    mount = f"      - {{name: keys, mountPath: {KEYS}, readOnly: true}}\n"
    secret = f"  - {{name: keys, secret: {{secretName: {_secret(name)}, defaultMode: 256}}}}  # 0400\n"
    liveness = f"    livenessProbe: {probe}, initialDelaySeconds: 120, failureThreshold: 5}}\n"
    return f"""\
terminationGracePeriodSeconds: {grace_s(plan)}
containers:
  - name: ddrl
    image: {json.dumps(options.image)}
    command: {container_command(plan, host, options, "/etc/ddrl/topology.yaml")}
{env if has_keys else ""}\
    readinessProbe: {probe}}}
{liveness if host == head_of(plan) else ""}\
    volumeMounts:
      - {{name: run-dir, mountPath: /run-dir}}
      - {{name: topology, mountPath: /etc/ddrl}}
{mount if has_keys else ""}\
volumes:
  - {{name: run-dir, emptyDir: {{}}}}  # a claim instead keeps checkpoints beyond the pod
  - {{name: topology, configMap: {{name: {service}}}}}
{secret if has_keys else ""}"""
