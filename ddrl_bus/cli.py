"""The commands `ddrl` and `ddrl-node`. No logic, and no import that `ddrl --help` would have to wait for.

stdout is data, stderr is talk. Exit codes are in errors.py; 0 is done or drained, 130 a prompt that was left.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ddrl_bus import __version__
from ddrl_bus.console import Command, Elsewhere, Group, debug, required, split, words_argument
from ddrl_bus.errors import UsageError

if TYPE_CHECKING:
    from ddrl_bus.launch.start import Ended


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON value on stdout.")
run_dir_option = click.option("--run-dir", type=click.Path(path_type=Path), help="Default: a new one under runs/.")
run_argument = click.argument("run", required=False)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ddrl")
@debug
def ddrl() -> None:
    """Distributed deep reinforcement learning, wired by a YAML file.

    TOPO is a topology file or the name of a packaged one (quickstart where it is left out); KEY=VALUE changes it, as in
    algo.lr=3e-4. RUN is a run directory or the name of a topology; the latest run where it is left out.

    Exit codes: 0 done or drained, 64 usage or topology, 65 refused file or environment, 69 peer unreachable,
    70 internal, 75 fenced, 77 security.
    """


@ddrl.command()
@words_argument
@click.option("--seed", type=click.IntRange(min=0), help="Short for seed=N.")
@click.option("--resume", metavar="RUN", help="Go on with an earlier run, from its newest checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, start nothing.")
@click.option("--in-process", is_flag=True, help="All nodes in this process, for breakpoints.")
@click.option("--ssh", is_flag=True, help="Start the other hosts' shares too, by ssh.")
@click.option("--ssh-config", type=click.Path(path_type=Path, exists=True), help="Users, ports, keys: see ssh_config.")
@click.option("--node-command", metavar="COMMAND", help="What a shell there calls ddrl-node.")
@as_json
@run_dir_option
@debug
def run(
    words: Sequence[str],
    seed: int | None,
    resume: str | None,
    dry_run: bool,
    in_process: bool,
    ssh: bool,
    ssh_config: Path | None,
    node_command: str | None,
    as_json: bool,
    run_dir: Path | None,
) -> None:
    """Train: start every node of a topology, of several hosts those of this machine, until it stops."""
    started = _started()
    from ddrl_bus.launch import start
    from ddrl_bus.launch.ssh import Far

    if not ssh and (ssh_config or node_command):
        raise UsageError("--ssh-config and --node-command say how --ssh is to be done; give --ssh too")
    far = Far(node_command or "ddrl-node", ssh_config) if ssh else None
    topology, overrides = split(words)
    if resume is not None:
        if topology or seed is not None or run_dir or dry_run:
            raise UsageError("--resume goes on with a run as it is: no TOPO, --seed, --run-dir or --dry-run beside it")
        _end(start.resumed_run(resume, overrides, in_process=in_process, started=started, far=far), as_json)
    overrides += [] if seed is None else [f"seed={seed}"]
    topology = topology or "quickstart"
    plan = start.plan_of(topology, overrides, in_process=in_process, fresh=not dry_run)
    if dry_run:
        from ddrl_bus.topology import show

        click.echo(show.text(plan), nl=False)
        return
    _end(start.new_run(plan, [topology, *overrides], path=run_dir, started=started, far=far), as_json)


@ddrl.command()
@words_argument
@debug
def check(words: Sequence[str]) -> None:
    """Find everything that is wrong with a topology, environment included."""
    from ddrl_bus.launch.start import plan_of

    topology, overrides = split(words)
    plan = plan_of(required(topology), overrides)
    click.echo(f"{plan.name}: {len(plan.nodes)} nodes, {len(plan.links)} links: nothing wrong", err=True)


@ddrl.command()
@words_argument
@click.option("--mermaid", is_flag=True, help="As a Mermaid flowchart.")
@debug
def show(words: Sequence[str], mermaid: bool) -> None:
    """Print what a topology comes to: nodes, links, addresses."""
    from ddrl_bus.launch.start import plan_of
    from ddrl_bus.topology import show

    topology, overrides = split(words)
    plan = plan_of(required(topology), overrides, probe=False, starts=False)
    click.echo(show.mermaid(plan) if mermaid else show.text(plan), nl=False)


@ddrl.command()
@words_argument
@click.option(
    "--set", "sets", multiple=True, metavar="GROUP.FIELD=VALUE", help="As in actor.count=8, or beyond limits."
)
@click.option(
    "--hosts", type=click.IntRange(min=1), help="Machines like this one; the actors are on all but the first."
)
@click.option("--cores", type=click.IntRange(min=1), help="Of each.  [default: as many as here]")
@click.option("--latency", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Between hosts, ms.")
@click.option(
    "--bandwidth", type=click.FloatRange(min=1e-3), default=10.0, show_default=True, help="Of a host, Gbit/s."
)
@click.option("--others", type=click.FloatRange(min=0), default=0.0, help="Busy threads of other programs on a host.")
@click.option("--sweep", metavar="KEY=FROM..TO", help="One prediction for each of many values.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Of a sweep: FILE.svg or FILE.png too.")
@click.option("--calibrate", is_flag=True, help="Measure costs anew.")
@click.option("--check", metavar="RUN", help="Compare with this run, which is over; no TOPO beside it.")
@as_json
@debug
def plan(
    words: Sequence[str],
    sets: Sequence[str],
    hosts: int | None,
    cores: int | None,
    latency: float,
    bandwidth: float,
    others: float,
    sweep: str | None,
    output: Path | None,
    calibrate: bool,
    check: str | None,
    as_json: bool,
) -> None:
    """Predict what a topology will do: rates, idle time, staleness, traffic, memory, and what binds.

    What its parts cost is measured on this machine at first, with two short runs, which takes half a minute, and kept.
    """
    from ddrl_bus.launch import run_dir
    from ddrl_bus.planning import report
    from ddrl_bus.planning.places import Setting

    topology, overrides = split(words)
    if check is not None and (topology or sweep):
        raise UsageError("--check compares one run with its own topology: no TOPO and no --sweep beside it")
    if output is not None and sweep is None:
        raise UsageError("-o is the picture of a sweep; give --sweep too, as in --sweep actor.count=1..100")
    setting = Setting(hosts, cores, latency * 1e-3, bandwidth * 1e9 / 8, others=others)
    folder = run_dir.find(check) if check is not None else None
    source = str(folder / run_dir.LOCK_FILE) if folder else required(topology)
    asked = report.Asked(source, overrides, sets, setting, calibrate)
    _echo(report.Answer(asked, sweep, output, folder), as_json)


@ddrl.command()
@click.argument("engine", type=click.Choice(["slurm", "k8s", "compose", "systemd", "tmux"]))
@words_argument
@click.option("--node-command", metavar="COMMAND", default="ddrl-node", help="How ddrl-node is called there.")
@click.option("--image", default="ddrl-bus", help="Of containers.", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Write files into this folder.")
@debug
def emit(engine: str, words: Sequence[str], node_command: str, image: str, output: Path | None) -> None:
    """Print what an engine that you have runs: a host of the topology on each of its nodes."""
    from ddrl_bus.launch.emit import ENGINES, Options
    from ddrl_bus.launch.start import plan_of

    topology, overrides = split(words)
    plan = plan_of(required(topology), overrides, probe=False)
    files = ENGINES[engine](plan, Options(node_command, image))
    if output is None:
        for name, text in files.items():
            click.echo(f"# ── {name}\n{text}" if len(files) > 1 else text, nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
        click.echo(output / name)


@ddrl.command()
@debug
def schema() -> None:
    """Print the JSON Schema of topology files, for editors."""
    from ddrl_bus.launch.catalog import catalog
    from ddrl_bus.topology.schema import json_schema

    click.echo(json.dumps(json_schema(catalog()), indent=2))


@ddrl.command()
@click.argument("run", required=False, metavar="[RUN|tcp://HEAD:PORT]")
@as_json
@debug
def status(run: str | None, as_json: bool) -> None:
    """Print how a run goes; from anywhere, by the address at which hosts join it."""
    import asyncio

    from ddrl_bus.launch import join, remote, run_dir

    far = join.address_of(run) if run is not None and run.startswith("tcp://") else None
    answer = asyncio.run(remote.status_of(far or run_dir.find(run)))
    if as_json:
        click.echo(json.dumps(answer))
        return
    from rich.console import Console

    from ddrl_bus.launch.display import table

    Console().print(table(answer))


@ddrl.command()
@run_argument
@debug
def stop(run: str | None) -> None:
    """Have a run drained; it ends a moment later."""
    import asyncio

    from ddrl_bus.launch import remote, run_dir

    folder = run_dir.find(run)
    asyncio.run(remote.stop(folder))
    click.echo(f"{folder} is stopping", err=True)


@ddrl.command()
@run_argument
@debug
def logs(run: str | None) -> None:
    """Print the logs of all nodes of a run in order of time."""
    from ddrl_bus.launch import logs, run_dir

    for line in logs.merged(run_dir.find(run)):
        click.echo(line)


@ddrl.command("eval")
@run_argument
@click.option("--episodes", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@debug
def evaluate(run: str | None, episodes: int, seed: int) -> None:
    """Play the newest checkpoint of a run and print the returns as JSON."""
    from ddrl_bus.launch.start import evaluated

    click.echo(json.dumps(evaluated(run, episodes, seed)))


@ddrl.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="plot.png", help="FILE.png or FILE.svg.")
@click.option("--x", type=click.Choice(["env_steps", "wall_s"]), default="env_steps", show_default=True)
@debug
def plot(runs: Sequence[str], output: Path, x: Any) -> None:
    """Draw how runs learnt, where their time went, and how old the weights were.

    Here a topology's name, like any folder, stands for all runs below it. Runs of one name are drawn as seeds of one
    thing. Prints the file's name.
    """
    from ddrl_bus.bench import history, plot

    plot.writable(output)
    histories = [history.read(folder) for folder in history.runs_of(runs)]
    for note in [note for one in histories for note in one.notes]:
        click.echo(note, err=True)
    plot.plot(histories, output, x)
    click.echo(output)


@ddrl.group()
def keys() -> None:
    """Keys of hosts, for links that leave the machine.

    Each host has one of its own, by the name that it has in the topology, and allows those of the others. They are in
    ~/.config/ddrl/keys, or where DDRL_KEYS says.
    """


@keys.command("new")
@click.argument("name", required=False)
@click.option("--allow", "hosts", nargs=2, multiple=True, metavar="HOST PUBKEY", help="Let HOST in, as `allow` does.")
@debug
def new_key(name: str | None, hosts: Sequence[tuple[str, str]]) -> None:
    """Make this machine's key as host NAME (default: its own name); prints the public half, and what to type elsewhere.

    With --allow, a key that is there already is kept.
    """
    import platform

    from ddrl_bus import keys

    name = name or platform.node().partition(".")[0]
    entries = [keys.Entry(host, key) for host, key in hosts]
    public = keys.owned().get(name) if entries else None
    public = public or keys.new(name)
    for entry in entries:
        keys.allow(entry)
    if entries:
        click.echo(f"on {', '.join(host for host, _ in hosts)} type:  {keys.introduction(name)}", err=True)
    else:
        click.echo(f"on every other HOST type:  {keys.invitation(name)}", err=True)
    click.echo(public)


@keys.command()
@click.argument("name")
@click.argument("key", metavar="PUBKEY")
@click.option("--role", "roles", multiple=True, metavar="KIND", help="Only nodes of these kinds; default: any.")
@debug
def allow(name: str, key: str, roles: Sequence[str]) -> None:
    """Let the holder of a key in as host NAME. Nodes that run hear of it within a second."""
    from ddrl_bus import keys
    from ddrl_bus.topology.schema import KINDS, one_of

    if unknown := [role for role in roles if role not in KINDS]:
        raise UsageError(f"--role {unknown[0]!r}: {one_of(unknown[0], KINDS)}")
    keys.allow(keys.Entry(name, key, frozenset(roles)))


@keys.command()
@click.argument("name")
@debug
def revoke(name: str) -> None:
    """Shut host NAME out, from nodes that run within two seconds. Do it on every host."""
    from ddrl_bus import keys

    keys.revoke(name)


@keys.command("list")
@debug
def list_keys() -> None:
    """Print whom this machine lets in, as its allow-list has it."""
    from ddrl_bus import keys

    for name in keys.owned():
        click.echo(
            f"this machine is {name}; on a host that does not know it type:  {keys.introduction(name)}", err=True
        )
    for entry in keys.allowed():
        click.echo(str(entry))


ddrl.add_command(Elsewhere("bench", "ddrl_bus.bench.commands", "Measure what links, nodes and whole runs cost."))


def _echo(answer: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer.data()))
        return
    for line in answer.lines():
        click.echo(line)


@click.command("ddrl-node", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-t", "--topology", metavar="TOPO", help="The same file and KEY=VALUEs on every host.")
@click.option(
    "--join",
    metavar="tcp://[HEAD@]ADDRESS:PORT",
    help="Instead of a file: the head of the run sends the topology. With --add on the head's machine also RUN.",
)
@click.option("--import", "modules", multiple=True, metavar="MODULE", help="The head may have this one imported.")
@click.option("--name", help="Run this node or index of a bundle, in this process.")
@click.option("--host", help="Run all nodes of this host; with --add: this machine's name.")
@click.option("--add", metavar="GROUP", help="With --join: actors beside those of the topology, until you stop them.")
@click.option("--count", type=click.IntRange(min=1), help="With --add: how many; default: 1.")
@click.option("--leash", is_flag=True, help="Drain when stdin ends: how ssh takes it along.")
@as_json
@run_dir_option
@click.version_option(__version__, prog_name="ddrl-node")
@debug
def ddrl_node(
    overrides: Sequence[str],
    topology: str | None,
    join: str | None,
    modules: Sequence[str],
    name: str | None,
    host: str | None,
    add: str | None,
    count: int | None,
    leash: bool,
    as_json: bool,
    run_dir: Path | None,
) -> None:
    """Run one node of a topology (of a bundle: one process, as in worker-0), or one host's share. In any order.

    A node that somebody restarts (systemd, Kubernetes) needs --run-dir: its lives are counted there.
    """
    started = _started()
    from ddrl_bus.launch import ssh, start

    if (topology is None) == (join is None):
        raise UsageError("give either -t TOPO or --join tcp://HEAD:PORT")
    if add is not None:
        if name is not None:
            raise UsageError("--add GROUP and --name: the run itself names what is added")
        if overrides:
            raise UsageError(f"{overrides[0]}: the run's topology holds for added nodes too")
        if join is None:
            raise UsageError("--add GROUP goes with --join, to a run that goes on")
        if leash:
            ssh.leash()
        _end(start.added(join, add, count or 1, host, modules, path=run_dir, started=started), as_json)
    if count is not None:
        raise UsageError("--count says how many to --add; give --add GROUP too")
    if (name is None) == (host is None):
        raise UsageError("give either --name NODE or --host HOST")
    if join is not None and overrides:
        raise UsageError(f"{overrides[0]}: the head's topology holds for all; change it there")
    if join is None and modules:
        raise UsageError("--import says what --join may bring along; with -t TOPO leave it out")
    if leash:
        ssh.leash()
    if join is not None and name is not None:
        sys.exit(start.joined_process(join, name, modules=modules, path=run_dir, started=started))
    if join is not None and host is not None:
        _end(start.joined_share(join, host, modules=modules, path=run_dir, started=started), as_json)
    assert topology is not None
    plan = start.plan_of(topology, overrides)
    if name is not None:
        sys.exit(start.one_process(plan, name, path=run_dir, started=started))
    assert host is not None
    _end(start.host_share(plan, host, [topology, *overrides], path=run_dir, started=started), as_json)


def _started() -> float:
    """About when this process began, in seconds since 1970: a user waits for our imports too."""
    return time.time() - time.process_time()


def _end(ended: Ended, as_json: bool) -> NoReturn:
    """Print how a run ended, and leave with its exit code."""
    if ended.closing is not None and as_json:
        click.echo(json.dumps(ended.closing))
    elif ended.closing is not None:
        from ddrl_bus.launch.closing import as_text

        click.echo(as_text(ended.closing), err=True)
    sys.exit(ended.exit_code)


if __name__ == "__main__":
    ddrl()
