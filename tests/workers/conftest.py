"""Kernels are interpreted where there is no GPU: quickly."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.workers.interpreter import quick_interpreter


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers whatever has run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quickly() -> Iterator[None]:
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    with quick_interpreter():
        yield
