"""The commands `ddrl bench …`. No logic, and no import that `ddrl bench --help` would have to wait for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddrl_bus.console import Group, debug, required, split, words_argument
from ddrl_bus.errors import UsageError

if TYPE_CHECKING:
    from ddrl_bus.bench.output import Output


class _Addressed(Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An address stands for a command, and is its argument."""
        return super().resolve_command(ctx, ["far", *args] if args[0].startswith("tcp://") else args)


@click.group(cls=_Addressed, invoke_without_command=True)
@click.option(
    "--serve", metavar="[ADDRESS]", is_flag=False, flag_value="tcp://*:7070", help="Be the other host of bench tcp://…."
)
@debug
@click.pass_context
def bench(context: click.Context, serve: str | None) -> None:
    """Measure what links, nodes and whole runs cost.

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
        "--transport",
        "transports",
        multiple=True,
        metavar="NAME",
        help="Only memory, ipc, ipc+shared, tcp or tcp+CURVE.",
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


@_benchmark()
def copies(output: Output) -> int:
    """How often each byte of a message is copied on its way, by our links and by bare pyzmq.

    Counted by a small library that is compiled for it; it needs a C compiler.
    """
    from ddrl_bus.bench.copies import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(), output)


@_benchmark(_repeats(5))
def sharing(output: Output, repeats: int) -> int:
    """From which size it pays to share weights on a host instead of sending them."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.sharing import ABOUT, measure

    return measured(ABOUT, measure(repeats=repeats), output)


@_benchmark(_repeats(3))
def replay(output: Output, repeats: int) -> int:
    """What a replay node costs over its buffer and the sockets under it."""
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.replay import ABOUT, measure

    return measured(ABOUT, measure(repeats), output)


@_benchmark(_repeats(5))
def codec(output: Output, repeats: int) -> int:
    """What LZ4 and differences of weights save and cost, and where they pay."""
    from ddrl_bus.bench.codec import ABOUT, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(repeats), output)


@_benchmark(
    words_argument,
    click.option(
        "--seconds",
        type=click.FloatRange(min=1),
        default=20.0,
        show_default=True,
        help="Of each run from its first update on, and of each loop without a bus.",
    ),
    _repeats(1),
)
def topology(output: Output, words: Sequence[str], seconds: float, repeats: int) -> int:
    """Where the time and the bytes of a run of TOPO go, and what it is bound by.

    Node by node and link by link, in turn with the same training without a bus.
    """
    from ddrl_bus.bench.output import measured
    from ddrl_bus.bench.topology import ABOUT, measure

    name, overrides = split(words)
    return measured(ABOUT, measure(required(name), overrides, seconds, repeats), output)


@_benchmark(click.option("--quick", is_flag=True, help="Fewer messages and repeats."))
def peers(output: Output, quick: bool) -> int:
    """The same bytes through gRPC, Ray, multiprocessing, torch.distributed and Redis.

    Each in turn with ours. pip install 'ddrl-bus[peers]' brings gRPC, Ray and Redis' client, apt install redis-server
    its server; what is missing is said to be so.
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
    click.option("--keys", "encrypted", is_flag=True, help="Encrypt what leaves a host."),
)
def faults(output: Output, partitions: list[int], seconds: int, encrypted: bool) -> int:
    """How soon training goes on after a network was bad, and what that lost.

    A run for each fault, half a minute each. Namespaces are two hosts: it needs root, iproute2 and nftables.
    """
    from ddrl_bus.bench.faults import ABOUT, faults, measure
    from ddrl_bus.bench.output import measured

    return measured(ABOUT, measure(faults(partitions, seconds), encrypted), output)


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
