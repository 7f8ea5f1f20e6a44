"""What the serving host may be told, and what is no address."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import far
from ddrl_bus.errors import UsageError


@pytest.mark.parametrize("address", ["tcp://10.0.0.1", "10.0.0.1:7070", "tcp://:7070", "tcp://a:0", "tcp://a:65533"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="expected tcp://HOST:PORT"):
        far.port_of(address)


def test_an_address() -> None:
    assert far.port_of("tcp://[::1]:7070") == ("[::1]", 7070)


@pytest.mark.parametrize("value", [0, 65, -1, 2.0, "2", True, None])
def test_numbers_from_afar_are_bounded(value: object) -> None:
    with pytest.raises(ValueError, match="expected a number from 1 to 64"):
        far._number(value, far.MOST_PEERS)
