"""What replicas tell one another, over real links: promises, batches' rows, and digests of what they have become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rig import PATIENCE_S, Rig, epoch, eventually, rig_of

from ddrl_bus.errors import DivergedError
from ddrl_bus.messages import Group
from ddrl_bus.nodes.base import node_class
from ddrl_bus.nodes.votes import REMEMBERED, Votes

NAMES = ("learner-0", "learner-1", "learner-2")


class Voters:
    """Votes of several learners that do nothing else, and hear one another."""

    def __init__(self, rig: Rig, count: int) -> None:
        self.rig, self.names = rig, NAMES[:count]
        self.votes: dict[str, Votes] = {}
        self.hearing: dict[str, asyncio.Task[None]] = {}
        self.lives = dict.fromkeys(self.names, 0)
        self.group = Group(0, {}, "")
        for name in self.names:
            self.live(name)

    def live(self, name: str) -> Votes:
        """A new life of this learner."""
        self.die(name)
        self.lives[name] += 1
        plan, life = self.rig.plan, epoch(self.lives[name])
        node = node_class(plan, name)(plan, name, self.rig.folder, life, self.rig.hub, inline=True)
        self.rig.buses.append(node.bus)
        self.votes[name] = Votes(node)
        self.hearing[name] = asyncio.create_task(self.votes[name].listen(), name=f"{name} listens")
        return self.votes[name]

    def die(self, name: str) -> None:
        if name in self.votes:
            self.hearing[name].cancel()
            self.votes[name].node.bus.close()

    def form(self, generation: int = 1, *names: str) -> Group:
        """Put them, or all, into a group."""
        members = {name: epoch(self.lives[name]) for name in names or self.names}
        self.group = Group(generation, members, "here:1")
        for name in members:
            self.votes[name].begin(self.group)
        return self.group

    def say(self, index: int, ready: int, rows: int = 40, *, held: bool = False) -> None:
        self.votes[NAMES[index]].say(ready, rows, held=held)

    def __getitem__(self, index: int) -> Votes:
        return self.votes[NAMES[index]]

    async def heard(self) -> None:
        """All have heard what each said last."""

        def all_have() -> bool:
            said = {name: (epoch(self.lives[name]), votes.mine) for name, votes in self.votes.items()}
            return all(
                votes._heard.get(name) == said[name]
                for votes in self.votes.values()
                for name in self.names
                if name != votes.node.name and self.votes[name]._said
            )

        await eventually(lambda: all_have() or any(task.done() for task in self.hearing.values()))
        for task in self.hearing.values():
            if task.done():
                task.result()

    async def close(self) -> None:
        for task in self.hearing.values():
            task.cancel()
        await asyncio.gather(*self.hearing.values(), return_exceptions=True)


Hear = Callable[..., AbstractAsyncContextManager[Voters]]


@pytest.fixture
def voters(tmp_path: Path) -> Hear:
    @asynccontextmanager
    async def made(count: int = 2, *, in_process: bool = True) -> AsyncIterator[Voters]:
        async with rig_of(tmp_path, f"nodes.learner.count={count}") as rig:
            rig.plan = replace(rig.plan, in_process=in_process, ipc_dir=tmp_path)
            voters = Voters(rig, count)
            try:
                yield voters
            finally:
                await voters.close()

    return made


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_process", [True, False], ids=["memory", "ipc"])
async def test_an_update_is_ready_once_all_have_promised_it(voters: Hear, in_process: bool) -> None:
    async with voters(3, in_process=in_process) as v:
        v.form()
        assert not v[0].ready(1)
        v.say(0, 1)
        v.say(1, 2)
        await v.heard()
        assert [v[n].ready(1) for n in range(3)] == [False] * 3
        assert [v[n].done(1) for n in range(3)] == [2] * 3
        v.say(2, 1)
        await v.heard()
        assert [v[n].ready(1) for n in range(3)] == [True] * 3
        assert [v[n].ready(2) for n in range(3)] == [False] * 3
        assert [(v[0].done(update)) for update in (0, 1, 2, 3)] == [3, 3, 1, 0]


async def test_one_alone_waits_for_nobody(voters: Hear) -> None:
    async with voters() as v:
        v.form(1, "learner-0")
        assert not v[0].ready(1)
        v.say(0, 1, 7)
        assert v[0].ready(1)
        assert (v[0].done(1), v[0].rows()) == (1, 7)


async def test_rows_are_those_of_everybodys_batches(voters: Hear) -> None:
    async with voters(3) as v:
        v.form()
        for n, rows in enumerate((40, 17, 8)):
            v.say(n, 1, rows)
        await v.heard()
        assert [v[n].rows() for n in range(3)] == [65] * 3
        v.form(2, "learner-0", "learner-2")
        v.say(0, 1, 40)
        v.say(2, 1, 8)
        await v.heard()
        assert v[0].rows() == v[2].rows() == 48


async def test_it_is_quiet_once_nobody_will_make_the_update(voters: Hear) -> None:
    """All hold still; and the update that they still promised together is one that will be made."""
    async with voters() as v:
        v.form()
        assert not v[0].quiet(1)
        v.say(0, 1, held=True)
        v.say(1, 1)
        await v.heard()
        assert not v[0].quiet(1)
        assert not v[0].quiet(2)
        v.say(1, 1, held=True)
        await v.heard()
        assert [v[n].quiet(1) for n in range(2)] == [False] * 2
        assert [v[n].quiet(2) for n in range(2)] == [True] * 2
        v.say(0, 2)
        await v.heard()
        assert not v[1].quiet(2)


async def test_who_hears_late_still_hears_the_newest(voters: Hear) -> None:
    async with voters() as v:
        v.form()
        for ready in range(1, 9):
            v.say(0, ready)
        v.say(1, 8)
        await v.heard()
        assert v[1].ready(8)
        v.live("learner-1")
        await v.heard()
        assert v[1]._heard["learner-0"][1].ready == 8


async def test_what_is_no_news_is_not_said(voters: Hear) -> None:
    async with voters() as v:
        v.form()
        for _ in range(5):
            v.say(0, 1)
        assert v[0].node.ledger.snapshot()["sync/messages_out"] == 1
        v.say(0, 1, held=True)
        assert v[0].node.ledger.snapshot()["sync/messages_out"] == 2


# ── whose votes count ────────────────────────────────────────────────────────────────────────────────────────────


async def test_votes_of_another_generation_do_not_count(voters: Hear) -> None:
    """Our own neither; and those who are ahead count once we come after them."""
    async with voters() as v:
        v.form(1)
        v.say(0, 3, 40, held=True)
        v.say(1, 3, 40, held=True)
        await v.heard()
        assert v[0].ready(3)
        group = Group(2, v.group.members, "here:1")
        v[0].begin(group)
        assert (v[0].ready(1), v[0].done(1), v[0].rows(), v[0].quiet(9)) == (False, 0, 0, False)
        v.say(0, 3)
        await v.heard()
        assert (v[0].done(1), v[1].done(1)) == (1, 1)
        assert not v[1].ready(1)
        v[1].begin(group)
        v.say(1, 3)
        await v.heard()
        assert v[0].ready(3)
        assert v[1].ready(3)


async def test_votes_of_another_life_do_not_count(voters: Hear) -> None:
    async with voters() as v:
        v.form(1)
        v.say(0, 1)
        v.say(1, 5)
        await v.heard()
        assert v[0].ready(1)
        v.live("learner-1")  # which the group does not know of, whatever it says
        v[1].begin(v.group)
        v.say(1, 5)
        await v.heard()
        assert not v[0].ready(1)
        v.form(2)
        v.say(0, 1)
        v.say(1, 1)
        await v.heard()
        assert v[0].ready(1)


async def test_votes_of_a_stranger_do_not_count(voters: Hear) -> None:
    async with voters(3) as v:
        v.form(1)
        v.form(2, "learner-0", "learner-1")
        v.say(2, 9, 1000)
        v.say(0, 1, 1)
        v.say(1, 1, 1)
        await v.heard()
        assert (v[0].ready(1), v[0].done(1), v[0].rows()) == (True, 2, 2)


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_equal_digests_are_fine(voters: Hear) -> None:
    async with voters(3) as v:
        v.form()
        for update in range(1, 4 * REMEMBERED):
            for n in range(3):
                v[n].made(update, 7 * update)
                v.say(n, update + 1)
            await v.heard()
            assert all(v[n].ready(update + 1) for n in range(3))
            assert v[0].mine.digests == [(u, 7 * u) for u in range(max(1, update - REMEMBERED + 1), update + 1)]


async def test_what_another_has_made_of_the_update_before_the_last_is_waited_for(voters: Hear) -> None:
    """Not what it made of the last one: it may go on meanwhile."""
    async with voters() as v:
        v.form()
        for update in (1, 2, 3):
            v[0].made(update, update)
        v[1].made(1, 1)
        v.say(0, 9)
        v.say(1, 9)
        await v.heard()
        assert [v[0].ready(update) for update in (3, 4)] == [True, False]
        v[1].made(2, 2)
        v.say(1, 9)
        await v.heard()
        assert [v[0].ready(update) for update in (3, 4, 5)] == [True, True, False]


WORDS = (
    r"^learner-0: parameters of digest 0000000000000007 after update 3, expected 0000000000000008, "
    "which learner-1 has: replicas must stay equal$"
)


async def test_other_digests_are_told_when_theirs_is_later(voters: Hear) -> None:
    async with voters() as v:
        v.form()
        v[0].made(3, 7)
        v[1].made(3, 8)
        v.say(1, 4)
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.timeout(PATIENCE_S):
                await v.hearing["learner-0"]
        assert caught.group_contains(DivergedError, match=WORDS)
        assert not v.hearing["learner-1"].done()


async def test_other_digests_are_told_when_ours_is_later(voters: Hear) -> None:
    async with voters() as v:
        v.form()
        v[1].made(2, 5)
        v[1].made(3, 8)
        v.say(1, 4)
        await v.heard()
        v[0].made(2, 5)
        with pytest.raises(DivergedError, match=WORDS):
            v[0].made(3, 7)


async def test_one_of_three_differs(voters: Hear) -> None:
    async with voters(3) as v:
        v.form()
        for n in (1, 2):
            v[n].made(1, 4 + n)
            v.say(n, 2)
        failed = [v.hearing[name] for name in ("learner-1", "learner-2")]
        await asyncio.wait(failed, timeout=PATIENCE_S)
        words = [str(task.exception().exceptions[0]) for task in failed]  # type: ignore[union-attr]
        assert ["learner-2 has" in words[0], "learner-1 has" in words[1]] == [True, True]
        assert not v.hearing["learner-0"].done()
        with pytest.raises(DivergedError, match="which learner-1 has"):
            v[0].made(1, 6)


async def test_digests_of_another_generation_or_life_are_not_compared(voters: Hear) -> None:
    """Who broke off an update may have made another thing of it than the group that went on."""
    async with voters() as v:
        v.form(1)
        v[1].made(1, 5)
        v.say(1, 2)
        await v.heard()
        v.form(2)
        v[0].made(1, 6)
        v.live("learner-1")
        v[1].begin(v.group)
        v[1].made(1, 7)
        v.say(1, 2)
        await v.heard()
        v.form(3)
        v.say(1, 2)  # without what it made in an earlier one
        await v.heard()
        assert v[1].mine.digests == []
        v[0].made(1, 6)
        v[1].made(1, 8)
        v.say(1, 2)
        with pytest.raises(ExceptionGroup):
            await v.hearing["learner-0"]
