"""Which host this machine is, what to type on the others, and who is missing."""

from __future__ import annotations

from typing import Any

import pytest

from ddrl_bus.errors import UsageError
from ddrl_bus.launch import run_dir
from ddrl_bus.launch.emit import ENGINES, Options
from ddrl_bus.launch.hosts import Missing, command_of, is_here, this_host
from ddrl_bus.launch.ssh import OPTIONS, Far
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan


def plan(gpu0: str = "198.51.100.1", cpu1: str = "198.51.100.2:7200", *more: str) -> Plan:
    hosts = f"hosts={{gpu0: {gpu0!r}, cpu1: {cpu1!r}, idle: 198.51.100.9}}"
    return plan_of("quickstart", [hosts, "nodes.actor.host=cpu1", "insecure=true", *more], probe=False)


def test_the_host_is_known_by_its_address() -> None:
    assert this_host(plan(cpu1="127.0.0.1")) == "cpu1"
    assert this_host(plan(gpu0="localhost")) == "gpu0"
    assert this_host(plan(gpu0="127.0.0.1:7100", cpu1="127.0.0.1:7200")) == "gpu0"  # the head, if it is both
    with pytest.raises(
        UsageError, match=r"addresses: gpu0 \(198\.51\.100\.1\), cpu1 \(198\.51\.100\.2:7200\); a host is started there"
    ):
        this_host(plan())
    with pytest.raises(UsageError, match=r"addresses: gpu0 \(gpu0\.invalid: no such name here\), cpu1"):
        this_host(plan("gpu0.invalid"))


def test_a_name_that_does_not_resolve_is_elsewhere() -> None:
    assert not is_here("gpu0.invalid")


def test_lines_to_type() -> None:
    assert command_of(plan(), "cpu1", ["x.yaml"]) == "ddrl-node --join tcp://198.51.100.1:7077 --host cpu1"
    assert command_of(plan(), "gpu0", ["x.yaml", "a=b c"]) == "ddrl-node -t x.yaml 'a=b c' --host gpu0"


def test_the_line_names_the_module_of_an_environment_of_ones_own() -> None:
    """Whoever types it has it imported there; the head alone cannot."""
    own = plan_of("two-hosts", ["hosts={gpu0: 10.0.0.1, cpu1: 10.0.0.2}", "env.id=my.envs:Cart-v0"], probe=False)
    line = "ddrl-node --join tcp://10.0.0.1:7077 --import my.envs --host cpu1"
    assert command_of(own, "cpu1", []) == line
    assert line in ENGINES["tmux"](own, Options())["two-hosts.sh"]
    assert '${nodes[head]}:7077" --import my.envs "${run[@]}"' in ENGINES["slurm"](own, Options())["two-hosts.sbatch"]


def test_the_controller_s_address_is_one_that_the_host_can_reach() -> None:
    ipc = f"ipc://{plan().ipc_dir}/controller-0.progress"
    assert run_dir.status_address(plan(), "cpu1") == plan().join_address == "tcp://198.51.100.1:7077"
    assert run_dir.status_address(plan(), "gpu0") == run_dir.status_address(plan()) == ipc
    alone = plan_of("quickstart", probe=False)
    assert alone.join_address is None
    assert run_dir.status_address(alone, "local") == f"ipc://{alone.ipc_dir}/controller-0.progress"


def test_ssh_asks_nothing_and_starts_what_joins() -> None:
    asked = Far("/opt/x/bin/ddrl-node").remotes(plan(cpu1="cpu1.lan:7200"), "gpu0")["ssh cpu1"]
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    line = "exec /opt/x/bin/ddrl-node --leash --join tcp://198.51.100.1:7077 --host cpu1"
    assert asked == ["ssh", *options, "--", "cpu1.lan", line]
    assert "BatchMode=yes" in asked


def test_where_links_are_encrypted_the_head_is_named() -> None:
    hosts = "hosts={gpu0: 198.51.100.1, cpu1: 198.51.100.2}"
    guarded = plan_of("quickstart", [hosts, "nodes.actor.host=cpu1"], probe=False, starts=False)
    line = "ddrl-node --join tcp://gpu0@198.51.100.1:7077 --host cpu1"
    assert command_of(guarded, "cpu1", ["x.yaml"]) == line
    assert Far("ddrl-node").remotes(guarded, "gpu0")["ssh cpu1"][-1] == f"exec {line.replace(' ', ' --leash ', 1)}"
    assert run_dir.status_address(guarded, "cpu1") == "tcp://gpu0@198.51.100.1:7077"
    assert run_dir.status_address(guarded, "gpu0").startswith("ipc:")


# ── missing ──────────────────────────────────────────────────────────────────────────────────────────────────────

LINES = {"cpu1": "ddrl-node …"}


def status(phase: str = "run", **nodes: dict[str, Any]) -> dict[str, Any]:
    unheard = {"actor-0": {"state": "unheard"}, "actor-1": {"state": "unheard"}}
    return {"phase": phase, "nodes": unheard | {name.replace("_", "-"): node for name, node in nodes.items()}}


def said(missing: Missing, status: dict[str, Any] | None, seconds: int, since: int = 0) -> dict[int, list[str]]:
    """Second → what was said then, asked each second."""
    told = {second: list(missing.notes(status, second)) for second in range(since, since + seconds)}
    return {second: notes for second, notes in told.items() if notes}


def test_a_missing_host_is_named_at_growing_intervals() -> None:
    told = said(Missing(plan(), "gpu0", LINES, 0), status(), 60)
    assert list(told) == [5, 10, 20, 40]
    assert told[5] == ["cpu1 (198.51.100.2:7200) has been missing for 5 s; type there:  ddrl-node …"]


def test_one_that_came_is_named_once_and_watched_on() -> None:
    missing = Missing(plan(), "gpu0", LINES, 0)
    assert list(said(missing, status(), 11)) == [5, 10]
    here = status(actor_1={"state": "running", "silent_s": 0.4})
    assert said(missing, here, 10, since=11) == {11: ["cpu1 is here"]}
    silent = status(actor_1={"state": "running", "silent_s": 5.4}, actor_0={"state": "failed", "silent_s": 0.0})
    assert list(said(missing, silent, 20, since=21)) == [25, 30, 40]


def test_nobody_is_missed_when_the_run_ends_or_nobody_can_tell() -> None:
    missing = Missing(plan(), "gpu0", LINES, 0)
    assert said(missing, None, 60) == {}
    assert said(missing, status(phase="drain"), 60) == {}


def test_other_hosts_miss_the_head_only() -> None:
    missing = Missing(plan("198.51.100.1", "198.51.100.2", "nodes.evaluator.host=idle"), "cpu1", {}, 0)
    told = said(missing, None, 12)
    assert told == {second: [f"gpu0 (198.51.100.1) has been missing for {second} s"] for second in (5, 10)}
    assert said(missing, status(), 9, since=12) == {12: ["gpu0 is here"]}


def test_one_host_misses_nobody() -> None:
    assert said(Missing(plan_of("quickstart", probe=False), "local", {}, 0), None, 60) == {}
