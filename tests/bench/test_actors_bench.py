"""Forty processes that play actors: they join, send, and leave, and nothing is lost on the way."""

from __future__ import annotations

from ddrl_bus.bench import actors


def test_forty_actors_come_and_go_and_the_books_close() -> None:
    (row,) = actors.measure([40], seconds=1)
    assert row.actors == 40
    assert row.closed
    assert row.lost == 0
    assert row.produced > 40
    assert row.stop_s < 15
    assert 0 < row.actor_mib < row.controller_mib
    assert len("\n".join(actors.rows_as_text(iter([row]))).splitlines()) == 3
