"""Puts this folder on `sys.path`, for the helpers that several test folders share, and long tests first."""

from __future__ import annotations

import pytest

LONG = {"slow", "hosts"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever is done takes from the end of what others have left to do: there lie the short ones."""
    items.sort(key=lambda item: LONG.isdisjoint(mark.name for mark in item.iter_markers()))
