"""A group that runs empty goes on doing so, whatever becomes of the scheduler meanwhile. A fleet without processes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from cluster.config import EngineConfig
from cluster.engine import EngineError
from cluster.fleet import fleet as fleets
from cluster.fleet.adoption import Adopted
from cluster.fleet.fleet import Fleet
from cluster.resolve import resolve
from kvcache.ids import GroupId
from scheduler.core import SchedulerCore
from scheduler.server.stats import ClusterStatus, snapshot

TINY = Path(__file__).parents[3] / "examples" / "tiny"
CONFIG = EngineConfig(model=str(TINY), device="cpu", groups=2, block_size=16, kv_memory=1 << 24, threads=1)


def stats(**changed: Any) -> ClusterStatus:
    """Of a cluster with one group, as it is and as a test wants it."""
    core = SchedulerCore(CONFIG)
    core.group_up(GroupId(1), 0, 8, 4)
    engine = snapshot(core)
    (group,) = engine.groups
    return ClusterStatus(phase="ready", engine=structs.replace(engine, groups=(structs.replace(group, **changed),)))


class Emptied:
    """A fleet that lets a group run empty, and what it says to the scheduler; how the cluster is at each look is told."""

    def __init__(self, patch: pytest.MonkeyPatch, looks: list[ClusterStatus], deaf: int = 0) -> None:
        self.fleet = Fleet(CONFIG, resolve(CONFIG, "cpu"))
        self.said: list[tuple[object, ...]] = []
        self._deaf = deaf
        patch.setattr(fleets, "DRAIN_POLL_S", 0.0)
        patch.setattr(self.fleet, "status", lambda: looks.pop(0))
        patch.setattr(self.fleet.scheduler, "call", self._call)

    def _call(self, *said: object) -> None:
        self.said.append(said)
        if len(self.said) <= self._deaf:
            raise EngineError("the scheduler does not answer")


RUNNING, EMPTY = stats(draining=True, running=2), stats(draining=True, running=0)
FORGOTTEN, NONE = stats(draining=False, running=1), ClusterStatus(phase="starting")


@pytest.mark.parametrize("returning", [True, False])
def test_a_scheduler_that_knows_nothing_of_it_is_told_until_it_does(monkeypatch: pytest.MonkeyPatch, returning: bool) -> None:
    looks = [RUNNING, NONE, NONE, FORGOTTEN, FORGOTTEN, RUNNING, EMPTY]
    emptied = Emptied(monkeypatch, looks, deaf=1)
    emptied.fleet._run_empty(1, returning=returning, vacates=False)
    assert looks == [], "a scheduler that is being replaced does not mean that nobody runs there"
    assert emptied.said == [("drain", 1, returning)] * 2


def test_who_still_runs_there_goes_elsewhere_when_time_is_over_also_after_a_scheduler_s_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = [RUNNING, NONE, FORGOTTEN, RUNNING, EMPTY]
    emptied = Emptied(monkeypatch, looks, deaf=1)
    monkeypatch.setattr(emptied.fleet, "config", replace(CONFIG, drain_timeout_s=0.0))
    emptied.fleet._run_empty(1, returning=False, vacates=True)
    assert emptied.said == [("vacate", 1), ("drain", 1, False), ("vacate", 1)]


def test_a_group_that_has_died_meanwhile_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [RUNNING, stats(draining=False, up=False, running=0)]
    emptied = Emptied(monkeypatch, looks)
    emptied.fleet._run_empty(1, returning=False, vacates=False)
    assert looks == []


@pytest.mark.parametrize(
    ("wanted", "there", "leaving", "anew"),
    [(1, 1, [0], {0: True}), (1, 2, [1], {1: False}), (2, 3, [0, 2], {0: False, 2: True})],
)
def test_one_that_the_next_owner_wants_is_started_anew_once_it_is_empty(
    monkeypatch: pytest.MonkeyPatch, wanted: int, there: int, leaving: list[int], anew: dict[int, bool]
) -> None:
    """Whoever let it run empty has died. If it was the only one, requests wait for it: with its end they would have nobody."""
    config, begun = replace(CONFIG, groups=wanted), dict[int, bool]()
    fleet = Fleet(config, resolve(config, "cpu"))
    for group in range(there):
        fleet._groups.keepers[group] = cast(Any, SimpleNamespace())
    monkeypatch.setattr(fleet, "_take_over", lambda _: Adopted(None, leaving=leaving))
    monkeypatch.setattr(fleet, "groups", lambda: [SimpleNamespace(up=True) for _ in range(there)])
    monkeypatch.setattr(fleet, "resize", lambda _: None)
    monkeypatch.setattr(fleet, "_begin_leave", lambda group, *, replace: begun.update({group: replace}))
    fleet.start(lambda _: None)
    assert begun == anew
