"""The controller: who is there, how far the run is, when it is over. It stands off the data path: training goes on
without it, and a new life of it learns everything from the next heartbeats.

    run ─→ confirm ─→ drain           an evaluation that reaches `stop.reward`, the trainer's spent budget, or the clock
     ↑________|                       asks for a confirmation: the trainer holds still and the evaluator plays exactly
                                      its weights on fresh seeds. A reward that does not hold sends everybody back.

Draining goes from the sources to the sinks, so that whoever receives is there until everything sent has arrived.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np

from ddrl_bus import __version__
from ddrl_bus.errors import UsageError, WireError
from ddrl_bus.messages import STATUS, STOP, Control, Evaluation, Join, Joined, Phase, Progress, fields_of, parse
from ddrl_bus.metrics import JsonLines, finite, shares
from ddrl_bus.nodes.added import Added
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.membership import Membership
from ddrl_bus.nodes.reports import report_of
from ddrl_bus.topology.schema import MAX_NODES
from ddrl_bus.topology.show import terms
from ddrl_bus.transport.ledger import read
from ddrl_bus.transport.links import Request, life
from ddrl_bus.transport.wire import Arena
from ddrl_bus.versions import versions

TICK_S: Final = 0.1
METRICS_EVERY_S: Final = 1.0
DEAD_S: Final = 5.0
"""A node silent for this long is not waited for."""
CONFIRM_S: Final = 60.0
"""A confirmation takes at most this long."""
DRAIN_ORDER: Final = (
    *(("actor", "evaluator"), ("inference",), ("relay",)),
    *(("learner",), ("replay",), ("param_server",)),
)


@dataclass(slots=True)
class Member:
    """One node as last heard."""

    progress: Progress
    epoch: int
    heard: float

    @property
    def gone(self) -> bool:
        return self.progress.state in ("stopped", "failed")


class Controller(Node):
    role: ClassVar[str] = "controller"

    async def start(self) -> None:
        self.server = self.bus.server(Progress.KIND, self._port(Progress.KIND).binds)
        self.publisher = self.open_publisher(Control.KIND)
        self.members: dict[str, Member] = {}
        kinds = {node.kind for node in self.plan.nodes.values()}
        self.trainer = "param_server" if "param_server" in kinds else "learner"
        self.lives = self._earlier_lives()
        self.added = Added(self.plan, self.run_dir)
        self.best: Evaluation | None = None
        self.last: Evaluation | None = None
        self.confirmed: Evaluation | None = None
        self.heard: dict[str, Evaluation] = {}
        self.began = self._run_started()
        self.reason = ""
        self.published = 0
        self._deadline = 0.0
        self._samples: list[tuple[float, int]] = []
        learners = self.plan.members(self.plan.links["sync"].sources) if "sync" in self.plan.links else ()
        self.membership = Membership([node.name for node in learners], asyncio.get_running_loop().time())
        self.metrics = JsonLines(self.run_dir / "metrics.jsonl")
        self._publish(Control())

    def _earlier_lives(self) -> dict[str, dict[str, int]]:
        """Life → counters, of what this run directory holds of the time before this life."""
        folder = self.run_dir / "ledger"
        told = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        return told | {path.stem: read(path) for path in folder.glob("*.page")}

    def _run_started(self) -> float:
        """Seconds since 1970 at the command that began this run."""
        try:
            return float(json.loads((self.run_dir / "meta.json").read_text())["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._started

    def background(self) -> list[Coroutine[Any, Any, None]]:
        return []

    async def goodbye(self, error: str | None = None) -> None:
        """Nobody is left to report to."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._serve(), name=f"{self.name}.serve")
        try:
            while not self._over():
                if serving.done():
                    serving.result()
                if self.draining.is_set() and self.control.phase != "drain":
                    self._drain("stop")
                self._decide(loop.time())
                self._regroup(loop.time())
                self._measure()
                await self.until(asyncio.sleep(TICK_S), self.control_changed)
                self.control_changed.clear()
        finally:
            serving.cancel()
            self.metrics.close()
        self._write_result()

    # ---- what others say

    async def _serve(self) -> None:
        answers: dict[str, Callable[[Request], None]] = {
            Progress.KIND: self._on_progress,
            STATUS: self._on_status,
            STOP: self._on_stop,
            Join.KIND: self._on_join,
        }
        while True:
            request = await self.server.recv()
            answer = answers.get(request.message.kind)
            if answer is None:
                request.refuse(f"unknown request {request.message.kind!r}; have {', '.join(answers)}")
                continue
            try:
                answer(request)
            except WireError as error:
                request.refuse(str(error))

    def _on_progress(self, request: Request) -> None:
        message = request.message
        progress = report_of(message)
        known = self.members.get(message.node)
        if progress.topology != self.plan.run_id or not (known or self._may_be(message.node)):
            request.refuse(
                f"{message.node} runs topology {progress.topology}, this is {self.plan.name} {self.plan.run_id}: "
                "start every host from the same file and overrides, or with --join"
            )
            return
        if progress.role != (kind := self.plan.node(message.node).kind):
            request.refuse(f"{message.node} is no {progress.role}: it is of kind {kind}")
            return
        if progress.package != __version__ and (known is None or known.epoch != message.epoch):
            self.log.warning("%s runs ddrl_bus %s, this is %s", message.node, progress.package, __version__)
        now = asyncio.get_running_loop().time()
        self.members[message.node] = member = Member(progress, message.epoch, now)
        if progress.role == "learner":
            self.membership.heard(message.node, message.epoch, progress.replica, now, gone=member.gone)
        self.lives[life(message.node, message.epoch)] = progress.counters
        for earlier, counters in progress.earlier.items():
            if re.fullmatch(rf"{re.escape(message.node)}@[0-9a-f]{{16}}", earlier):  # it will name a file
                self.lives[earlier] = counters
        if progress.evaluation is not None and progress.role == "evaluator":
            self._on_evaluation(message.node, progress.evaluation)
        request.answer(Control.KIND, fields_of(self.control))
        self.control_changed.set()

    def _on_evaluation(self, evaluator: str, evaluation: Evaluation) -> None:
        if evaluation == self.heard.get(evaluator):  # heartbeats repeat it
            return
        self.heard[evaluator] = self.last = evaluation
        if self.best is None or evaluation.mean_return > self.best.mean_return:
            self.best = evaluation
        if evaluation.confirm and evaluation.confirm == self.control.confirm:
            self.confirmed = evaluation
        self._write_metrics(evaluation)

    def _on_status(self, request: Request) -> None:
        text = json.dumps(finite(self.status())).encode()
        request.answer(STATUS, arrays={"json": np.frombuffer(text, np.uint8)})

    def _on_stop(self, request: Request) -> None:
        if request.speakers is not None:  # its key is for what its nodes need
            request.refuse(f"a run is stopped on its head: type `ddrl stop` on {self.plan.controller.host}")
            return
        if self.control.phase != "drain":
            self._drain("stop")
        request.answer(Control.KIND, fields_of(self.control))

    def _on_join(self, request: Request) -> None:
        join = parse(Join, request.message)
        if self.control.phase == "drain":
            request.refuse(f"{self.plan.name} {self.plan.run_id} is ending ({self.reason})")
            return
        share = self.plan.processes.get(join.process, ()) if join.process else self.plan.on_host(join.host)
        nodes = [] if join.group else [node.name for node in share]
        try:
            asked = [self.added.first(join)] if join.group else nodes
            if names := sorted(name for name in asked if not (request.speakers is None or name in request.speakers)):
                kinds = [self.plan.groups[join.group].kind] if join.group else [node.kind for node in share]
                request.refuse(self._without_rights(names, kinds))
                return
            added = self.added.grant(join, self.members) if join.group else []
        except UsageError as error:
            request.refuse(str(error))
            return
        now = asyncio.get_running_loop().time()
        text = self.plan.lock().encode()
        self.log.info("join of=%s versions=%s", join.process or join.host, json.dumps(join.versions))
        joined = Joined(
            hashlib.sha256(text).hexdigest(),
            versions(),
            {name: epoch for name in nodes if (epoch := self._newest_life(name))},
            [name for name in nodes if self._present(name, now)][:16],
            added,
        )
        request.answer(Joined.KIND, fields_of(joined), {"topology": np.frombuffer(text, np.uint8)})

    def _without_rights(self, names: list[str], kinds: list[str]) -> str:
        head, roles = self.plan.controller.host, ", ".join(sorted(set(kinds)))
        return (
            f"whoever asks has no key that is allowed for {', '.join(names[:16])}; on {head} type:  "
            f"ddrl keys allow HOST KEY  with no --role, or each of {roles}"
        )

    def _may_be(self, name: str) -> bool:
        """Whether a node that was never heard may be one of this run."""
        return name in self.plan.nodes or (len(self.members) < MAX_NODES and self.plan.added(name) is not None)

    def _newest_life(self, name: str) -> int:
        """Its epoch; 0 where none is known."""
        lives = (life.partition("@") for life in self.lives)
        return max((int(epoch, 16) for node, _, epoch in lives if node == name), default=0)

    # ---- what follows from it

    def _decide(self, now: float) -> None:
        match self.control.phase:
            case "run":
                if reason := self._finished():
                    self._ask_to_confirm(reason, now)
            case "confirm":
                if self.confirmed is not None:
                    self._conclude(self.confirmed)
                elif now >= self._deadline:
                    self.log.warning("no evaluation within %.0f s; ending without one", CONFIRM_S)
                    self._drain(self.reason)
            case "drain":
                wanted = self._may_drain(now)
                if wanted != self.control.draining:
                    self._say("drain", draining=wanted)

    def _finished(self) -> str:
        stop = self.plan.stop
        if stop.reward is not None and self.last is not None and self.last.mean_return >= stop.reward:
            return "reward"
        if any(member.progress.done for member in self.members.values() if member.progress.role == self.trainer):
            return "steps"
        if stop.time is not None and time.time() - self.began >= stop.time:
            return "time"
        return ""

    def _regroup(self, now: float) -> None:
        """Learners come and go until the end begins; a group that goes on without us is told of, too."""
        if self.control.phase != "drain" and self.membership.decide(now):
            missing = ",".join(self.membership.missing) or "nobody"
            self.log.info("group=%s missing=%s", self.membership.group, missing)
        if self.membership.group != self.control.group:
            self._publish(replace(self.control, group=self.membership.group))

    def _ask_to_confirm(self, reason: str, now: float) -> None:
        self.reason, self.confirmed = reason, None
        if not any(m.progress.role == "evaluator" and not m.gone for m in self.members.values()):
            self._drain(reason)
            return
        self._deadline = now + CONFIRM_S
        # Above every number of an earlier life: the learner answers each number once.
        self._say("confirm", confirm=max(self.control.confirm, self.epoch >> 32 << 16) + 1)

    def _conclude(self, evaluation: Evaluation) -> None:
        target = self.plan.stop.reward
        if self.reason == "reward" and target is not None and evaluation.mean_return < target:
            self.log.info("return %.1f did not hold: %.1f on fresh seeds; going on", target, evaluation.mean_return)
            self.last = self.confirmed = None
            self.reason = ""
            self._say("run")
            return
        self._drain(self.reason)

    def _drain(self, reason: str) -> None:
        self.reason = reason
        self._say("drain", draining=self._may_drain(asyncio.get_running_loop().time()))

    def _may_drain(self, now: float) -> list[str]:
        """Every stage whose predecessors have left."""
        names: list[str] = []
        for kinds in DRAIN_ORDER:
            stage = [name for name, kind in self._kinds().items() if kind in kinds]
            names += stage
            if any(self._present(name, now) for name in stage):
                break
        return names

    def _kinds(self) -> dict[str, str]:
        """Node → kind, of everybody who belongs to the run now: those of the plan, and added ones until they leave."""
        kinds = {name: node.kind for name, node in self.plan.nodes.items()}
        return kinds | {name: self.plan.node(name).kind for name in self._added() if not self.members[name].gone}

    def _added(self) -> list[str]:
        return [name for name in self.members if name not in self.plan.nodes]

    def _present(self, name: str, now: float) -> bool:
        member = self.members.get(name)
        return member is not None and not member.gone and now - member.heard < DEAD_S

    def _over(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self.control.phase == "drain" and not any(self._present(name, now) for name in self.members)

    def _say(self, phase: Phase, *, confirm: int | None = None, draining: list[str] | None = None) -> None:
        number = self.control.confirm if confirm is None else confirm
        self._publish(Control(phase, number, draining or [], self.reason, self.membership.group))

    def _publish(self, control: Control) -> None:
        self.control = control
        self.log.info("phase=%s confirm=%d reason=%s", control.phase, control.confirm, control.reason)
        self.published += 1
        self.publisher.publish(self.published, Arena.of(Control.KIND, {}), fields_of(control))

    # ---- figures

    def _trained(self, gauge: str) -> float:
        """A gauge of the nodes that decide about the run: parameter servers, of which every gradient concerns each, or
        else the learner."""
        trainers = (member.progress for member in self.members.values() if member.progress.role == self.trainer)
        return max((progress.gauges.get(gauge, 0) for progress in trainers), default=0)

    def _env_steps(self) -> int:
        """Steps that actors took, over all their lives."""
        return sum(counters.get("env_steps", 0) for counters in self.lives.values())

    def _steps_per_s(self, window_s: float) -> float:
        """Steps a second over the last `window_s` of the run, start-up left out."""
        if len(self._samples) < 2:
            return 0.0
        end, steps = self._samples[-1]
        start, before = next(sample for sample in self._samples if end - sample[0] <= window_s)
        return (steps - before) / (end - start) if end > start else 0.0

    def _measure(self) -> None:
        now = time.time()
        if self._samples and now - self._samples[-1][0] < METRICS_EVERY_S:
            return
        if self.control.phase != "run" or not self._trained("first_update_at"):
            return
        self._samples.append((now, self._env_steps()))
        self._write_metrics()

    def _write_metrics(self, evaluation: Evaluation | None = None) -> None:
        """A line now and then, and one for each evaluation."""
        status = self.status()
        gauges = {name: node["gauges"] for name, node in status.pop("nodes").items()}
        del status["links"]
        evaluated = asdict(evaluation) if evaluation else None
        self.metrics.write({"time": time.time(), **status, "evaluation": evaluated, "nodes": gauges})

    def status(self) -> dict[str, Any]:
        """Everything that `ddrl status` shows."""
        links = self.plan.links.values()
        return {
            "name": self.plan.name,
            "run_id": self.plan.run_id,
            "seed": self.plan.seed,
            "phase": self.control.phase,
            "reason": self.control.reason,
            "wall_s": time.time() - self.began,
            "env_steps": self._env_steps(),
            "updates": int(self._trained("updates")),
            "steps_per_s": self._steps_per_s(5.0),
            "return": self.last.mean_return if self.last else None,
            "best_return": self.best.mean_return if self.best else None,
            "quarantined": self._quarantined(),
            "links": {link.name: {"terms": terms(link), "bytes_in": self._bytes(link.name)} for link in links},
            "added": self._turnout(),
            "nodes": {name: self._member_status(name) for name in self._kinds()},
        }

    def _bytes(self, link: str) -> int:
        """That arrived over a link at all its ends, over all lives that were heard of."""
        return sum(counters.get(f"{link}/bytes_in", 0) for counters in (self.ledger.snapshot(), *self.lives.values()))

    def _turnout(self) -> dict[str, int]:
        """What became of the nodes that were added: `left` said goodbye, `lost` did not."""
        now = asyncio.get_running_loop().time()
        added = self._added()
        left = sum(self.members[name].progress.state == "stopped" for name in added)
        here = sum(self._present(name, now) for name in added)
        return {"here": here, "left": left, "lost": len(added) - left - here}

    def _quarantined(self) -> list[str]:
        """Hosts that any node has shut out, for what it had to refuse of them."""
        books = [self.ledger.snapshot(), *(member.progress.counters for member in self.members.values())]
        found = (name.split("/") for counters in books for name, count in counters.items() if count)
        return sorted({name[1] for name in found if (name[0], name[-1]) == ("security", "quarantined")})

    def _member_status(self, name: str) -> dict[str, Any]:
        member = self.members.get(name)
        if name == self.name:
            progress, epoch, silent = self.progress(), self.epoch, 0.0
        elif member is None:
            return {"role": self.plan.nodes[name].kind, "state": "unheard", "gauges": {}, "counters": {}}
        else:
            silent = asyncio.get_running_loop().time() - member.heard
            progress, epoch = member.progress, member.epoch
        return {
            "role": progress.role,
            "pid": progress.pid,
            "host": progress.host,
            "epoch": f"{epoch:016x}",
            "started": progress.started,
            "state": progress.state,
            "silent_s": round(silent, 1),
            "package": progress.package,
            "gauges": progress.gauges,
            "counters": progress.counters,
            "error": progress.error,
        }

    def _write_result(self) -> None:
        first = self._trained("first_update_at")
        final = self.confirmed or self.last
        result = {
            "reason": self.reason,
            "return": final.mean_return if final else None,
            "confirmed": self.confirmed is not None,
            "env_steps": self._env_steps(),
            "updates": int(self._trained("updates")),
            "steps_per_s": self._steps_per_s(float("inf")),
            "first_update_s": first - self.began if first else None,
            "overhead": {n: shares(m.progress.counters).get("overhead") for n, m in self.members.items()},
            "shares": {n: shares(m.progress.counters) for n, m in self.members.items()},
            "added": self._turnout(),
            "seed": self.plan.seed,
        }
        for name, counters in self.lives.items():
            told = self.run_dir / "ledger" / f"{name}.json"
            if not told.with_suffix(".page").exists():  # it ran on another host
                told.write_text(json.dumps(counters))
        temporary = self.run_dir / "result.json.tmp"
        temporary.write_text(json.dumps(finite(result), indent=1))
        temporary.rename(self.run_dir / "result.json")
