"""Puts this folder on `sys.path`, for the helpers that several test folders share, and long tests first."""

from __future__ import annotations

import os

import pytest

LONG = {"slow", "hosts"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of pytest-xdist's workers gets an equal run of `items`, and whoever is done takes from the end of another's:
    short tests, if each begins with its share of the long ones."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if not LONG.isdisjoint(mark.name for mark in item.iter_markers())]
    short = [item for item in items if LONG.isdisjoint(mark.name for mark in item.iter_markers())]
    bounds = [len(short) * n // workers for n in range(workers + 1)]
    items[:] = [item for n in range(workers) for item in (*long[n::workers], *short[bounds[n] : bounds[n + 1]])]
