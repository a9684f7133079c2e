"""What makes another version of what is served, and what does not."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineConfig
from cluster.fleet import estate
from cluster.fleet.estate import version_of
from scheduler.config.core import QueueBounds

TINY = Path(__file__).parents[3] / "examples" / "tiny"
BASE = EngineConfig(model=str(TINY), groups=2)
VERSION = version_of(BASE, QueueBounds(), 1)


@pytest.mark.parametrize(
    "change",
    [{"groups": 5}, {"max_groups": 9}, {"start_timeout_s": 7.0}, {"adoption_timeout_s": 7.0}, {"scale_wait_s": 7.0}],
    ids=lambda change: next(iter(change)),
)
def test_how_many_groups_there_are_and_how_long_one_waits_is_none(change: dict[str, Any]) -> None:
    assert version_of(replace(BASE, **change), QueueBounds(), 1) == VERSION


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 64}, {"tensor_parallel_size": 2}, {"kv_memory": 1 << 30}, {"queue_age_s": 7.0}, {"groups": 1},
        {"kv_dtype": "fp8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_scheduler_or_ranks_are_told_is_one(change: dict[str, Any]) -> None:
    """One group alone opens no port for others."""
    assert version_of(replace(BASE, **change), QueueBounds(), 1) != VERSION


def test_so_are_the_queues_bounds_and_threads() -> None:
    assert version_of(BASE, QueueBounds(max_queued_requests=7), 1) != VERSION
    assert version_of(BASE, QueueBounds(), 2) != VERSION


def test_another_checkpoint_at_the_same_place_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = replace(BASE, model=str(folder))
    before = version_of(config, QueueBounds(), 1)
    assert version_of(config, QueueBounds(), 1) == before
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert version_of(config, QueueBounds(), 1) != before


def test_so_is_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estate, "_code", lambda: ["another"])
    assert version_of(BASE, QueueBounds(), 1) != VERSION
