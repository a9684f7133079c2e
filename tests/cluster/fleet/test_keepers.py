"""A scheduler that dies takes no group with it: its groups go on for the next one, and are started anew if they do not.

A real scheduler actor, killed by its process id; the groups are lives without workers.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, cast

import pytest
import ray

from benchmarks.chaos.faults import cut
from cluster.engine import EngineError
from cluster.fleet import health, restarts, scheduler_keeper
from cluster.fleet.group import GroupHandle, _get
from cluster.fleet.health import GroupKeeper
from cluster.fleet.restarts import Pause, Restarts
from cluster.fleet.scheduler_keeper import SchedulerKeeper
from scheduler.config.core import CoreConfig, Resolved
from scheduler.protocol import sentinel
from scheduler.server.stats import GroupStart
from scheduler.server.vitals import Fenced
from tests.shared import waiting
from tests.shared.processes import SCHEDULER, alive, all_named, descendants, named
from tests.shared.ray_heads import own_ray
from workers.config import SchedulerAddress

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 120.0
GROUPS = 4


class Life:
    """Stands for a group's ranks. rejoined: how often they went on for another scheduler; told: that there will be one."""

    made: ClassVar[list["Life"]] = []

    def __init__(self, group: int, epoch: int) -> None:
        self.group, self.epoch = group, epoch
        self.phase = GroupStart(group, "placing")
        self.serves: set[int] = set()
        self.killed = self.adopted = self.waits = False
        self.rejoined = self.told = 0
        Life.made.append(self)

    def place(self, _deadline: float) -> None:
        """Nothing to place."""

    def start(self, _scheduler: SchedulerAddress, _deadline: float) -> None:
        self.serves = schedulers()
        if not self.serves:
            raise ConnectionRefusedError("no scheduler listens there")

    def rejoin(self, _scheduler: SchedulerAddress, _deadline: float) -> None:
        serves = schedulers()
        self.rejoined += bool(serves)
        self.serves = serves
        self.epoch += 1
        if not serves:
            raise ConnectionError("no scheduler listens there")

    def steps(self) -> bool:
        return False

    def hold_on(self) -> None:
        self.told += 1

    def wait(self, timeout_s: float) -> str | None:
        time.sleep(min(timeout_s, 0.01))
        return None

    def kill(self) -> None:
        self.killed = True


def schedulers() -> set[int]:
    return {*named(SCHEDULER)}


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.02)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with own_ray(4):
        yield


@pytest.fixture
def scheduler() -> Iterator[SchedulerKeeper]:
    config = CoreConfig(block_size=16, check_invariants=True, hung_after_s=60.0)
    keeper = SchedulerKeeper(config, Resolved(), None, "text")
    keeper.start(PATIENCE_S)
    try:
        yield keeper
    finally:
        keeper.close()


@pytest.fixture
def groups(scheduler: SchedulerKeeper) -> Iterator[list[GroupKeeper]]:
    """None of them may be started again on its own account."""
    Life.made.clear()
    gone: list[int] = []
    keepers = [
        GroupKeeper(
            group, 0, lambda epoch, group=group: cast(GroupHandle, Life(group, epoch)), scheduler,  # type: ignore[misc]
            restarts=Restarts(0, 600.0), start_timeout_s=PATIENCE_S, on_gone=lambda group, _: gone.append(group),
        )
        for group in range(GROUPS)
    ]  # fmt: skip
    for keeper in keepers:
        keeper.start()
    for keeper in keepers:
        until("it does not come up", lambda keeper=keeper: keeper.up(1.0))  # type: ignore[misc]
    yield keepers
    for keeper in keepers:
        keeper.close()
    assert gone == []
    assert all(life.killed for life in Life.made), "a life was left behind"


def kill_scheduler() -> None:
    (victim,) = all_named(SCHEDULER, 1)
    os.kill(victim, signal.SIGKILL)


def kept(kind: type[Life], scheduler: SchedulerKeeper, restarts: int) -> GroupKeeper:
    """Of a group of that kind, the only one that is kept, once it is up."""
    Life.made.clear()
    keeper = GroupKeeper(
        GROUPS, 0, lambda epoch: cast(GroupHandle, kind(GROUPS, epoch)), scheduler,
        restarts=Restarts(restarts, 600.0), start_timeout_s=PATIENCE_S, on_gone=lambda *_: None,
    )  # fmt: skip
    keeper.start()
    until("it does not come up", lambda: keeper.up(1.0))
    return keeper


def rejoined(lives: list[Life], times: int) -> bool:
    return [life.rejoined for life in lives] == [times] * len(lives)


def test_groups_go_on_for_each_of_the_schedulers(
    scheduler: SchedulerKeeper, groups: list[GroupKeeper], caplog: pytest.LogCaptureFixture
) -> None:
    lives = [*Life.made]
    for life in range(1, 4):
        kill_scheduler()
        until("a group did not come back", lambda life=life: rejoined(lives, life))  # type: ignore[misc]
        assert all(keeper.epoch >= life for keeper in groups), "each with a new epoch"
        assert all(alive(each.serves) for each in lives)
    assert scheduler.epoch == 3
    assert len(Life.made) == GROUPS, "none was started anew"
    assert "starts again" not in caplog.text


@pytest.mark.usefixtures("groups")
def test_a_scheduler_whose_connections_are_cut_is_the_same_one(
    scheduler: SchedulerKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    (process,) = all_named(SCHEDULER, 1)
    for times in (1, 2):
        assert cut(process) > 0
        until("nobody has noticed", lambda times=times: caplog.text.count("was cut: it is asked anew") >= times)  # type: ignore[misc]
        assert scheduler.call("beat") == (), "it answers"
    assert (scheduler.epoch, schedulers()) == (0, {process})
    kill_scheduler()
    until("its death is not noticed any more", lambda: scheduler.epoch == 1)
    until("a group did not come back", lambda: rejoined(Life.made, 1))


def test_a_scheduler_that_is_replaced_is_ended_though_it_lives(
    scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Front ends would stay with it, and it has no groups any more."""
    before = schedulers()
    monkeypatch.setattr(scheduler_keeper, "_has_ended", lambda _end: True)
    assert cut(*before) > 0
    until("it was not replaced", lambda: scheduler.epoch == 1)
    until("it lives on", lambda: not alive(before))


class Deaf(Life):
    """A group that does not come to another scheduler: its first life does not."""

    def rejoin(self, scheduler: SchedulerAddress, deadline: float) -> None:
        if self.epoch == 0:
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise EngineError("it does not answer")
        super().rejoin(scheduler, deadline)


class Unlucky(Life):
    """A group whose next scheduler dies as well, before it has been greeted."""

    def rejoin(self, scheduler: SchedulerAddress, deadline: float) -> None:
        if self.epoch == 0:
            self.epoch += 1
            kill_scheduler()
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise EngineError("it does not answer")
        super().rejoin(scheduler, deadline)


def test_a_scheduler_that_dies_again_is_not_the_group_s_fault(
    scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REJOIN_S", 0.2)
    keeper = kept(Unlucky, scheduler, restarts=0)
    kill_scheduler()
    until("it did not go on", lambda: Life.made[0].rejoined == 1)
    assert scheduler.epoch == 2
    assert len(Life.made) == 1, "it was not started anew"
    keeper.close()


@pytest.mark.parametrize("cut", [True, False])
def test_a_group_that_is_only_cut_off_goes_on_and_one_that_hangs_does_not(
    cut: bool, scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = kept(Life, scheduler, restarts=3)
    fenced = Fenced(GROUPS, 0, "it is not listened to", cut)
    monkeypatch.setattr(scheduler, "fenced", lambda _group, epoch: fenced if epoch == 0 else None)
    until("it did not come back", lambda: keeper.epoch == 1 and bool(Life.made[-1].serves))
    assert (len(Life.made), Life.made[0].killed, Life.made[0].rejoined) == ((1, False, 1) if cut else (2, True, 0))
    assert ("it is not listened to; it starts again at once" in caplog.text) is not cut
    keeper.close()


def test_a_group_that_does_not_come_in_time_is_started_anew_for_free(
    scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "REJOIN_S", 0.2)
    keeper = kept(Deaf, scheduler, restarts=0)
    kill_scheduler()
    until("it was not started anew", lambda: len(Life.made) == 2 and bool(Life.made[1].serves))
    first, second = Life.made
    assert first.killed
    assert first.rejoined == second.rejoined == 0
    assert "did not come to the scheduler within 0.2 s: it does not answer" in caplog.text
    assert "starts again" not in caplog.text, "that was no death of its own"
    kill_scheduler()
    until("it did not go on", lambda: second.rejoined == 1)
    keeper.close()


def test_a_scheduler_that_is_long_in_coming_is_waited_for(
    groups: list[GroupKeeper], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler_keeper, "CALL_TIMEOUT_S", 0.01)  # far shorter than a process takes to start
    lives = [*Life.made]
    with caplog.at_level(logging.ERROR):
        kill_scheduler()
        until("no start took too long", lambda: "could not be started again" in caplog.text)
    assert [keeper.epoch for keeper in groups] == [0] * GROUPS, "nobody goes anywhere without a scheduler"
    until("nobody was told that there will be another", lambda: all(life.told for life in lives))
    monkeypatch.undo()
    until("a group did not come back", lambda: rejoined(lives, 1))
    assert len(Life.made) == GROUPS


def test_a_scheduler_that_is_not_ready_in_time_says_what_to_do() -> None:
    keeper = SchedulerKeeper(CoreConfig(block_size=16, check_invariants=True), Resolved(), None, "text")
    with pytest.raises(EngineError, match=r"not ready within 0\.01 s: .*start_timeout_s"):
        keeper.start(0.01)
    keeper.close()
    until("it was left behind", lambda: not schedulers())


def test_a_rank_that_is_not_ready_in_time_says_what_to_do() -> None:
    """Whether it does not answer, or has itself waited for another rank for too long."""

    def late() -> None:
        raise TimeoutError("timed out")

    def stuck() -> None:
        time.sleep(PATIENCE_S)

    task = ray.remote(num_cpus=0)
    waits = task(stuck).remote()
    for reference, deadline in ((task(late).remote(), time.monotonic() + PATIENCE_S), (waits, time.monotonic())):
        with pytest.raises(EngineError, match="a worker was not ready in time: raise start_timeout_s"):
            _get(reference, deadline)
    ray.cancel(waits, force=True)


class Stillborn(Life):
    """A group that finds no room."""

    def start(self, _scheduler: SchedulerAddress, _deadline: float) -> None:
        raise EngineError("no room")


def test_a_group_that_was_added_and_does_not_come_up_is_gone(scheduler: SchedulerKeeper) -> None:
    gone: list[tuple[int, str]] = []
    keeper = GroupKeeper(
        GROUPS, 0, lambda epoch: cast(GroupHandle, Stillborn(GROUPS, epoch)), scheduler,
        restarts=Restarts(0, 600.0), start_timeout_s=PATIENCE_S, added=True,
        on_gone=lambda group, reason: gone.append((group, reason)),
    )  # fmt: skip
    keeper.start()
    until("nobody is told", lambda: bool(gone))
    keeper.close()
    assert gone == [(GROUPS, f"group {GROUPS} did not come up: no room")]
    status = scheduler.status(maps=False)
    assert status is not None
    assert status.engine is None or all(group.group != GROUPS for group in status.engine.groups)


class Mortal(Life):
    """A group that dies of itself, in each of its lives but the last."""

    lives = 3

    def wait(self, timeout_s: float) -> str | None:
        if self.epoch + 1 < Mortal.lives:
            return f"group {self.group}, rank 0: its worker process died"
        return super().wait(timeout_s)


def known(scheduler: SchedulerKeeper) -> list[int]:
    status = scheduler.status(maps=False)
    assert status is not None
    assert status.engine is not None
    return [group.group for group in status.engine.groups]


def test_a_group_that_has_used_up_its_starts_rests_and_is_tried_again(
    scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "SPENT_PAUSE_S", 0.1)
    rested: list[tuple[list[int], float]] = []
    rest = scheduler.rest

    def noted(group: int, reason: str, back_s: float) -> None:
        assert "died" in reason
        rest(group, reason, back_s)
        rested.append((known(scheduler), back_s))

    monkeypatch.setattr(scheduler, "rest", noted)
    gone: list[int] = []
    keeper = GroupKeeper(
        GROUPS, 0, lambda epoch: cast(GroupHandle, Mortal(GROUPS, epoch)), scheduler,
        restarts=Restarts(1, 600.0), start_timeout_s=PATIENCE_S, on_gone=lambda group, _: gone.append(group),
    )  # fmt: skip
    keeper.start()
    until("it was not tried again", lambda: keeper.epoch == Mortal.lives - 1)
    assert rested == [([GROUPS], 0.1)], "once at once, then after a while"
    keeper.close()
    assert gone == []


class Timed(Restarts):
    """Notes what it is told, and holds nobody back."""

    def __init__(self) -> None:
        super().__init__(5, 600.0)
        self.told: list[tuple[float, float]] = []

    def after_death(self, now_s: float, lived_s: float = 0.0, start_s: float = 0.0) -> Pause:  # noqa: ARG002
        self.told.append((lived_s, start_s))
        return Pause(0.0, spent=False)


class Placeless(Mortal):
    """Its second start fails."""

    def start(self, scheduler: SchedulerAddress, deadline: float) -> None:
        if self.epoch == 1:
            raise OSError("it finds no place")
        time.sleep(0.05)
        super().start(scheduler, deadline)

    def wait(self, timeout_s: float) -> str | None:
        time.sleep(0.05)
        return super().wait(timeout_s)


def test_how_long_a_group_has_lived_is_told_of_its_death(scheduler: SchedulerKeeper) -> None:
    timed = Timed()
    keeper = GroupKeeper(
        GROUPS, 0, lambda epoch: cast(GroupHandle, Placeless(GROUPS, epoch)), scheduler,
        restarts=timed, start_timeout_s=PATIENCE_S, on_gone=lambda *_: None,
    )  # fmt: skip
    keeper.start()
    until("it was not tried again", lambda: keeper.epoch == Mortal.lives - 1)
    keeper.close()
    (lived_s, start_s), (never_lived_s, _) = timed.told
    assert lived_s >= 0.05
    assert start_s >= 0.05
    assert never_lived_s == 0.0


def test_a_scheduler_that_says_nothing_is_replaced_and_one_that_slept_is_not(
    scheduler: SchedulerKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pid,) = all_named(SCHEDULER, 1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(pid, signal.SIGCONT)
    assert scheduler.call("status") is not None
    assert scheduler.epoch == 0
    monkeypatch.setattr(scheduler_keeper, "HUNG_TIMES", 1 / 30)
    (beside,) = [each for each, line in descendants(pid).items() if sentinel.__file__ in line]
    os.kill(beside, signal.SIGKILL)  # or it would be woken
    os.kill(pid, signal.SIGSTOP)
    until("no other came up", lambda: scheduler.epoch > 0)  # on busy cores that one may be silent for as long
    until("the hung one was left behind", lambda: not alive({pid}))


def test_a_scheduler_knows_who_is_coming_before_anybody_asks_it(scheduler: SchedulerKeeper) -> None:
    scheduler.announce(7)
    scheduler.rest(8, "it died too often", 300.0)
    kill_scheduler()
    until("no other came up", lambda: scheduler.epoch == 1)
    assert known(scheduler) == [7, 8], "also of one that is tried again later"
    scheduler.lose(8, "it was not needed any more")
    assert known(scheduler) == [7]
