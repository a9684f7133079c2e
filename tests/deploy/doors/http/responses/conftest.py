"""Models that say what a test wants, for the tests of `/v1/responses`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.doors.http.conftest import Host
from tests.deploy.doors.http.responses.responding import Model, Saying, make_saying


@pytest.fixture
def saying(host: Host, tmp_path: Path) -> Iterator[Saying]:
    """Makes models that say a text, whatever they are asked."""
    opened: list[Model] = []
    yield make_saying(host, tmp_path, opened)
    for each in opened:
        each.engine.released.set()
