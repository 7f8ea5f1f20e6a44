"""Who trains as one, from what heartbeats say: case by case, and over random lives of learners and controllers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from ddrl_bus.messages import Group, Replica
from ddrl_bus.nodes.membership import MEET_S, SILENT_S, SUSPECT_S, Membership

NAMES = ("a", "b", "c")
BEAT_S = 0.5


class Run:
    """A membership with a clock, and learners that a test has say something."""

    def __init__(self, planned: tuple[str, ...] = NAMES, now: float = 100.0) -> None:
        self.planned, self.now = planned, now
        self.membership = Membership(planned, now)
        self.lives = dict.fromkeys(planned, 1)
        self.broken = dict.fromkeys(planned, 0)
        self.groups: list[Group] = []

    def say(self, *names: str, gone: bool = False, life: int | None = None) -> None:
        for name in names:
            epoch = self.lives[name] if life is None else life
            inside = [group for group in self.groups if group.members.get(name) == epoch]
            replica = Replica(f"{name}:{epoch}", inside[-1] if inside else None, self.broken[name])
            self.membership.heard(name, epoch, replica, self.now, gone=gone)

    def decide(self) -> dict[str, int] | None:
        """The members of a new group; None where there is none."""
        if not self.membership.decide(self.now):
            return None
        assert self.membership.group is not None
        assert not self.membership.decide(self.now), "decided twice"
        self.groups.append(self.membership.group)
        return self.membership.group.members

    def later(self, seconds: float, *speaking: str) -> dict[str, int] | None:
        """What is decided first within so many seconds of heartbeats; the clock stops there."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + BEAT_S)
            self.say(*speaking)
            if (members := self.decide()) is not None:
                return members
        return None

    def fail(self, *names: str) -> None:
        """The newest group failed them, and they say so."""
        for name in names:
            self.broken[name] = self.groups[-1].generation
        self.say(*names)

    def after(self, *names: str) -> Run:
        """A new controller, which those have spoken to."""
        other = Run(self.planned, self.now)
        other.lives, other.broken, other.groups = self.lives, self.broken, list(self.groups)
        other.say(*names)
        return other


@pytest.fixture
def run() -> Run:
    """With everybody in the first group."""
    made = Run()
    made.say(*NAMES)
    assert made.decide() == {"a": 1, "b": 1, "c": 1}
    return made


# ── the first group ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_group_is_formed_once_all_are_there() -> None:
    run = Run()
    assert run.decide() is None
    run.say("c", "a")
    assert run.decide() is None
    assert run.membership.missing == [*NAMES]
    run.say("b")
    assert run.decide() == {"a": 1, "b": 1, "c": 1}
    assert run.groups == [Group(1, {"a": 1, "b": 1, "c": 1}, "a:1")]
    assert list(run.groups[0].members) == ["a", "b", "c"]  # as planned, not as heard
    assert run.membership.missing == []


def test_who_does_not_come_is_not_waited_for_for_ever() -> None:
    run = Run()
    assert run.later(MEET_S - BEAT_S, "b", "c") is None
    assert run.later(BEAT_S, "b", "c") == {"b": 1, "c": 1}
    assert (run.groups[0].store, run.membership.missing) == ("b:1", ["a"])


def test_nobody_is_no_group() -> None:
    run = Run()
    assert run.later(3 * MEET_S) is None
    run.say("b")
    assert run.decide() == {"b": 1}


def test_who_left_before_the_first_group_is_not_in_it() -> None:
    run = Run()
    run.say(*NAMES)
    run.say("b", gone=True)
    assert run.later(MEET_S, "a", "c") == {"a": 1, "c": 1}


def test_who_fell_silent_before_the_first_group_is_not_in_it() -> None:
    run = Run()
    run.say("a")
    assert run.later(MEET_S, "b") == {"b": 1}


# ── what makes another one ───────────────────────────────────────────────────────────────────────────────────────


def test_a_group_in_order_stays(run: Run) -> None:
    assert run.later(10 * MEET_S, *NAMES) is None
    assert run.membership.group == run.groups[0]


def test_a_silent_member_is_left_out(run: Run) -> None:
    assert run.later(SILENT_S - BEAT_S, "a", "c") is None
    assert run.later(BEAT_S, "a", "c") == {"a": 1, "c": 1}
    assert (run.groups[-1].generation, run.membership.missing) == (2, ["b"])
    assert run.later(MEET_S, "a", "c") is None


@pytest.mark.parametrize("silent", ["a", "b", "c"])
def test_who_was_silent_is_taken_in_again_behind_all_others(run: Run, silent: str) -> None:
    others = [name for name in NAMES if name != silent]
    run.later(SILENT_S, *others)
    run.say(silent)
    members = run.decide()
    assert members is not None
    assert list(members) == [*others, silent]
    assert run.groups[-1].store == f"{others[0]}:1"


def test_who_says_goodbye_is_left_out_at_once(run: Run) -> None:
    run.say("a", gone=True)
    members = run.decide()
    assert members == {"b": 1, "c": 1}
    assert run.groups[-1].store == "b:1"


def test_a_member_with_a_new_life_is_another_one(run: Run) -> None:
    run.lives["b"] = 2
    run.say("b")
    members = run.decide()
    assert members == {"a": 1, "b": 2, "c": 1}
    assert list(members) == ["a", "b", "c"]  # under its old rank


def test_a_member_that_starts_again_is_left_out_until_it_has_started(run: Run) -> None:
    run.membership.heard("b", 2, None, run.now)
    assert run.decide() == {"a": 1, "c": 1}
    run.lives["b"] = 2
    run.say("b")
    members = run.decide()
    assert members is not None
    assert list(members.items()) == [("a", 1), ("c", 1), ("b", 2)]


def test_a_leader_with_a_new_life_has_the_others_meet_at_its_new_place(run: Run) -> None:
    run.lives["a"] = 2
    run.say("a")
    assert run.decide() == {"a": 2, "b": 1, "c": 1}
    assert run.groups[-1].store == "a:2"


def test_an_old_life_throws_nobody_out(run: Run) -> None:
    """Its heartbeats and its goodbye were on their way when the new one came."""
    run.lives["b"] = 2
    run.say("b")
    assert run.decide() == {"a": 1, "b": 2, "c": 1}
    for gone in (False, True):
        run.say("b", life=1, gone=gone)
        assert run.decide() is None
    run.membership.heard("b", 1, None, run.now)
    assert run.decide() is None


def test_an_old_life_does_not_speak_for_a_silent_new_one(run: Run) -> None:
    run.lives["b"] = 2
    run.say("b")
    run.decide()
    for _ in range(int(SILENT_S / BEAT_S) - 1):
        assert run.later(BEAT_S, "a", "c") is None
        run.say("b", life=1)
    assert run.later(BEAT_S, "a", "c") == {"a": 1, "c": 1}


def test_a_newcomer_comes_last() -> None:
    run = Run()
    run.later(MEET_S, "b", "c")
    run.say("a")
    members = run.decide()
    assert members is not None
    assert list(members) == ["b", "c", "a"]
    assert run.groups[-1].store == "b:1"


def test_ranks_stay_as_they_are_while_members_come_and_go(run: Run) -> None:
    run.say("a", gone=True)
    run.decide()
    run.lives["a"] = 2
    run.say("a")
    run.decide()
    run.say("b", gone=True)
    members = run.decide()
    assert members is not None
    assert list(members.items()) == [("c", 1), ("a", 2)]
    assert [group.generation for group in run.groups] == [1, 2, 3, 4]


def test_all_at_once_is_one_group(run: Run) -> None:
    run.lives |= {"a": 2, "c": 3}
    run.say("a", "c")
    run.say("b", gone=True)
    assert run.decide() == {"a": 2, "c": 3}


def test_everybody_silent_leaves_the_group_as_it_is(run: Run) -> None:
    """The network of the controller is gone, say; whoever is heard first decides then."""
    assert run.later(2 * SILENT_S) is None
    run.say("b")
    assert run.decide() == {"b": 1}


# ── a group that failed somebody ─────────────────────────────────────────────────────────────────────────────────


def test_a_broken_group_of_whom_all_have_been_heard_since_is_formed_anew(run: Run) -> None:
    run.now += 0.1
    run.fail("c")
    assert run.decide() is None
    run.say("a")
    assert run.decide() is None
    run.say("b")
    assert run.decide() == {"a": 1, "b": 1, "c": 1}
    assert run.groups[-1].generation == 2


def test_of_a_broken_group_who_is_not_heard_soon_is_left_out(run: Run) -> None:
    run.now += 0.1
    run.fail("a")
    assert run.later(SUSPECT_S - BEAT_S, "a", "b") is None
    assert run.later(BEAT_S, "a", "b") == {"a": 1, "b": 1}
    assert run.groups[-1].generation == 2


def test_the_suspects_time_begins_with_the_first_who_complains(run: Run) -> None:
    run.now += 0.1
    run.fail("a")
    assert run.later(SUSPECT_S - BEAT_S, "a") is None
    run.fail("b")
    assert run.later(BEAT_S, "a", "b") == {"a": 1, "b": 1}


def test_a_broken_group_whose_missing_member_said_goodbye_waits_for_nobody(run: Run) -> None:
    run.now += 0.1
    run.say("a", "b")
    run.say("c", gone=True)
    run.fail("a")
    run.say("b")
    assert run.decide() == {"a": 1, "b": 1}


def test_a_member_that_comes_back_anew_ends_the_wait(run: Run) -> None:
    run.now += 0.1
    run.fail("a", "b")
    assert run.decide() is None
    run.lives["c"] = 2
    run.say("c")
    assert run.decide() == {"a": 1, "b": 1, "c": 2}


def test_one_failure_makes_one_group(run: Run) -> None:
    """Heartbeats go on telling of it, and those who hear of the new group late tell of it later."""
    run.now += 0.1
    run.fail(*NAMES)
    assert run.decide() is not None
    assert run.later(MEET_S, *NAMES) is None
    run.fail("b")
    run.say("a", "c")
    assert run.decide() is not None
    assert run.groups[-1].generation == 3


def test_who_is_no_member_need_not_be_heard(run: Run) -> None:
    run.later(SILENT_S, "a", "b")
    run.fail("a", "b")
    assert run.decide() == {"a": 1, "b": 1}
    assert run.groups[-1].generation == 3


# ── a new controller ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_controller_takes_the_group_over(run: Run) -> None:
    new = run.after("b")
    assert new.decide() is None
    assert new.membership.group == run.groups[0]
    new.say("a", "c")
    assert new.later(MEET_S, *NAMES) is None
    assert new.membership.missing == []


def test_a_new_controller_takes_the_newest_of_several_groups(run: Run) -> None:
    """Whoever is behind has not heard of it yet."""
    old = run.groups[0]
    run.say("c", gone=True)
    run.decide()
    new = run.after()
    new.membership.heard("a", 1, Replica("a:1", old), new.now)
    new.membership.heard("b", 1, Replica("b:1", run.groups[1]), new.now)
    new.membership.heard("a", 1, Replica("a:1", old), new.now)
    assert new.decide() is None
    assert new.membership.group == run.groups[1]


def test_a_new_controller_gives_members_time_to_be_heard(run: Run) -> None:
    new = run.after("a", "b")
    assert new.later(SILENT_S - BEAT_S, "a", "b") is None
    assert new.later(BEAT_S, "a", "b") == {"a": 1, "b": 1}
    assert new.groups[-1].generation == 2


def test_so_does_one_that_hears_nobody_for_long(run: Run) -> None:
    new = run.after()
    assert new.later(3 * MEET_S) is None
    new.say("a")
    assert new.decide() is None
    assert new.later(SILENT_S - BEAT_S, "a", "b") is None
    new.say("c")
    assert new.later(MEET_S, *NAMES) is None


def test_a_controller_that_formed_a_group_knows_who_is_there(run: Run) -> None:
    new = run.after(*NAMES)
    new.lives["b"] = 2
    new.say("b")
    assert new.decide() is not None
    new.say("c", gone=True)
    assert new.decide() == {"a": 1, "b": 2}


def test_a_new_controller_goes_on_from_the_groups_number(run: Run) -> None:
    run.say("a", gone=True)
    run.decide()
    new = run.after("b", "c")
    new.lives["a"] = 2
    new.say("a")
    members = new.decide()
    assert members is not None
    assert list(members.items()) == [("b", 1), ("c", 1), ("a", 2)]
    assert new.groups[-1].generation == 3


def test_a_new_controller_hears_of_a_failure(run: Run) -> None:
    run.fail("a", "b")
    new = run.after("a")
    assert new.decide() is None  # the others may have been heard by nobody yet
    new.now += 0.1
    new.say("b")
    assert new.decide() is None
    new.say("c")
    assert new.decide() == {"a": 1, "b": 1, "c": 1}
    assert new.groups[-1].generation == 2


def test_a_failure_that_a_newer_group_has_mended_counts_no_more(run: Run) -> None:
    old = run.groups[0]
    run.fail("a", "b", "c")
    assert run.decide() is not None
    new = run.after()
    new.membership.heard("b", 1, Replica("b:1", old, broken=1), new.now)  # has not heard of the newer one yet
    new.say("a", "c", "b")
    assert new.decide() is None
    assert new.later(MEET_S, *NAMES) is None
    assert new.membership.group == run.groups[1]


def test_a_failed_group_that_the_controller_never_heard_of_counts(run: Run) -> None:
    """The one before it died as soon as it had published it, and nobody came into it: all still name the one before
    that, and take no group of that number again."""
    run.broken = dict.fromkeys(NAMES, 2)
    new = run.after(*NAMES)
    assert new.decide() == {"a": 1, "b": 1, "c": 1}
    assert new.groups[-1].generation == 3
    assert new.later(MEET_S, *NAMES) is None


def test_a_failed_first_group_that_the_controller_never_heard_of_counts() -> None:
    run = Run()
    run.broken = dict.fromkeys(NAMES, 1)
    run.say(*NAMES)
    assert run.decide() == {"a": 1, "b": 1, "c": 1}
    assert run.groups[-1].generation == 2
    assert run.later(MEET_S, *NAMES) is None


# ── random lives ─────────────────────────────────────────────────────────────────────────────────────────────────

TICK_S = 0.1
DEADLINE_S = 3.0
SETTLED_S = MEET_S + 2 * SILENT_S + 2 * DEADLINE_S
"""Until whoever lives is in one group and stays there, once nothing happens any more: the longest wait for a first
group, then the silence of one who died last, and what formed meanwhile may have failed."""


@dataclass
class Learner:
    """One name, over its lives: what a replica learner does of all this, and no more."""

    name: str
    life: int = 1
    lives: bool = True
    speaks: bool = True
    """Its heartbeats arrive, and their answers too; members of its group reach it in any case."""
    group: Group | None = None
    tried: Group | None = None
    """That it last came to; it comes to no older one."""
    broken: int = 0
    since: float = 0.0
    """When it began to wait in a group that somebody may not come to."""
    beats_at: float = 0.0

    @property
    def replica(self) -> Replica:
        return Replica(f"{self.name}:{self.life}", self.group, self.broken)

    def reborn(self) -> None:
        self.life += 1
        self.lives = self.speaks = True
        self.group = self.tried = None
        self.broken = 0

    def hears(self, group: Group | None, now: float) -> None:
        known = self.tried.generation if self.tried else 0
        if group is not None and group.generation > known and group.members.get(self.name) == self.life:
            self.tried, self.since = group, now

    def trains(self, learners: dict[str, Learner], now: float) -> None:
        """Whether the others come to what it has come to."""
        group = self.tried
        if group is None or self.broken == group.generation:
            return
        others = [learners[name] for name, life in group.members.items() if learners[name].life == life]
        left = len(others) < len(group.members) or any(not other.lives for other in others)
        left = left or any(other.broken >= group.generation or other.tried != group for other in others)
        if not left:
            self.group, self.since = group, now
        elif now - self.since >= DEADLINE_S:
            self.broken = group.generation


@dataclass
class World:
    """Learners and a controller in time; what happens is drawn from a seed."""

    seed: int
    now: float = 0.0
    gone: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        names = [f"learner-{n}" for n in range(self.random.randint(1, 4))]
        self.learners = {name: Learner(name, lives=self.random.random() < 0.8) for name in names}
        self.membership = Membership(names, self.now)
        self.generation = 0

    def happens(self) -> None:
        learner = self.random.choice(list(self.learners.values()))
        match self.random.choice(["dies", "leaves", "comes", "falls silent", "speaks", "old life", "controller"]):
            case "dies":
                learner.lives = False
            case "leaves" if learner.lives:
                learner.lives = False
                self.gone.add((learner.name, learner.life))
                if learner.speaks:
                    self.membership.heard(learner.name, learner.life, learner.replica, self.now, gone=True)
            case "comes":
                learner.reborn()
                if self.random.random() < 0.5:  # it starts
                    self.membership.heard(learner.name, learner.life, None, self.now)
            case "falls silent":
                learner.speaks = False
            case "speaks":
                learner.speaks = True
            case "old life" if learner.life > 1 and learner.lives and learner.speaks:
                self.beats(learner)
                stale = Replica(f"{learner.name}:{learner.life - 1}", self.membership.group, self.random.randint(0, 9))
                self.membership.heard(learner.name, learner.life - 1, stale, self.now)
            case "controller":
                self.membership = Membership(list(self.learners), self.now)
                self.generation = 0

    def beats(self, learner: Learner) -> None:
        learner.beats_at = self.now + BEAT_S
        self.membership.heard(learner.name, learner.life, learner.replica, self.now)
        known = self.membership.group.generation if self.membership.group else 0
        self.generation = max(self.generation, known)
        learner.hears(self.membership.group, self.now)

    def tick(self) -> None:
        self.now += TICK_S
        for learner in self.learners.values():
            learner.trains(self.learners, self.now)
            if learner.lives and learner.speaks and self.now >= learner.beats_at:
                self.beats(learner)
        before = self.membership.group
        if self.membership.decide(self.now):
            self.decided(before)

    def decided(self, before: Group | None) -> None:
        group = self.membership.group
        assert group is not None
        assert group.generation > self.generation, "a generation came again"
        self.generation = group.generation
        assert group.members, "nobody is in it"
        assert not self.gone & set(group.members.items()), "who is in it said goodbye"
        leader, life = next(iter(group.members.items()))
        assert group.store == f"{leader}:{life}"
        old = list(before.members) if before else []
        stayed = [name for name in group.members if name in old]
        assert stayed == [name for name in old if name in stayed], "ranks changed"
        assert list(group.members)[: len(stayed)] == stayed, "a newcomer came first"
        assert not self.membership.decide(self.now), "decided twice"
        for learner in self.learners.values():
            if learner.lives and learner.speaks and self.random.random() < 0.9:  # else the next heartbeat tells
                learner.hears(group, self.now)

    def settled(self) -> bool:
        """Whether all that live are in one group, which the controller knows."""
        living = {name: learner.life for name, learner in self.learners.items() if learner.lives}
        group = self.membership.group
        if group is None:
            return not living
        return group.members == living and all(self.learners[name].group == group for name in living)


@pytest.mark.parametrize("seed", range(60))
def test_random_lives_end_in_one_group(seed: int) -> None:
    world = World(seed)
    for _ in range(world.random.randint(0, 12)):
        for _ in range(int(world.random.expovariate(1 / 3.0) / TICK_S)):
            world.tick()
        world.happens()
    for learner in world.learners.values():
        learner.speaks = True
    if not any(learner.lives for learner in world.learners.values()):
        next(iter(world.learners.values())).reborn()
    for _ in range(int(SETTLED_S / TICK_S)):
        world.tick()
    assert world.settled(), (world.membership.group, world.learners)
    generation = world.generation
    for _ in range(int(2 * MEET_S / TICK_S)):
        world.tick()
    assert world.settled()
    assert world.generation == generation, "a group in order was replaced"
