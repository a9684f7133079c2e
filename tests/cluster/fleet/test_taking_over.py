"""A fleet that takes over what another has left goes on with it, whatever of the rest cannot come up. Without Ray: the
scheduler notes what it is told, groups are lives without workers."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from cluster.config import EngineConfig
from cluster.engine import EngineError
from cluster.fleet import adoption, groups, health, restarts
from cluster.fleet import fleet as fleets
from cluster.fleet import group as group_module
from cluster.fleet.adoption import Adopted
from cluster.fleet.fleet import Fleet
from cluster.fleet.group import GroupHandle
from cluster.fleet.ownership.remains import Found, Remains
from cluster.fleet.scheduler_keeper import LiveScheduler
from deploy.config.load import EMBEDDED_MODEL
from scheduler.protocol.orphans import Estate
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStart, GroupStats
from tests.shared import waiting
from workers.config import ResolvedWorker, SchedulerAddress
from workers.process.actor import GroupHandover

PATIENCE_S = 60.0


until = partial(waiting.until, patience_s=PATIENCE_S)


class Ray:
    """What there is room for, and what lives."""

    def __init__(self) -> None:
        self.room = threading.Event()
        self.up: set[int] = set()
        self.placing: list[tuple[int, int]] = []


class Life:
    """Stands for a group's ranks: it comes up where there is room."""

    def __init__(self, cluster: Ray, group: int, epoch: int, *, runs: bool = False, begun: bool = False) -> None:
        self.cluster, self.group, self.epoch = cluster, group, epoch
        self.phase = GroupStart(group, "placing")
        self.adopted, self.placed, self.waits = runs, runs or begun, False
        self.killed = False

    def place(self, _deadline: float) -> None:
        self.cluster.placing.append((self.group, self.epoch))
        if not self.placed and not self.cluster.room.is_set():
            raise EngineError(f"group {self.group} found no node")
        self.placed = True

    def start(self, _scheduler: object, deadline: float) -> None:
        self.place(deadline)
        self.cluster.up.add(self.group)

    def wait(self, timeout_s: float) -> str | None:
        time.sleep(min(timeout_s, 0.01))
        return None

    def hold_on(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True
        self.cluster.up.discard(self.group)


class Scheduler:
    """Notes in `heard` who is expected, rests and is lost. front_ends: that it has."""

    def __init__(self, cluster: Ray) -> None:
        self.cluster = cluster
        self.epoch, self.up = 0, True
        self.heard: list[tuple[str, int]] = []

    def announce(self, group: int) -> None:
        """Of no use to whoever lives."""

    def expect(self, group: int) -> LiveScheduler:
        self.heard.append(("expected", group))
        return LiveScheduler(None, cast(Any, None), self.epoch)

    def rest(self, group: int, _reason: str, _back_s: float) -> None:
        self.heard.append(("rests", group))

    def lose(self, group: int, _reason: str) -> None:
        self.heard.append(("lost", group))

    def fenced(self, _group: int, _epoch: int) -> None:
        return None

    def call(self, _method: str, *_: object) -> bool:
        return False

    def start(self, _timeout_s: float, life: int) -> None:
        self.epoch = life

    def status(self, _maps: bool) -> ClusterStatus:
        stats = tuple(GroupStats(group, True, 8, 8, 0, 0, 0) for group in sorted(self.cluster.up))
        return ClusterStatus(phase="ready", engine=EngineStats(groups=stats))

    def close(self) -> None:
        pass


class Owning:
    def __init__(self, estate: Estate) -> None:
        self.estate, self.deaf = estate, False

    def keep(self, actor: object) -> None:
        """It hears that it has an owner."""

    def check(self) -> None:
        """Nobody else has come."""

    def close(self) -> None:
        pass


@pytest.fixture
def cluster() -> Ray:
    return Ray()


@pytest.fixture
def made(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    """A fleet that takes over these lives."""
    opened: list[Fleet] = []
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fleets, "SchedulerKeeper", lambda *_: Scheduler(cluster))
    monkeypatch.setattr(fleets, "Owner", Owning)
    monkeypatch.setattr(groups, "GroupHandle", lambda group, epoch, *_: Life(cluster, group, epoch))

    def make(*lives: Life, wanted: int, life: int | None = None, **adopted: Any) -> Fleet:
        epochs = {each.group: each.epoch + 1 for each in lives}
        cluster.up |= {each.group for each in lives if each.adopted}
        runs, begun = ([cast(GroupHandle, each) for each in lives if each.adopted is runs] for runs in (True, False))
        monkeypatch.setattr(
            fleets, "take_over", lambda *_: Adopted(life, epochs, groups=runs, begun=begun, **adopted)
        )
        config = EngineConfig(model=str(EMBEDDED_MODEL), groups=wanted, start_timeout_s=PATIENCE_S)
        opened.append(Fleet(config, ResolvedWorker(), estate=Estate("manta-app", "1", 60.0)))
        return opened[-1]

    yield make
    for fleet in opened:
        fleet.close()


def heard(fleet: Fleet) -> list[tuple[str, int]]:
    return cast(Scheduler, fleet.scheduler).heard


@pytest.mark.parametrize("life", [None, 3])
def test_those_that_serve_go_on_though_another_finds_no_place(
    life: int | None, cluster: Ray, made: Callable[..., Fleet]
) -> None:
    """It comes when there is room again: nobody starts the engine anew for it, which would change nothing. life: of another
    scheduler, where that had gone as well."""
    fleet = made(Life(cluster, 0, 4, runs=True), wanted=2, life=life)
    fleet.start(lambda _: None)
    assert cluster.up == {0}
    until("it is not tried again", lambda: len(cluster.placing) > 3)
    assert fleet.waits_for_room
    cluster.room.set()
    until("it does not come up", lambda: cluster.up == {0, 1})
    assert not fleet.waits_for_room
    assert (fleet.target, fleet.wanted) == (2, 2)


def test_so_they_do_while_it_looks_for_one(cluster: Ray, made: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Life, "place", lambda life, _: life.placed or cluster.room.wait(PATIENCE_S))
    fleet = made(Life(cluster, 0, 4, runs=True), wanted=2)
    starting = threading.Thread(target=fleet.start, args=(lambda _: None,))
    starting.start()
    until("what serves is not ready", lambda: fleet.status().phase == "ready")
    assert starting.is_alive()
    cluster.room.set()
    starting.join(PATIENCE_S)
    assert cluster.up == {0, 1}


def test_who_finds_no_place_is_the_first_to_go_where_fewer_are_wanted(cluster: Ray, made: Callable[..., Fleet]) -> None:
    """Nothing runs there that would have to end first."""
    fleet = made(Life(cluster, 0, 4, runs=True), Life(cluster, 2, 4, runs=True), wanted=3)
    fleet.start(lambda _: None)
    fleet.resize(2)
    until("it is still there", lambda: fleet.target == 2)
    assert cluster.up == {0, 2}


def test_an_error_that_nobody_has_thought_of_ends_no_watch(
    cluster: Ray, made: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a group, and of how many there are: nobody else would look after either."""
    cluster.room.set()
    life, faults, wait, add = Life(cluster, 0, 4, runs=True), ["wait", "wait", "add"], Life.wait, groups.Groups.add

    def once(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*told: Any, **named: Any) -> Any:
            if name in faults:
                faults.remove(name)
                raise RuntimeError("what is this?")
            return call(*told, **named)

        return failing

    monkeypatch.setattr(Life, "wait", once("wait", wait))
    monkeypatch.setattr(groups.Groups, "add", once("add", add))
    fleet = made(life, wanted=1)
    fleet.start(lambda _: None)
    until("it is not looked after", lambda: caplog.text.count("could not be looked after") == 2)
    fleet.resize(2)
    until("no group is added", lambda: cluster.up == {0, 1})
    monkeypatch.setattr(Life, "wait", lambda each, _: "it has died" if each is life else wait(each, 0.01))
    until("its death is not noticed", lambda: life.killed)


def test_a_group_in_a_long_step_has_the_time_to_come_to_the_next_scheduler(
    cluster: Ray, made: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To start it anew would take as long, and lose what it has. One whose step has hung is."""
    life, tries, steps = Life(cluster, 0, 4, runs=True), list[float](), [True] * 3
    monkeypatch.setattr(health, "REJOIN_S", 0.02)

    def rejoin(_scheduler: object, deadline: float) -> None:
        tries.append(deadline)
        time.sleep(max(0.0, deadline - time.monotonic()))
        if steps or life.killed:
            raise EngineError("it does not answer")
        cluster.up.add(0)

    monkeypatch.setattr(life, "rejoin", rejoin, raising=False)
    monkeypatch.setattr(life, "steps", lambda: bool(steps) and steps.pop(), raising=False)
    cluster.room.set()
    fleet = made(life, wanted=1)
    fleet.start(lambda _: None)
    cast(Scheduler, fleet.scheduler).epoch = 1
    until("it does not go on", lambda: len(tries) == 4)
    assert not life.killed
    steps[:] = [False]
    cast(Scheduler, fleet.scheduler).epoch = 2
    until("it is not started anew", lambda: life.killed and cluster.up == {0})


def test_where_none_serves_a_start_that_fails_is_told(cluster: Ray, made: Callable[..., Fleet]) -> None:
    cluster.room.set()
    fleet = made(Life(cluster, 0, 4, begun=True), wanted=1, life=0)
    fleet.start(lambda _: None)
    assert cluster.up == {0}
    cluster.room.clear()
    with pytest.raises(EngineError, match="found no node"):
        made(wanted=1, life=0).start(lambda _: None)


def test_whoever_waits_for_a_group_waits_for_the_one_in_its_place(cluster: Ray, made: Callable[..., Fleet]) -> None:
    """It has another number: the scheduler hears of it before it hears that nobody starts the one that was."""
    cluster.room.set()
    fleet = made(wanted=1, awaited=[3])
    fleet.start(lambda _: None)
    assert heard(fleet).index(("expected", 0)) < heard(fleet).index(("lost", 3))


@pytest.mark.parametrize(("begun", "awaited"), [([2], [2]), ([], [2]), ([2, 1], [2, 1])])
def test_an_old_version_whose_only_group_restarts_is_kept(
    begun: list[int], awaited: list[int], cluster: Ray, made: Callable[..., Fleet]
) -> None:
    """Its requests wait for that group: it comes up, or another in its place."""
    cluster.room.set()
    fleet = made(*[Life(cluster, group, 4, begun=True) for group in begun], wanted=2, awaited=awaited)
    assert fleet.resume()
    until("none comes up", lambda: len(cluster.up) == 1)
    kept = {*begun[:1]} or {0}
    assert (cluster.up, fleet.target, fleet.wanted) == (kept, 1, 1)
    assert heard(fleet)[0] == ("expected", *kept), "before any is lost"
    assert [each for each in heard(fleet) if each[0] == "lost"] == [("lost", group) for group in awaited if group not in kept]


def test_one_with_a_group_that_serves_starts_nothing(cluster: Ray, made: Callable[..., Fleet]) -> None:
    lives = Life(cluster, 0, 4, runs=True), Life(cluster, 1, 2, begun=True)
    fleet = made(*lives, wanted=2, awaited=[1])
    assert fleet.resume()
    assert ([life.killed for life in lives], fleet.target, heard(fleet)) == ([False, True], 1, [("lost", 1)])


@pytest.mark.parametrize("life", [None, 3])
def test_one_without_anybody_to_wait_for_is_not(life: int | None, made: Callable[..., Fleet]) -> None:
    assert not made(wanted=1, life=life).resume()


class Rank:
    """A leader that answers what it `says`: an error is raised, and what is late is not there, so many times, when it is waited
    for."""

    def __init__(self, says: Any, *, late: int = 0) -> None:
        self.says, self.late = says, late
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self._ask(name))

    def _ask(self, name: str) -> "Rank":
        self.asked.append(name)
        return self


def answer_of(rank: Rank, **_: Any) -> Any:
    if isinstance(rank.says, Exception):
        raise rank.says
    return rank.says


CUT = ray.exceptions.ActorUnavailableError("the connection was cut", b"\0" * 16)
RUNS, BEGUN = GroupHandover(7, "secret"), GroupHandover(4, "")
ADDRESS = SchedulerAddress("127.0.0.1", 1, "secret")


@pytest.fixture
def leaders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GroupHandle]]:
    """Takes over groups without a scheduler: handles of those that are kept. Ray is played."""

    def take(*ranks: Rank) -> list[GroupHandle]:
        def wait(asked: list[Rank], **_: Any) -> tuple[list[Rank], list[Rank]]:
            late = [rank for rank in asked if rank.late]
            for rank in late:
                rank.late -= 1
            return [rank for rank in asked if rank not in late], late

        for module in (adoption, group_module):
            monkeypatch.setattr(module, "actor_of", lambda _, name: ranks[int(name)])
        monkeypatch.setattr(ray, "wait", wait)
        monkeypatch.setattr(ray, "get", answer_of)
        monkeypatch.setattr(adoption, "end_group", lambda *_: None)
        found = Found(groups={(number, 4): Remains(number, 4, {0: str(number)}) for number in range(len(ranks))})
        monkeypatch.setattr(adoption, "find", lambda _: {"1": found})
        config, owner = EngineConfig(model=str(EMBEDDED_MODEL)), cast(Any, Owning(Estate("manta-app", "1", 60.0)))
        scheduler = cast(Any, SimpleNamespace(trust=lambda _: None))
        adopted = adoption.take_over(
            owner, scheduler, lambda number, epoch: GroupHandle(number, epoch, config, ResolvedWorker(), "text", owner)
        )
        return sorted((*adopted.groups, *adopted.begun), key=lambda handle: handle.group)

    return take


def test_a_leader_that_is_long_in_answering_is_kept(leaders: Callable[..., list[GroupHandle]]) -> None:
    """One that compiles holds Python's lock; one whose connection was cut lives as well. Who has died, or ended, goes."""
    dead = ray.exceptions.ActorDiedError()
    handles = leaders(Rank(RUNS), Rank(BEGUN), Rank(RUNS, late=1), Rank(CUT), Rank(dead), Rank(None))
    assert [(handle.group, handle.epoch, handle.adopted) for handle in handles] == [
        (0, 7, True), (1, 4, False), (2, 4, False), (3, 4, False)
    ]  # fmt: skip


@pytest.mark.parametrize(("says", "epoch", "begins"), [(RUNS, 8, False), (BEGUN, 4, True)])
def test_it_goes_on_from_where_it_is_once_it_answers(
    says: GroupHandover, epoch: int, begins: bool, leaders: Callable[..., list[GroupHandle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next epoch where it has served before."""
    rank = Rank(says, late=1)
    _, handle = leaders(Rank(RUNS), rank)
    monkeypatch.setattr(GroupHandle, "begin", lambda _, deadline: ([], deadline))
    handle.start(ADDRESS, time.monotonic() + PATIENCE_S)
    assert (handle.epoch, "rejoin" in rank.asked, "run" in rank.asked) == (epoch, not begins, begins)
    assert len(handle.runs) == 1, "its end is heard of"


def test_one_that_has_ended_meanwhile_is_started_anew(leaders: Callable[..., list[GroupHandle]]) -> None:
    _, gone, stranger = leaders(Rank(RUNS), Rank(None, late=1), Rank(GroupHandover(7, "another"), late=1))
    for handle, why in ((gone, "ended while nobody kept it"), (stranger, "another secret")):
        with pytest.raises(EngineError, match=why):
            handle.start(ADDRESS, time.monotonic() + PATIENCE_S)


def test_where_no_leader_answers_the_first_is_waited_for(leaders: Callable[..., list[GroupHandle]]) -> None:
    """It knows the secret that the next scheduler is to have."""
    handles = leaders(Rank(RUNS, late=3), Rank(RUNS, late=9), Rank(None, late=2))
    assert [(handle.group, handle.adopted) for handle in handles] == [(0, True), (1, False)]
