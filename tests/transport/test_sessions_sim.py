"""The session cores under seeded simulation: what the links promise holds in every run, and the simulation can fail.

DDRL_SEED=n runs one seed, DDRL_SEEDS=n so many of them; the default is what finds every broken core below.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from simulator import LatestSimulation, QueueSimulation, RequestSimulation, Violation, World

from ddrl_bus.transport.sessions import latest, queue
from ddrl_bus.transport.sessions.latest import LatestPublisher, LatestSubscriber
from ddrl_bus.transport.sessions.queue import ACCEPT, Credit, Inbound, QueueReceiver, QueueSender, Verdict
from ddrl_bus.transport.sessions.request import Due, RequestClient, RequestServer

SIMULATIONS = (QueueSimulation, LatestSimulation, RequestSimulation)
ONE_SEED = os.environ.get("DDRL_SEED")
MUTANT_SEEDS = 300
SEEDS = [int(ONE_SEED)] if ONE_SEED else range(int(os.environ.get("DDRL_SEEDS", MUTANT_SEEDS)))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "CHUNK", 64)
    monkeypatch.setattr(latest, "WINDOW", 256)
    monkeypatch.setattr(latest, "MAX_WINDOW", 1024)


@pytest.mark.parametrize("simulation", SIMULATIONS)
def test_promises_hold_in_every_seed(simulation: type[World]) -> None:
    for seed in SEEDS:
        try:
            simulation(seed).run()
        except Exception as error:
            test = f"test_promises_hold_in_every_seed[{simulation.__name__}]"
            again = f"DDRL_SEED={seed} python -m pytest 'tests/transport/test_sessions_sim.py::{test}'"
            told = f"{type(error).__name__}: {error}\nrun again: {again}"
            pytest.fail(told, pytrace=not isinstance(error, Violation))


def trace_of(simulation: type[World], seed: int) -> list[tuple[Any, ...]]:
    world = simulation(seed)
    world.run()
    return [tuple(map(str, entry)) for entry in world.trace]


@pytest.mark.parametrize("simulation", SIMULATIONS)
def test_same_seed_same_trace(simulation: type[World]) -> None:
    assert all(trace_of(simulation, seed) == trace_of(simulation, seed) for seed in range(20))
    assert trace_of(simulation, 1) != trace_of(simulation, 2)


def test_same_seed_same_trace_in_another_process() -> None:
    digest = "import simulator, zlib; from ddrl_bus.transport.sessions import latest; t = ''\n"
    digest += "latest.CHUNK, latest.WINDOW, latest.MAX_WINDOW = 64, 256, 1024\n"
    digest += "for s in range(9):\n for k in (simulator.QueueSimulation, simulator.LatestSimulation):\n"
    digest += "  w = k(s); w.run(); t += str([tuple(map(str, e)) for e in w.trace])\nprint(zlib.crc32(t.encode()))"
    here = "".join(str(trace_of(k, seed)) for seed in range(9) for k in (QueueSimulation, LatestSimulation))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", digest], env=env, capture_output=True, text=True, check=True)
    assert int(there.stdout) == crc32(here.encode())


def test_simulation_reaches_what_it_is_for() -> None:
    """Over a hundred seeds every verdict of the receiver, every kind of loss and both modes occur."""
    verdicts: set[str] = set()
    words: set[str] = set()
    modes: set[str] = set()
    for seed in range(100):
        world = QueueSimulation(seed)
        world.run()
        verdicts |= world.verdicts.keys()
        words |= {str(entry[1]) for entry in world.trace}
        modes.add(world.on_loss)
    assert verdicts >= {ACCEPT, "duplicate", "fenced", "other_life", "unknown_sender"}
    assert words >= {"lost", "reopened", "kill", "start", "drop", "calm"}
    assert modes == {"count", "resend"}


# -- deliberately broken cores: each must be found out --------------------------------------------------------------


class TakesDuplicates(QueueReceiver):
    def _judge(self, inbound: Inbound | None, epoch: int, seq: int, lane: int) -> Verdict:
        verdict = super()._judge(inbound, epoch, seq, lane)
        return ACCEPT if verdict == "duplicate" else verdict


class TakesZombies(QueueReceiver):
    def _judge(self, inbound: Inbound | None, epoch: int, seq: int, lane: int) -> Verdict:
        return super()._judge(inbound, inbound.epoch if inbound else epoch, seq, lane)


class TakesOtherLives(QueueReceiver):
    def _judge(self, inbound: Inbound | None, epoch: int, seq: int, lane: int) -> Verdict:
        return super()._judge(inbound, epoch, seq, self.epoch)


class TakesOlderHello(QueueReceiver):
    def hello(self, sender: str, epoch: int) -> Inbound | None:
        known = self.senders.get(sender)
        if known is not None and known.epoch > epoch:
            del self.senders[sender]
        return super().hello(sender, epoch)


class NeverGivesUp(QueueReceiver):
    def poll(self, now: float) -> Iterator[tuple[Inbound, int]]:
        for inbound in self.senders.values():
            inbound.gap_since = None
        yield from super().poll(now)


class GivesUpAtOnce(QueueReceiver):
    def poll(self, now: float) -> Iterator[tuple[Inbound, int]]:
        for inbound in self.senders.values():
            inbound.gap_since = inbound.gap_since and now - queue.GRACE_S
        yield from super().poll(now)


class GivesUpUncounted(QueueReceiver):
    def poll(self, now: float) -> Iterator[tuple[Inbound, int]]:
        for inbound, _ in super().poll(now):
            yield inbound, 0


class KeepsLostInWindow(QueueReceiver):
    def _give_up(self, inbound: Inbound, now: float) -> int:
        missing = super()._give_up(inbound, now)
        inbound.freed -= missing
        return missing


class GivesUpTooFar(QueueReceiver):
    def _give_up(self, inbound: Inbound, now: float) -> int:
        inbound.ahead.clear()
        return super()._give_up(inbound, now) if inbound.announced > inbound.received else 0


class LetsOneTooManyOut(QueueReceiver):
    def credits(self) -> Iterator[Credit]:
        return (credit._replace(window=credit.window + 1) for credit in super().credits())


class NeverRepeatsCredits(QueueReceiver):
    def poll(self, now: float) -> Iterator[tuple[Inbound, int]]:
        self._repeated = now
        return super().poll(now)


class ForgetsGapBehind(QueueReceiver):
    """Takes the highest number that arrived for the highest settled one."""

    def arrived(self, sender: str, epoch: int, seq: int, lane: int, now: float) -> Verdict:
        verdict = super().arrived(sender, epoch, seq, lane, now)
        if verdict == ACCEPT:
            inbound = self.senders[sender]
            inbound.received = max(inbound.received, seq)
            inbound.ahead.clear()
        return verdict


class IgnoresWindow(QueueSender[int]):
    def ready(self, now: float) -> Any:
        return next(iter(self.lanes.values()), None)


class NeverProbes(QueueSender[int]):
    def poll(self, now: float) -> Iterator[Any]:
        return iter(())


class DropsRedo(QueueSender[int]):
    def credit(self, credit: Credit, now: float) -> Any:
        reopened = super().credit(credit, now)
        return reopened and replace(reopened, redo=())


class FollowsOldReceivers(QueueSender[int]):
    def credit(self, credit: Credit, now: float) -> Any:
        lane = self.lanes.get(credit.receiver)
        if lane is not None and credit.epoch < lane.epoch:
            del self.lanes[credit.receiver]
        return super().credit(credit, now)


class ForgetsKept(QueueSender[int]):
    """Drops what it keeps as soon as anything was acknowledged."""

    def credit(self, credit: Credit, now: float) -> Any:
        reopened = super().credit(credit, now)
        for lane in self.lanes.values():
            if lane.received:
                lane.kept.clear()
        return reopened


class GoesBack(LatestSubscriber):
    def chunk(self, head: object, body: memoryview, now: float) -> Any:
        self.held = latest.NOTHING
        return super().chunk(head, body, now)


class MixesVersions(LatestSubscriber):
    """Fills a value with whatever chunk comes, and does not look at the digest."""

    def chunk(self, head: Any, body: memoryview, now: float) -> Any:
        partial = self._partial
        if partial is not None and (head[0], head[1]) > partial.version and head[2] == partial.total:
            partial.version, partial.digest, partial.base = (head[0], head[1]), head[4], (head[5], head[6])
        return super().chunk(head, body, now)

    def _complete(self, partial: Any, data: memoryview, now: float) -> Any:
        partial.digest = latest.digest(self._decoded(partial, data))
        return super()._complete(partial, data, now)


class SkipsDigest(LatestSubscriber):
    def _complete(self, partial: Any, data: memoryview, now: float) -> Any:
        partial.digest = latest.digest(self._decoded(partial, data))
        return super()._complete(partial, data, now)


class BuildsOnAnything(LatestSubscriber):
    """Takes a difference to another value than the one it holds, and does not look at the digest."""

    def _fits(self, base: Any) -> bool:
        return True

    def _complete(self, partial: Any, data: memoryview, now: float) -> Any:
        partial.digest = latest.digest(self._decoded(partial, data))
        return super()._complete(partial, data, now)


class NeverAsksAgain(LatestSubscriber):
    def question(self, now: float) -> Any:
        self._ask_at = now if self._number == 0 else float("inf")
        return super().question(now)


class IgnoresBeacons(LatestSubscriber):
    def wants(self, version: Any, now: float) -> bool:
        return bool(version > self.held)

    def chunk(self, head: object, body: memoryview, now: float) -> Any:
        return super().chunk(head, body, now) if len(body) else None


class StaysWithOldPartial(LatestSubscriber):
    def chunk(self, head: Any, body: memoryview, now: float) -> Any:
        if self._partial is not None and (head[0], head[1]) != self._partial.version:
            return None
        return super().chunk(head, body, now)


class NoticesNoLoss(LatestSubscriber):
    def question(self, now: float) -> Any:
        self._lost = False
        return super().question(now)


class TellsNobodyWhereItIs(LatestPublisher):
    def beacon(self, life: Any) -> Any:
        return []


class ForgetsNobody(LatestPublisher):
    def gone(self, life: Any, ask: Any) -> None:
        pass


class AlwaysReplaces(LatestPublisher):
    def _under_way(self, who: Any) -> Any:
        who.replaced = False
        return super()._under_way(who)


class BeginsAnewEachTime(LatestPublisher):
    def asked(self, life: Any, ask: Any, now: float) -> bool:
        return super().asked(life, ask._replace(since=ask.number), now)


class TakesEachLinkForFast(LatestPublisher):
    def more(self, life: Any, now: float) -> Any:
        self._fetching[life].window = latest.MAX_WINDOW
        return super().more(life, now)


class TakesOthersForTheSame(LatestPublisher):
    def publish(self, version: Any, value: memoryview) -> None:
        before = [*self._same, *([self.version] if self.version else [])]
        super().publish(version, value)
        self._same.extend(before)


class RunsRepetitions(RequestServer[Any]):
    def arrived(self, client: str, epoch: int, request: int) -> Any:
        standing = super().arrived(client, epoch, request)
        return "new" if standing == "running" else standing


class ForgetsAnswers(RequestServer[Any]):
    def answer(self, client: str, epoch: int, request: int, frame: Any) -> None:
        super().answer(client, epoch, request, frame)
        self._peers[client].answers.clear()


class RunsEarlierLives(RequestServer[Any]):
    def arrived(self, client: str, epoch: int, request: int) -> Any:
        standing = super().arrived(client, epoch, request)
        return "new" if standing in ("old", "fenced") else standing


class NeverRuns(RequestServer[Any]):
    def arrived(self, client: str, epoch: int, request: int) -> Any:
        standing = super().arrived(client, epoch, request)
        return "running" if standing == "new" and request == 7 else standing


class TakesLateAnswers(RequestClient[int]):
    def answered(self, request: int, now: float) -> bool:
        super().answered(request, now)
        return True


class NeverTimesOut(RequestClient[int]):
    def poll(self, now: float) -> Due[int]:
        for pending in self._pending.values():
            pending.deadline = float("inf")
        return super().poll(now)


class NeverRepeats(RequestClient[int]):
    def poll(self, now: float) -> Due[int]:
        return replace(super().poll(now), again=())


MUTANTS: list[tuple[type[World], str, type]] = [
    *((QueueSimulation, "receiver_core", core) for core in (TakesDuplicates, TakesZombies, TakesOtherLives)),
    *((QueueSimulation, "receiver_core", core) for core in (TakesOlderHello, NeverGivesUp, GivesUpAtOnce)),
    *((QueueSimulation, "receiver_core", core) for core in (GivesUpUncounted, KeepsLostInWindow, GivesUpTooFar)),
    *((QueueSimulation, "receiver_core", core) for core in (LetsOneTooManyOut, NeverRepeatsCredits, ForgetsGapBehind)),
    *((QueueSimulation, "sender_core", core) for core in (IgnoresWindow, NeverProbes, DropsRedo)),
    *((QueueSimulation, "sender_core", core) for core in (FollowsOldReceivers, ForgetsKept)),
    *((LatestSimulation, "subscriber_core", core) for core in (GoesBack, MixesVersions, SkipsDigest, NeverAsksAgain)),
    *((LatestSimulation, "subscriber_core", core) for core in (BuildsOnAnything, IgnoresBeacons, NoticesNoLoss)),
    *((LatestSimulation, "subscriber_core", core) for core in (StaysWithOldPartial,)),
    *((LatestSimulation, "publisher_core", core) for core in (TellsNobodyWhereItIs, ForgetsNobody, AlwaysReplaces)),
    *((LatestSimulation, "publisher_core", core) for core in (BeginsAnewEachTime, TakesOthersForTheSame)),
    (LatestSimulation, "publisher_core", TakesEachLinkForFast),
    *((RequestSimulation, "server_core", core) for core in (RunsRepetitions, ForgetsAnswers, RunsEarlierLives)),
    *((RequestSimulation, "server_core", core) for core in (NeverRuns,)),
    *((RequestSimulation, "client_core", core) for core in (TakesLateAnswers, NeverTimesOut, NeverRepeats)),
]


@pytest.mark.parametrize(("simulation", "side", "core"), MUTANTS, ids=lambda v: getattr(v, "__name__", v))
def test_broken_core_is_caught(simulation: type[Any], side: str, core: type) -> None:
    assert caught(simulation, side, core) is not None


def caught(simulation: type[Any], side: str, core: type) -> int | None:
    """The first seed in which `core` breaks a promise."""
    for seed in range(MUTANT_SEEDS):
        try:
            simulation(seed, **{side: core}).run()
        except Violation:
            return seed
    return None
