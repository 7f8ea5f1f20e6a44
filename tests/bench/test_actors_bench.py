"""Eight processes that play actors: they join, send, and leave, and nothing is lost on the way."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import actors


def test_eight_actors_come_and_go_and_the_books_close() -> None:
    rows = list(actors.measure([8], seconds=1))
    assert {row.section for row in rows} == {"8 actors"}
    found = {row.name: {name: figure.median for name, figure in row.figures.items()} for row in rows}
    assert list(found) == ["controller-0", "learner-0", "actors"]
    for service in actors.SERVICES:
        assert found[service]["an actor"] == pytest.approx(found[service]["CPU"] / 8)
    of_all = found["actors"]
    assert (of_all["lost"], of_all["open books"]) == (0, 0)
    assert of_all["unrolls"] > 8
    assert of_all["gone"] < 60
    assert 0 < of_all["memory each"] < found["controller-0"]["memory"]
