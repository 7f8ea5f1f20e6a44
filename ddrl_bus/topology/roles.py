"""What the ports that a node holds make of it, and which of them make a system together.

    actor         with `weights` it has a policy of its own; with `act` it asks an inference node for its actions
    learner       trains on `trajectories` as they come, or on `samples` that replay nodes draw
                  applies its gradients itself; with `gradients` it has parameter servers apply them
                  several: with `sync` they sum their gradients, as replicas; `tally` ends their actors' rollouts early
    replay        keeps trajectories, draws samples of them
    inference     assembles trajectories itself where it holds that port, else its actors do
    evaluator     plays a learner's `weights`, or a parameter server's `parameters`

What stands idle, and what two would do at once, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddrl_bus.topology.plan import LinkPlan
from ddrl_bus.topology.schema import PORTS, ActorOptions, AlgorithmEntry, LearnerOptions, NodeOptions
from ddrl_bus.topology.tree import Node, Problems, came, dotted

NEEDS: Mapping[str, Mapping[tuple[str, ...], str]] = {
    "actor": {("weights", "act"): "it plays by weights of its own, or asks an inference node"},
    "learner": {("samples", "trajectories"): "it trains on what replay nodes draw, or on unrolls as they come"},
    "replay": {("trajectories",): "it keeps what they bring", ("samples",): "learners draw from it there"},
    "evaluator": {("weights", "parameters"): "it plays what a learner or a parameter server publishes"},
    "inference": {("act",): "actors ask it there", ("weights",): "it answers by them"},
    "param_server": {("gradients",): "it applies them"},
}
"""Kind -> ports -> why each node of the kind holds exactly one of these."""


@dataclass(frozen=True)
class Roles:
    """Judges links that are right each by itself, between the `groups` that have nodes."""

    groups: Mapping[str, NodeOptions]
    links: Mapping[str, LinkPlan]
    algorithm: AlgorithmEntry
    settings: Any
    """Of the algorithm."""
    root: Node
    problems: Problems

    def check(self) -> None:
        for group, options in self.groups.items():
            for ports, why in NEEDS.get(options.kind, {}).items():
                self._check_need(group, options.kind, ports, why)
        self._check_replay()
        self._check_trajectories()
        self._check_env_groups()
        self._check_evaluators()
        self._check_learners()
        self._check_servers()
        self._check_staleness()
        self._check_trainers()
        self._check_outliers()
        self._check_preemption()
        self._check_precision()

    def _say(self, path: tuple[str, ...], message: str) -> None:
        self.problems.add(self.root.find(path), dotted(path), message)

    def _at(self, port: str) -> tuple[str, ...]:
        """The groups at the ends of a link; none where the topology lacks it."""
        link = self.links.get(port)
        return link.sources + link.targets if link else ()

    def _check_need(self, group: str, kind: str, ports: tuple[str, ...], why: str) -> None:
        held = [port for port in ports if group in self._at(port)]
        ends = [("links", port, "from" if kind in PORTS[port].sources else "to") for port in ports]
        if not held:
            places = f"name it in {' or '.join(map(dotted, ends))}, or set nodes.{group}.count: 0"
            message = f"holds no end of {' or '.join(ports)}, but every {kind} does: {why}; {places}"
            self._say(("nodes", group), message)
        elif len(held) > 1:
            self._say(ends[-1], f"{group} holds {' and '.join(held)}, expected one of them: {why}")

    def _check_replay(self) -> None:
        """Whether a rule replays is its nature, and no matter of wiring."""
        if self.settings is None:  # refused elsewhere
            return
        drawn, replays = "samples" in self.links, self.algorithm.windows(self.settings) is not None
        if drawn and not replays:
            message = "it learns from what its newest policies played, and samples are of old ones"
            fix = "send links.trajectories to learner and leave links.samples out, or use a rule such as dqn"
            self._say(("algo", "name"), f"{message}; {fix}")
        elif replays and not drawn:
            message = "it learns from samples, which replay nodes draw for it"
            fix = "add a group replay to nodes, name it in links.trajectories.to, and add links.samples"
            self._say(("algo", "name"), f"{message}; {fix}")

    def _check_trajectories(self) -> None:
        """An unroll is assembled once: by an actor, or by the inference node that every actor then asks."""
        link = self.links.get("trajectories")
        if link and len(kinds := {self.groups[name].kind for name in link.sources}) > 1:
            message = f"{' and '.join(sorted(kinds))} nodes would both send what the same environments play"
            self._say(("links", "trajectories", "from"), f"{message}; name one of them")
        if link and "samples" in self.links:
            if link.max_lag is not None:
                message = f"got {link.max_lag}, but what is replayed grows older than any bound; leave it out"
                self._say(("links", "trajectories", "max_lag"), message)
            return
        if link and "act" in self.links and link.max_lag == 0:
            message = "got 0, but with act the weights may change within an unroll; leave it out"
            self._say(("links", "trajectories", "max_lag"), message)
        if link and "gradients" in self.links and link.max_lag != 0:
            message = f"got {came(link.max_lag)}, expected 0: a gradient is of the parameters that played its unrolls"
            self._say(("links", "trajectories", "max_lag"), message)

    def _check_env_groups(self) -> None:
        """With `act` the environments of an actor step in turn, in parts of one size."""
        for group, options in self.groups.items():
            if isinstance(options, ActorOptions) and group in self._at("act") and options.envs % options.groups:
                message = f"got {options.groups}, expected a divisor of nodes.{group}.envs, which is {options.envs}"
                self._say(("nodes", group, "groups"), message)

    def _check_evaluators(self) -> None:
        """With a parameter server a learner's weights are a copy for its own actors."""
        if "gradients" in self.links:
            for group in self._at("weights"):
                if self.groups[group].kind == "evaluator":
                    message = f"{group} would play a worker's copy; name it in links.parameters.to instead"
                    self._say(("links", "weights", "to"), message)

    def _check_staleness(self) -> None:
        """Weights that are published late must not make every unroll too old: nobody would move again."""
        link = self.links.get("trajectories")
        for group, options in self.groups.items():
            if not isinstance(options, LearnerOptions) or link is None or link.max_lag is None:
                continue
            every, delay = options.publish_every, options.delay
            oldest = every - 1 + every * -(-delay // every)
            if oldest > link.max_lag:
                which = "delay" if delay else "publish_every"
                got = f"got {getattr(options, which)}, but weights up to {oldest} updates old would be the newest"
                fix = f"expected at most links.trajectories.max_lag, which is {link.max_lag}"
                self._say(("nodes", group, which), f"{got}, {fix}")

    def _check_trainers(self) -> None:
        """Of several gradients at a time each is applied to what the others have made of the parameters."""
        for group, options in self.groups.items():
            if not isinstance(options, LearnerOptions) or options.trainers == 1:
                continue
            if not self.algorithm.one_pass:
                why = "an update of this rule is several gradients, one after the other"
            elif "gradients" in self.links:
                why = "a worker computes one gradient at a time; raise the count of workers"
            elif "samples" in self.links:
                why = "what is drawn next follows from the errors of what was trained on before"
            elif (link := self.links.get("trajectories")) and link.max_lag is not None:
                why = "with max_lag each update must know how far the parameters will be; leave that out"
            else:
                continue
            self._say(("nodes", group, "trainers"), f"got {came(options.trainers)}, expected 1: {why}")

    def _check_outliers(self) -> None:
        """Only a gradient that is sent away can be left out."""
        for group, options in self.groups.items():
            if isinstance(options, LearnerOptions) and options.outliers is not None and "gradients" not in self.links:
                message = (
                    f"got {options.outliers:g}, but only with gradients a learner leaves batches out; leave it out"
                )
                self._say(("nodes", group, "outliers"), message)

    def _check_preemption(self) -> None:
        """Who ends its rollout early must hear how many have ended theirs, and train on what it has."""
        share = getattr(self.settings, "preempt", 0)
        if share and not {"tally", "sync"} <= self.links.keys():
            message = f"got {share:g}, but nobody tells actors how many have played; add links.sync and links.tally"
            self._say(("algo", "preempt"), f"{message}, or leave it out")
        elif share and not self._in_lock_step:
            message = f"got {share:g}, but nobody waits for a straggler's unroll; set links.trajectories.max_lag to 0"
            self._say(("algo", "preempt"), f"{message}, or leave it out")

    def _check_precision(self) -> None:
        """Weights that are rounded are not those that a gradient is of."""
        link = self.links.get("weights")
        if link is None or link.precision == "float32":
            return
        if "gradients" in self.links:
            why = "a worker's actors play by the very parameters that it computes gradients of"
        elif self.algorithm.acting == "float32":
            why = "this rule takes the policy that acted for its own"
        else:
            return
        self._say(("links", "weights", "precision"), f"got {link.precision}, expected float32: {why}")

    def _check_servers(self) -> None:
        """Of several parameter servers each holds a part: who meets only the one in its bundle lacks the others'."""
        for group in dict.fromkeys([*self._at("gradients"), *self._at("parameters")]):
            options = self.groups[group]
            beside = [name for name, other in self.groups.items() if other.bundle == options.bundle and name != group]
            if options.kind == "param_server" and options.count > 1 and options.bundle and beside:
                message = f"got {came(options.bundle)}, where {beside[0]} would meet one of {options.count}"
                fix = "each holds a part of the parameters; leave it out, or have one server"
                self._say(("nodes", group, "bundle"), f"{message}: {fix}")

    def _check_learners(self) -> None:
        """Several train as one, each a replica of the others, or share what they learn through parameter servers."""
        if "gradients" in self.links and not self.algorithm.one_pass:
            message = "its updates are several gradients each, which no parameter server can apply as one"
            self._say(("algo", "name"), f"{message}; leave links.gradients out, or use a rule such as a2c")
        learners = [name for name, options in self.groups.items() if options.kind == "learner"]
        count = sum(self.groups[name].count for name in learners)
        if "sync" in self.links:
            self._check_replicas(learners, count)
        if count > 1 and ("gradients" in self.links or self._in_lock_step):
            self._check_own_actors(learners, count)

    @property
    def _in_lock_step(self) -> bool:
        return "trajectories" in self.links and self.links["trajectories"].max_lag == 0

    def _check_replicas(self, learners: Sequence[str], count: int) -> None:
        """They begin each update together, with what each of them was sent."""
        if "gradients" in self.links:
            message = "learners either have param_servers apply their gradients, or sum them among themselves"
            self._say(("links", "sync"), f"{message}; leave it or links.gradients out")
        if "samples" in self.links:
            why = "replicas train on unrolls as they come, and what is drawn is of nobody's turn"
            if count > 1:
                self._say(("nodes", learners[-1], "count"), f"{count} nodes of kind learner, expected 1: {why}")
            else:
                self._say(("links", "sync"), f"{why}; leave it out")
        for group in learners:
            options = self.groups[group]
            if isinstance(options, LearnerOptions) and options.trainers != 1:
                message = (
                    f"got {came(options.trainers)}, expected 1: replicas apply one gradient at a time, all the same"
                )
                self._say(("nodes", group, "trainers"), message)

    def _check_own_actors(self, learners: Sequence[str], count: int) -> None:
        """Replay nodes may be anybody's: what they hold fits any learner."""
        bundle = self.groups[learners[0]].bundle
        played = () if "samples" in self.links else self._at("trajectories")
        for group in dict.fromkeys([*learners, *played, *self._at("weights")]):
            options = self.groups[group]
            if options.kind != "evaluator" and (options.bundle is None or options.bundle != bundle):
                message = f"got {came(options.bundle)}, but each of {count} learners plays with actors of its own"
                ends = "trajectories and weights" if played else "weights"
                fix = f"give {learners[0]} and all at its ends of {ends} one bundle"
                self._say(("nodes", group, "bundle"), f"{message}: {fix}")
                return
