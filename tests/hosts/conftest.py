from collections.abc import Iterator

import pytest
from cables import Cable, plugged_in


@pytest.fixture
def cable() -> Iterator[Cable]:
    with plugged_in() as cable:
        yield cable
