"""A batch script for Slurm: one task per host; the topology's hosts are the job's nodes, in their order."""

from __future__ import annotations

import shlex

from ddrl_bus.launch.emit.common import Files, Options, by_key, placed, with_keys
from ddrl_bus.launch.hosts import head_of, hosts_of, import_words
from ddrl_bus.topology import Plan


def slurm(plan: Plan, options: Options) -> Files:
    hosts = hosts_of(plan)
    plan = placed(plan, {host: f"node{rank}" for rank, host in enumerate(hosts)})
    keys = "# Keys of all hosts: in ~/.config/ddrl/keys of each node, or where DDRL_KEYS says when you call sbatch.\n"
    join = " ".join(
        [f'--join "tcp://{by_key(plan)}${{nodes[head]}}:{plan.port}"', *map(shlex.quote, import_words(plan))]
    )
    script = f"""\
#!/bin/bash
# {plan.name} on {len(hosts)} of your nodes: sbatch [--partition=... --gpus-per-node=...] THIS_FILE
# `{options.command}` must be there on each of them; topology, log and runs/ are written where you call sbatch.
{keys if with_keys(plan) else ""}\
#SBATCH --job-name={plan.name}
#SBATCH --nodes={len(hosts)}
#SBATCH --ntasks-per-node=1
#SBATCH --output={plan.name}-%j.log
set -euo pipefail

task=$(cat <<'TASK'
set -euo pipefail
hosts=({" ".join(map(shlex.quote, hosts))})
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${{hosts[SLURM_PROCID]}}
head={hosts.index(head_of(plan))}
run=(--host "$host" --run-dir "runs/{plan.name}/$SLURM_JOB_ID-$host")
if ((SLURM_PROCID != head)); then
    exec {options.command} {join} "${{run[@]}}"
fi
topology={plan.name}-$SLURM_JOB_ID.yaml
cat >"$topology" <<'TOPOLOGY'
{plan.lock()}TOPOLOGY
addresses=()
for rank in "${{!hosts[@]}}"; do
    addresses+=("hosts.${{hosts[rank]}}=${{nodes[rank]}}")
done
exec {options.command} -t "$topology" "${{run[@]}}" "run_id=slurm-$SLURM_JOB_ID" "${{addresses[@]}}"
TASK
)
exec srun --ntasks={len(hosts)} --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --label bash -c "$task"
"""
    return {f"{plan.name}.sbatch": script}
