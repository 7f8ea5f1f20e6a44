"""The request cores: who ends how, who runs what."""

from __future__ import annotations

import pytest

from ddrl_bus.transport.sessions import request
from ddrl_bus.transport.sessions.request import CACHE, REPEAT_S, Due, RequestClient, RequestServer

C = ("actor-0", 1)


def client(*timeouts: float) -> RequestClient[str]:
    core: RequestClient[str] = RequestClient()
    for timeout in timeouts:
        number = core.next_id()
        core.open(number, f"request {number}", 0.0, timeout)
    return core


def test_numbers_grow_and_are_never_used_again() -> None:
    core = client(1.0, 1.0)
    core.abandon(2)
    assert core.next_id() == 3


def test_an_answer_ends_a_request_once() -> None:
    core = client(5.0, 5.0)
    assert core.open_requests == (1, 2)
    assert core.answered(1, 0.0)
    assert not core.answered(1, 0.0)  # a duplicate
    assert not core.answered(99, 0.0)  # unsolicited
    assert core.late == 2
    assert core.open_requests == (2,)


def test_the_deadline_ends_it_otherwise() -> None:
    core = client(0.5, 5.0)
    assert core.poll(0.49) == Due((), ())
    assert core.poll(0.5) == Due((), (1,))
    assert core.poll(0.6) == Due((), ())
    assert not core.answered(1, 0.0)
    assert core.late == 1


def test_unanswered_requests_are_repeated_until_the_deadline() -> None:
    core = client(2.5 * REPEAT_S)
    said = [core.poll(t * REPEAT_S) for t in (0.9, 1.0, 1.5, 2.0, 2.5, 3.0)]
    assert [due.again for due in said] == [(), ("request 1",), (), ("request 1",), (), ()]
    assert [due.expired for due in said] == [(), (), (), (), (1,), ()]


def repeated(core: RequestClient[str], until: float, tick: float = 0.5) -> list[float]:
    """When anything is sent again."""
    times = [n * tick for n in range(1, int(until / tick) + 1)]
    return [now for now in times if core.poll(now).again]


def test_repetitions_are_ever_rarer() -> None:
    assert repeated(client(99.0), 40.0) == [1.0, 2.0, 4.0, 8.0, 16.0, 26.0, 36.0]


def test_where_answers_take_long_the_next_one_is_waited_for() -> None:
    core = client(99.0)
    assert core.answered(core.next_id() - 1, 3.0)
    core.open(3, "request 3", 4.0, 99.0)
    assert repeated(core, 20.0) == [10.0, 16.0]
    assert core.answered(3, 20.0)
    core.open(4, "request 4", 20.0, 8.0)  # it is repeated before its deadline in any case
    assert [now for now in (21.5, 22.0, 23.5, 24.0) if core.poll(now).again] == [22.0, 24.0]
    assert core.answered(4, 24.1)
    core.open(5, "request 5", 30.0, 99.0)
    assert core.answered(5, 30.1)
    core.open(6, "request 6", 31.0, 99.0)
    assert [now for now in (31.9, 32.0) if core.poll(now).again] == [32.0]


def test_what_others_overtook_is_lost_and_repeated_soon() -> None:
    core = client(99.0, 99.0)
    assert repeated(core, 16.0) == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert core.answered(2, 17.0)
    assert core.poll(17.5).again == ()
    assert core.poll(18.0).again == ("request 1",)


def test_the_abandoned_is_neither_repeated_nor_expired() -> None:
    core = client(1.0)
    core.abandon(1)
    core.abandon(1)
    assert core.poll(9.0) == Due((), ())
    assert not core.answered(1, 0.0)


def test_each_number_runs_once_and_its_answer_is_kept() -> None:
    core: RequestServer[str] = RequestServer()
    assert core.arrived(*C, 1) == "new"
    assert core.arrived(*C, 1) == "running"
    core.answer(*C, 1, "yes")
    assert core.arrived(*C, 1) == ("yes",)
    assert core.arrived("actor-1", 1, 1) == "new"


def test_lives_of_a_client_are_apart_and_the_older_is_fenced() -> None:
    core: RequestServer[str] = RequestServer()
    core.arrived(*C, 1)
    assert core.arrived("actor-0", 2, 1) == "new"
    core.answer(*C, 1, "for the dead")
    assert core.arrived("actor-0", 2, 1) == "running"
    assert core.arrived(*C, 1) == "fenced"
    assert core.arrived(*C, 2) == "fenced"


def test_what_left_the_cache_never_runs_again() -> None:
    core: RequestServer[str] = RequestServer()
    for number in range(1, CACHE + 3):
        assert core.arrived(*C, number) == "new"
        core.answer(*C, number, f"answer {number}")
    assert [core.arrived(*C, n) for n in (1, 2, 3, 4)] == ["old", "old", ("answer 3",), ("answer 4",)]


def test_an_answer_asked_for_again_stays() -> None:
    core: RequestServer[str] = RequestServer()
    for number in range(1, 3 * CACHE):
        core.arrived(*C, number)
        core.answer(*C, number, f"answer {number}")
        assert core.arrived(*C, 1) == ("answer 1",)  # its replies get lost, over and over


def test_the_cache_is_bounded_while_an_old_request_runs_on() -> None:
    core: RequestServer[str] = RequestServer()
    assert core.arrived(*C, 1) == "new"
    for number in range(2, 10 * CACHE):
        core.arrived(*C, number)
        core.answer(*C, number, "done")
    assert len(core._peers["actor-0"].answers) == CACHE
    assert core.arrived(*C, 1) == "running"
    core.answer(*C, 1, "at last")
    assert core.arrived(*C, 1) == ("at last",)


def test_an_answer_to_nobody_is_dropped() -> None:
    core: RequestServer[str] = RequestServer()
    core.answer("stranger", 1, 1, "hello?")
    assert core.arrived("stranger", 1, 1) == "new"


def test_a_client_names_the_oldest_request_that_it_waits_for() -> None:
    core = client(5.0, 5.0, 5.0)
    assert core.oldest == 1
    core.answered(2, 0.0)
    assert core.oldest == 1
    core.abandon(1)
    assert core.oldest == 3
    core.answered(3, 0.0)
    assert core.oldest == 3  # nothing is waited for
    assert core.next_id() == core.oldest == 4


def test_what_the_client_waits_for_no_more_is_forgotten() -> None:
    core: RequestServer[str] = RequestServer()
    for number in (1, 2, 3):
        core.arrived(*C, number)
    core.answer(*C, 1, "first")
    core.answer(*C, 3, "third")
    assert core.arrived(*C, 4, oldest=3) == "new"
    assert [core.arrived(*C, n) for n in (1, 2, 3)] == ["old", "old", ("third",)]
    core.answer(*C, 2, "too late")
    assert core.arrived(*C, 2) == "old"
    assert core.arrived(*C, 1, oldest=1) == "old"  # what was said before comes late


def test_nobody_waits_for_what_was_not_asked() -> None:
    core: RequestServer[str] = RequestServer()
    assert core.arrived(*C, 1, oldest=1000) == "new"
    assert core.arrived(*C, 2) == "new"


def test_one_answer_is_kept_of_a_client_that_asks_one_by_one() -> None:
    core: RequestServer[str] = RequestServer()
    for number in range(1, 100):
        assert core.arrived(*C, number, oldest=number) == "new"
        core.answer(*C, number, "done")
        assert len(core._peers["actor-0"].answers) == 1


def test_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has been silent for longest is forgotten."""
    monkeypatch.setattr(request, "MAX_CLIENTS", 3)
    core: RequestServer[str] = RequestServer()
    for name in ("a", "b", "c", "a", "d"):
        core.arrived(name, 1, 1)
    assert list(core._peers) == ["c", "a", "d"]
    core.answer("b", 1, 1, "who asked?")
    assert core.arrived("a", 1, 1) == "running"
