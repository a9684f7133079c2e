"""Checkpoints and rank that the tests of the GPU path share: a start takes longer than most tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import works
from tests.workers.stepping import Stepped


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return works.checkpoint(tmp_path_factory.mktemp("gpu") / "qwen3")


@pytest.fixture(scope="package")
def shared(model: Path) -> Iterator[Stepped]:
    """float32, blocks of 16, graphs; 16 rows. Use `rank`, which leaves it empty."""
    stepped = works.loop(model)
    yield stepped
    stepped.close()


@pytest.fixture
def rank(shared: Stepped) -> Iterator[Stepped]:
    yield shared
    shared.drop_all()
