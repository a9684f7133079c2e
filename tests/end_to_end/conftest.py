"""Checkpoints of every architecture, their references, and the account of near ties that pytest's summary prints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import NOTES
from tests.end_to_end.engines import ARCHITECTURES, LLAMA, QWEN2
from tests.end_to_end.losses.faults import BreakRanks, breaker
from tests.end_to_end.reference import Ledger, Reference
from tests.shared.checkpoints import LLAMA3_ROPE, make_checkpoint

_LEDGER = Ledger()


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    return _LEDGER


def pytest_sessionfinish(session: pytest.Session) -> None:
    """For pytest's summary, which another process prints where there are several."""
    if not _LEDGER.compared:
        return
    counts = f"end to end: {_LEDGER.compared} sequences compared with transformers, {len(_LEDGER.exempt)} exempt as near ties"
    notes = [counts, *(f"  {line}" for line in _LEDGER.exempt)]
    output: dict[str, list[str]] | None = getattr(session.config, "workeroutput", None)
    if output is None:
        session.config.stash[NOTES] = notes
    else:
        output["notes"] = notes


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from more, and ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By architecture: Llama with its own RoPE scaling, Qwen2 with tied weights, each from another seed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    extra: dict[str, dict[str, Any]] = {LLAMA: {"rope_parameters": LLAMA3_ROPE}}
    return {
        name: make_checkpoint(folder / name, name, seed=seed, tied=name == QWEN2, **extra.get(name, {}))
        for seed, name in enumerate(ARCHITECTURES)
    }


@pytest.fixture(scope="session")
def references(checkpoints: dict[str, Path]) -> dict[str, Reference]:
    return {name: Reference(path) for name, path in checkpoints.items()}


@pytest.fixture
def break_ranks(monkeypatch: pytest.MonkeyPatch) -> BreakRanks:
    return breaker(monkeypatch)
