"""What is installed is measured in turn with ours, and what is not says so."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ddrl_bus.bench import peers
from ddrl_bus.bench.peers import PEERS, Peer, Task

TASKS = (Task("stream", 16 << 10, 20), Task("round trip", 64, 10))


@pytest.mark.parametrize("peer", [p for p in PEERS if p.module != "ray"], ids=lambda peer: peer.name)
def test_rows_of_a_peer(peer: Peer) -> None:
    if peer.missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {peer.missing}")
    rows = list(peers.measure([peer], TASKS, repeats=1))
    assert [row.name for row in rows] == [f"{peer.name}, stream of 16 KB", f"{peer.name}, round trip of 64 B"]
    for row in rows:
        values = {name: figure.median for name, figure in row.figures.items()}
        assert min(values.values()) > 0
        assert values["ahead"] == pytest.approx(values["peer"] / values["ours"])
        assert row.figures["ahead"].kind.better == "more"
    assert rows[0].figures["peer rate"].median == pytest.approx((16 << 10) / rows[0].figures["peer"].median)


@pytest.mark.parametrize("what", ["module", "program"])
def test_what_is_not_installed(what: str) -> None:
    rows = list(peers.measure([replace(PEERS[0], **{what: "no_such_thing"})], TASKS))
    words = {"module": "not installed: the module no_such_thing", "program": "not installed: no_such_thing"}[what]
    assert [(row.note, dict(row.figures)) for row in rows] == [(words, {})] * 2
