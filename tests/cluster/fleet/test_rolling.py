"""In which order the groups of an old version go while those of a new one come. Fleets without processes."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from cluster.engine import EngineError
from cluster.fleet import rolling
from cluster.fleet.fleet import Fleet
from cluster.fleet.rolling import Roll
from scheduler.server.stats import ClusterStatus, GroupStats
from tests.shared import waiting

PATIENCE_S = 60.0
LONG_ENOUGH_S = 0.2
"""For whatever should not happen to have happened."""


until = partial(waiting.until, patience_s=PATIENCE_S)


class Version:
    """A fleet whose groups are up or not, as the test says."""

    def __init__(self, up: dict[int, bool], wanted: int = 0, front_ends: int = 0) -> None:
        self.up, self.wanted, self.front_ends = up, wanted, front_ends
        self.version = "old"
        self.waits_for_room = self.closed = False
        self.faults = 0
        self.gone: list[int] = []
        self.on_gone: Callable[[], None] = lambda: None

    @property
    def target(self) -> int:
        return len(self.up)

    def groups(self) -> tuple[GroupStats, ...]:
        if self.faults:
            self.faults -= 1
            raise (EngineError("the scheduler is being replaced"), RuntimeError("what is this?"))[self.faults % 2]
        return tuple(GroupStats(group, up, 8, 8, 0, 0, 0) for group, up in self.up.items())

    def status(self) -> ClusterStatus:
        return ClusterStatus(phase="ready", front_ends=self.front_ends)

    def remove_group(self, group: int, *, last: bool = False) -> bool:
        assert self.up[group], "only what is up runs empty"
        assert last == (len(self.up) == 1)
        self.give_up(group)
        return True

    def give_up(self, group: int) -> None:
        del self.up[group]
        self.on_gone()
        self.gone.append(group)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Callable[[Version, Version], Roll]:
    monkeypatch.setattr(rolling, "LOOK_S", 0.001)
    monkeypatch.setattr(rolling, "ROOM_S", 0.02)
    return lambda new, old: Roll(cast(Fleet, new), cast(Any, [old]))


def test_where_there_is_room_old_groups_go_once_all_new_ones_are_up(roll: Callable[..., Roll]) -> None:
    new, old = Version({0: True, 1: False}, wanted=2), Version({0: True, 1: True, 2: True}, front_ends=1)
    begun = roll(new, old)
    time.sleep(LONG_ENOUGH_S)
    assert old.gone == [], "one is still loading"
    new.up[1] = True
    until("they do not go", lambda: old.gone == [2, 1])
    time.sleep(LONG_ENOUGH_S)
    assert old.gone == [2, 1], "a front end needs the last one"
    old.front_ends = 0
    until("the old version is still there", lambda: old.closed)
    assert begun.old == []


def test_where_there_is_none_an_old_group_makes_room(roll: Callable[..., Roll]) -> None:
    new, old = Version({0: False, 1: False}, wanted=2), Version({0: True, 1: True}, front_ends=1)
    roll(new, old)
    time.sleep(LONG_ENOUGH_S)
    assert old.gone == []

    def take_room() -> None:
        new.waits_for_room, new.up[0] = False, True

    old.on_gone = take_room
    new.waits_for_room = True
    until("it does not go", lambda: old.gone == [1])
    new.waits_for_room = True
    time.sleep(LONG_ENOUGH_S)
    assert old.gone == [1], "a new one serves: the last old one stays for its front end, whoever waits"


def test_the_only_group_goes_where_there_is_room_for_no_other(roll: Callable[..., Roll]) -> None:
    new, old = Version({0: False}, wanted=1), Version({0: True}, front_ends=1)
    new.waits_for_room = True
    roll(new, old)
    until("nothing goes on", lambda: old.gone == [0])


def test_the_only_group_that_comes_back_does_so_before_it_makes_room(roll: Callable[..., Roll]) -> None:
    """Its requests wait for it, and end with it."""
    new, old = Version({0: False}, wanted=1), Version({0: False}, front_ends=1)
    new.waits_for_room = True
    roll(new, old)
    time.sleep(LONG_ENOUGH_S)
    assert old.gone == []
    old.up[0] = True
    until("nothing goes on", lambda: old.gone == [0])


@pytest.mark.parametrize("waits_for_room", [True, False])
def test_it_is_not_waited_for_for_ever(
    waits_for_room: bool, roll: Callable[..., Roll], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both look for a place it is not; and what the new version mends may be what keeps it from coming up."""
    monkeypatch.setattr(rolling, "RETURN_S", 60.0 if waits_for_room else 0.02)
    new, old = Version({0: False}, wanted=1), Version({0: False}, front_ends=1)
    new.waits_for_room, old.waits_for_room = True, waits_for_room
    roll(new, old)
    until("nothing goes on", lambda: old.gone == [0])


def test_a_group_that_is_down_is_the_first_to_go(roll: Callable[..., Roll]) -> None:
    new, old = Version({0: True}, wanted=1), Version({0: False, 1: True})
    old.faults = 3
    roll(new, old)
    until("the old version is still there", lambda: old.closed)
    assert old.gone == [0, 1]


def test_its_end_is_that_of_the_old_version(roll: Callable[..., Roll]) -> None:
    old = Version({0: True}, front_ends=1)
    roll(Version({0: True}, wanted=1), old).close()
    assert old.closed
