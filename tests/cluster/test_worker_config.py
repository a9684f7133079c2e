"""What the user asked for, as each worker is told."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineConfig
from cluster.worker_config import resolve

TINY = str(Path(__file__).parents[2] / "examples" / "tiny")


@pytest.mark.parametrize(
    ("options", "transfers"),
    [
        ({}, False),
        ({"groups": 2}, True),
        ({"max_groups": 2}, True),
        ({"groups": 2, "prefix_fetch": False}, False),
        ({"groups": 2, "enable_prefix_caching": False}, False),
    ],
)
def test_ranks_open_a_port_for_others_only_where_there_can_be_others(options: dict[str, Any], transfers: bool) -> None:
    core, worker = resolve(EngineConfig(TINY, **options), "cpu", 1, 1)
    assert worker.transfers is transfers
    assert core.prefix_fetch is transfers


def test_host_memory_is_what_was_asked_for() -> None:
    assert resolve(EngineConfig(TINY), "cpu", 1, 1)[1].host_kv_memory == 0
    assert resolve(EngineConfig(TINY, host_kv_memory=5 << 20), "cpu", 1, 1)[1].host_kv_memory == 5 << 20


def test_the_bounds_of_the_queue_reach_the_scheduler() -> None:
    core, _ = resolve(EngineConfig(TINY), "cpu", 1, 1)
    assert (core.skip_s, core.age_s) == (2.0, 30.0)
    core, _ = resolve(EngineConfig(TINY, queue_skip_s=0.0, queue_age_s=7.0), "cpu", 1, 1)
    assert (core.skip_s, core.age_s) == (0.0, 7.0)
    with pytest.raises(ValueError, match="queue_age_s=-1"):
        EngineConfig(TINY, queue_age_s=-1)
