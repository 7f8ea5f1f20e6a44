"""The commands `ddrl` and `ddrl-node`. No logic, and no import that `ddrl --help` would have to wait for.

stdout is data, stderr is talk. Exit codes are in errors.py; 0 is done or drained, 130 a prompt that was left.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ddrl_bus import __version__
from ddrl_bus.errors import DdrlError, UsageError

if TYPE_CHECKING:
    from ddrl_bus.bench.output import Output
    from ddrl_bus.launch.start import Ended


class _Command(click.Command):
    """Ends the process as errors.py says, with a traceback for bugs only, or wherever --debug asks for one."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        code: Any
        try:
            code = super().main(args, **extra | {"standalone_mode": False})
        except click.ClickException as error:
            error.show()
            code = UsageError.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = 130
        except DdrlError as error:
            click.echo(traceback.format_exc() if "--debug" in args else f"error: {error}", err=True)
            code = error.exit_code
        except BrokenPipeError:
            sys.stdout = None  # whoever read it has left
            code = 0
        except Exception:
            click.echo(f"{traceback.format_exc()}this is a bug in ddrl_bus or in the environment", err=True)
            code = DdrlError.exit_code
        sys.exit(code if isinstance(code, int) else 0)


class _Group(_Command, click.Group):
    pass


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of every error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON value on stdout.")
run_dir_option = click.option("--run-dir", type=click.Path(path_type=Path), help="Default: a new one under runs/.")
run_argument = click.argument("run", required=False)
words_argument = click.argument("words", nargs=-1, metavar="[TOPO] [KEY=VALUE]...")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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
    topology, overrides = _split(words)
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

    topology, overrides = _split(words)
    plan = plan_of(_required(topology), overrides)
    click.echo(f"{plan.name}: {len(plan.nodes)} nodes, {len(plan.links)} links: nothing wrong", err=True)


@ddrl.command()
@words_argument
@click.option("--mermaid", is_flag=True, help="As a Mermaid flowchart.")
@debug
def show(words: Sequence[str], mermaid: bool) -> None:
    """Print what a topology comes to: nodes, links, addresses."""
    from ddrl_bus.launch.start import plan_of
    from ddrl_bus.topology import show

    topology, overrides = _split(words)
    plan = plan_of(_required(topology), overrides, probe=False, starts=False)
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

    What its parts cost is measured on this machine at first, which takes up to a minute, and kept.
    """
    from ddrl_bus.launch import run_dir
    from ddrl_bus.planning import report
    from ddrl_bus.planning.model import Setting

    topology, overrides = _split(words)
    if check is not None and (topology or sweep):
        raise UsageError("--check compares one run with its own topology: no TOPO and no --sweep beside it")
    if output is not None and sweep is None:
        raise UsageError("-o is the picture of a sweep; give --sweep too, as in --sweep actor.count=1..100")
    setting = Setting(hosts, cores, latency * 1e-3, bandwidth * 1e9 / 8, others=others)
    folder = run_dir.find(check) if check is not None else None
    source = str(folder / run_dir.LOCK_FILE) if folder else _required(topology)
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

    topology, overrides = _split(words)
    plan = plan_of(_required(topology), overrides, probe=False)
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


class _BenchGroup(_Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An address stands for a command, and is its argument."""
        return super().resolve_command(ctx, ["far", *args] if args[0].startswith("tcp://") else args)


@ddrl.group(cls=_BenchGroup, invoke_without_command=True)
@click.option(
    "--serve", metavar="[ADDRESS]", is_flag=False, flag_value="tcp://*:7070", help="Be the other host of bench tcp://…."
)
@debug
@click.pass_context
def bench(context: click.Context, serve: str | None) -> None:
    """Measure.

    Every benchmark prints its rows, medians over its repeats, as they come; it can write them to files, and compare
    them with an earlier run. Ratios are within one run: quote these.

    Between two hosts: ddrl bench --serve on one, ddrl bench tcp://HOST:7070 on the other.
    """
    if (serve is None) == (context.invoked_subcommand is None):
        raise UsageError("give the name of a benchmark, tcp://HOST:PORT, or --serve alone; see ddrl bench --help")
    if serve is not None:
        from ddrl_bus.bench import far

        far.serve(serve)


def _percent(_context: click.Context, _option: click.Parameter, text: str) -> float:
    try:
        part = float(text.removesuffix("%")) / 100
    except ValueError:
        part = -1.0
    if part < 0:
        raise click.BadParameter(f"{text!r}, expected a percentage, such as 10%")
    return part


_OUTPUT: Sequence[Any] = (
    click.option(
        "--json", metavar="[FILE]", is_flag=False, flag_value="-", help="Write all of it; without FILE: print it."
    ),
    click.option(
        "--csv", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Write a line a figure."
    ),
    click.option(
        "--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Write one page, plots and all."
    ),
    click.option("--compare", metavar="FILE", type=click.Path(path_type=Path), help="What --json FILE wrote before."),
    click.option(
        "--fail-over", default="10%", show_default=True, callback=_percent, help="Exit 1 if a row is worse by more."
    ),
)


def _benchmark(*options: Any) -> Callable[[Callable[..., int]], click.Command]:
    """A command of `bench`: `options` go to the function, and `output`; it returns the exit code."""

    def command(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(
            json: str | None, csv: Path | None, html: Path | None, compare: Path | None, fail_over: float, **given: Any
        ) -> None:
            from ddrl_bus.bench.output import Output

            sys.exit(function(output=Output(json, csv, html, compare, fail_over), **given))

        for option in (debug, *reversed((*options, *_OUTPUT))):
            run = option(run)
        return bench.command()(run)

    return command


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    try:
        numbers = [int(float(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        numbers = []
    if min(numbers, default=0) < 1:
        raise click.BadParameter(f"{text!r}, expected numbers of at least 1 with commas between them, such as 2,4")
    return numbers


def _repeats(default: int) -> Any:
    return click.option("--repeats", type=click.IntRange(min=1), default=default, show_default=True)


@_benchmark(
    click.option("--quick", is_flag=True, help="A few of the rows, in less than a minute."),
    click.option(
        "--payload", "payloads", multiple=True, metavar="WORDS", help="Only payloads whose name has these words."
    ),
    click.option(
        "--transport", "transports", multiple=True, metavar="NAME", help="Only memory, ipc, tcp or tcp+CURVE."
    ),
    click.option(
        "--peers", metavar="N,...", callback=lambda *given: given[-1] and _numbers(*given), help="Default: 1,4,16."
    ),
    click.option("--repeats", type=click.IntRange(min=1), help="Default: 5."),
)
def links(output: Output, **chosen: Any) -> int:
    """What the link ends cost over the sockets under them.

    Every payload over every transport, between one process and 1, 4 and 16 others: as fast as may be, and latency at
    fixed rates; against bare pyzmq in the same run. All of it takes about half an hour.
    """
    from ddrl_bus.bench.links import ABOUT, measure, scope_of
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(scope_of(**chosen)), output)


@_benchmark(
    click.argument("address", metavar="tcp://HOST:PORT"),
    click.option("--quick", is_flag=True, help="A few of the rows."),
    click.option(
        "--peers", metavar="N,...", callback=lambda *given: given[-1] and _numbers(*given), help="Default: 1,4."
    ),
    click.option("--repeats", type=click.IntRange(min=1), help="Default: 5."),
)
def far(output: Output, address: str, quick: bool, peers: list[int] | None, repeats: int | None) -> int:
    """Links between this host and one that runs `ddrl bench --serve`; `ddrl bench tcp://HOST:PORT` is the same."""
    from ddrl_bus.bench.far import ABOUT, measure
    from ddrl_bus.bench.links import scope_of
    from ddrl_bus.bench.output import measured

    scope = scope_of(quick, peers=peers or ([1] if quick else [1, 4]), repeats=repeats)
    return measured(ABOUT, measure(address, scope), output)


@_benchmark(_repeats(5))
def requests(output: Output, repeats: int) -> int:
    """What a round trip of the request link costs over the sockets under it."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.requests import ABOUT, measure

    return measured(ABOUT, measure(repeats), output)


@_benchmark(_repeats(9))
def buffer(output: Output, repeats: int) -> int:
    """What a replay buffer costs over plain copies of the same bytes."""
    from ddrl_bus.bench.buffer import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(repeats), output)


@_benchmark(_repeats(5))
def curve(output: Output, repeats: int) -> int:
    """What encryption costs a link."""
    from ddrl_bus.bench.curve import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(repeats=repeats), output)


@_benchmark(_repeats(3))
def replay(output: Output, repeats: int) -> int:
    """What a replay node costs over its buffer and the sockets under it."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.replay import ABOUT, measure

    return measured(ABOUT, measure(repeats), output)


@_benchmark(_repeats(5))
def codec(output: Output, repeats: int) -> int:
    """What compressing messages saves and costs, and where it pays."""
    from ddrl_bus.bench.codec import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(repeats), output)


@_benchmark(
    words_argument,
    click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Of each run."),
    _repeats(1),
)
def topology(output: Output, words: Sequence[str], seconds: float, repeats: int) -> int:
    """Where the time and the bytes of a run of TOPO go, node by node and link by link."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.topology import ABOUT, measure

    name, overrides = _split(words)
    return measured(ABOUT, measure(_required(name), overrides, seconds, repeats), output)


@_benchmark(click.option("--quick", is_flag=True, help="Fewer messages and repeats."))
def peers(output: Output, quick: bool) -> int:
    """The same bytes through gRPC, Ray, multiprocessing and torch.distributed.

    Each in turn with ours. pip install 'ddrl-bus[peers]' brings gRPC and Ray; what is missing is said to be so.
    """
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.peers import ABOUT, measure

    return measured(ABOUT, measure(repeats=2, part=0.2) if quick else measure(), output)


@_benchmark(
    click.option("--ranks", default="2,4", show_default=True, metavar="N,...", callback=_numbers, help="Processes."),
    click.option(
        "--bytes",
        "sizes",
        default="1e3,6.7e6",
        show_default=True,
        metavar="N,...",
        callback=_numbers,
        help="Of a network's parameters, met as nearly as its layers allow.",
    ),
    _repeats(5),
)
def allreduce(output: Output, ranks: list[int], sizes: list[int], repeats: int) -> int:
    """What summing gradients over replicas costs over bare gloo.

    bare: torch.distributed.all_reduce of a flat tensor. sum: the same by the collective that learners use. pooled: the
    gradients of a network of that size as a learner pools them, packing included.
    """
    from ddrl_bus.bench.allreduce import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(ranks, sizes, repeats), output)


@_benchmark(
    click.option("--updates", type=click.IntRange(min=1), default=20, show_default=True, help="Measured in each run."),
)
def preemption(output: Output, updates: int) -> int:
    """What one slow worker costs the others, with preemption and without.

    Runs ddppo with four workers three times: all alike, the last one five times slower, and the same with preemption.
    Their environments only sleep, so few cores do.
    """
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.preemption import ABOUT, measure

    return measured(ABOUT, measure(updates), output)


@_benchmark()
def precision(output: Output) -> int:
    """What weights in half precision change of what actors say."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.precision import ABOUT, measure

    return measured(ABOUT, measure(), output)


@_benchmark(
    click.option("--partition", "partitions", default="5", show_default=True, metavar="S,...", callback=_numbers),
    click.option("--seconds", type=click.IntRange(min=1), default=10, show_default=True, help="How long others last."),
)
def faults(output: Output, partitions: list[int], seconds: int) -> int:
    """How soon training goes on after a network was bad, and what that lost.

    A run for each fault, half a minute each. Namespaces are two hosts: it needs root, iproute2 and nftables.
    """
    from ddrl_bus.bench.faults import ABOUT, faults, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(faults(partitions, seconds)), output)


@_benchmark(
    click.option("--subscribers", type=click.IntRange(1, 64), default=16, show_default=True),
    click.option(
        "--size", type=click.IntRange(min=4096), default=6_700_000, show_default=True, help="Bytes of a value."
    ),
    click.option(
        "--mbit", type=click.FloatRange(min=0.1), help="Between two hosts over a cable of so much; needs root."
    ),
    click.option("--rounds", type=click.IntRange(min=2), default=50, show_default=True, help="With --mbit at most 10."),
)
def weights(output: Output, subscribers: int, size: int, mbit: float | None, rounds: int) -> int:
    """How soon many processes hold the newest weights, over bare PUB/SUB.

    On one host they read them where they lie. With --mbit one process on another host gets half-precision weights,
    whole and as differences.
    """
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.weights import ABOUT, measure, measure_between_hosts

    rows = measure(subscribers, size, rounds) if mbit is None else measure_between_hosts(mbit, size, min(rounds, 10))
    return measured(ABOUT, rows, output)


@_benchmark(
    click.option(
        "--count", default="10,50,100,200", show_default=True, metavar="N,...", callback=_numbers, help="Actors."
    ),
    click.option("--seconds", type=click.IntRange(min=1), default=10, show_default=True, help="Measured of each."),
)
def actors(output: Output, count: list[int], seconds: int) -> int:
    """What one more actor costs the controller and the learner.

    Real processes that send a recorded unroll twice a second each, in place of environments; they join, send and leave.
    """
    from ddrl_bus.bench.actors import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(count, seconds), output)


def _echo(answer: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer.data()))
        return
    for line in answer.lines():
        click.echo(line)


@click.command("ddrl-node", cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
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


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    topologies = [word for word in words if "=" not in word]
    if len(topologies) > 1:
        raise UsageError(f"one topology at a time: got {' and '.join(topologies)}; changes to it are KEY=VALUE")
    return next(iter(topologies), None), [word for word in words if "=" in word]


def _required(topology: str | None) -> str:
    if topology is None:
        raise UsageError("which topology? Give a file, or the name of a packaged one, such as quickstart")
    return topology


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
