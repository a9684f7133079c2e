"""The scheduler and its groups on Ray, as one thing: started, watched, made larger and smaller, taken down.

Imports `groups`, `scheduler_keeper` and `adoption`. Whoever holds a Fleet owns every actor of it: they end with that
process or, with an estate, wait for the next Fleet of the same one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from cluster.config import EngineConfig
from cluster.engine import EngineError, OnFailure, Progress
from cluster.fleet.adoption import Adopted, take_over
from cluster.fleet.groups import Groups
from cluster.fleet.health import GroupKeeper
from cluster.fleet.ownership.owner import Owner
from cluster.fleet.scheduler_keeper import LiveScheduler, SchedulerKeeper
from scheduler.config.core import QueueBounds
from scheduler.protocol.orphans import Estate
from scheduler.server.stats import ClusterStatus, GroupStats
from workers.config import ResolvedWorker
from workers.model.sources.progress import DOWNLOADING, in_words
from workers.model.sources.progress import Progress as Report

logger = logging.getLogger(__name__)

POLL_S = 0.05
DRAIN_POLL_S = 0.5


class Fleet:
    """One scheduler, `config.groups` groups at first, as many as `resize` says from then on. Every method may be called from
    any thread.

    on_lost: told once, from a thread, when the last group will not come back, and why. bounds, log_format: an endpoint's.
    estate: where scheduler and groups are to outlive this process; what another Fleet has left there is taken over.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedWorker,
        on_lost: OnFailure = logger.error,
        bounds: QueueBounds | None = None,
        log_format: str = "text",
        estate: Estate | None = None,
    ) -> None:
        self.config = config
        self._owner = Owner(estate) if estate is not None else None
        self.scheduler = SchedulerKeeper(config, resolved, bounds, log_format, self._owner)
        self._groups = Groups(config, resolved, log_format, self.scheduler, self._owner, on_lost)
        self._keepers = self._groups.keepers
        self._device = resolved.device
        self._lock = threading.Lock()
        self._words: deque[str] = deque(maxlen=64)
        self._ready = False
        self._wanted = config.groups
        self._leaving: set[int] = set()
        self._resizing: threading.Thread | None = None

    def start(self, progress: Progress, timeout_s: float | None = None) -> None:
        """Scheduler and all groups side by side; returns when all are ready. Where some were taken over as they served, they go
        on whatever becomes of the others: those that do not come up are tried again. timeout_s: instead of `start_timeout_s`.
        Errors: the first group's error."""
        config, wanted = self.config, self._wanted
        timeout_s = timeout_s or config.start_timeout_s
        deadline = time.monotonic() + timeout_s
        adopted = self._take_over(progress)
        serves = bool(adopted.groups)
        keepers = [self._groups.adopt(handle, again=serves) for handle in adopted.begun]
        missing = max(0, wanted - self.target)
        workers = f"{missing} group(s) of {config.tensor_parallel_size} {self._device} rank(s)"
        if adopted.next_life is not None:
            self._say(f"starting the scheduler and {workers}" if missing else "starting the scheduler", progress)
        elif missing:
            self._say(f"starting {workers}", progress)
        keepers += [self._groups.add(timeout_s, again=serves) for _ in range(missing)]
        if adopted.next_life is not None:
            self.scheduler.start(config.start_timeout_s, adopted.next_life)
        self._forget(adopted.awaited, keepers)
        if serves:
            self._go_on(adopted.leaving)
        if keepers:
            self._say(f"loading {config.model}", progress)
        say = in_words(progress, f"{DOWNLOADING} {config.model}")
        while [keeper.group for keeper in keepers if not keeper.up(POLL_S)]:
            _tell_download(keepers, say)  # in slices, and asking every one, so that Ctrl-C and any group's error are heard
        deadline = max(deadline, time.monotonic() + timeout_s)  # downloads are not counted
        while (up := sum(group.up for group in self.groups())) < wanted - sum(keeper.delayed for keeper in keepers):
            if time.monotonic() > deadline:  # the leaders have yet to greet the scheduler
                if serves:
                    break
                raise EngineError("the groups did not reach the scheduler in time: raise start_timeout_s")
            time.sleep(POLL_S)
        self._say(f"{up} group(s) are ready", progress)
        if not serves:
            self._go_on(adopted.leaving)

    def resume(self) -> bool:
        """Keeps what another Fleet has left as it is, and starts nothing but a group that is waited for, if there is no other.
        False: there is no scheduler with a group."""
        adopted = self._take_over(logger.info)
        if adopted.next_life is not None or not (adopted.groups or adopted.begun or adopted.awaited):
            return False
        kept = 0 if adopted.groups else 1
        keepers = [self._groups.adopt(handle, again=True) for handle in adopted.begun[:kept]]
        if not adopted.groups and not keepers:
            keepers = [self._groups.add(self.config.start_timeout_s, again=True)]
        for handle in adopted.begun[kept:]:
            handle.kill()
        self._forget(adopted.awaited, keepers)
        self._wanted, self._ready = self.target, True
        return True

    @property
    def version(self) -> str:
        """Of its estate; "" without one."""
        return self._owner.estate.version if self._owner is not None else ""

    @property
    def cut_off(self) -> bool:
        """Nobody of its estate answers, though asked: another owner would be heard."""
        return self._owner is not None and self._owner.deaf

    @property
    def waits_for_room(self) -> bool:
        """Whether a group that is coming up has found no place yet."""
        return any(keeper.waits_for_room for keeper in [*self._keepers.values()])

    @property
    def target(self) -> int:
        """Groups that are up or coming up."""
        return len(self._keepers)

    @property
    def wanted(self) -> int:
        """Groups that were asked for; an autoscaler never goes below."""
        return self._wanted

    def current(self) -> LiveScheduler:
        """The scheduler that is up. Errors: EngineError while there is none."""
        return self.scheduler.current()

    def groups(self) -> tuple[GroupStats, ...]:
        engine = self.status().engine
        return engine.groups if engine is not None else ()

    def status(self, maps: bool = False) -> ClusterStatus:
        """The cluster at this moment; a scheduler that does not answer shows as one that is starting."""
        status = self.scheduler.status(maps) or ClusterStatus(phase="stopped" if self._groups.closed else "starting")
        starts = (keeper.starting for keeper in [*self._keepers.values()])
        return msgspec.structs.replace(
            status,
            phase=status.phase if self._ready else "starting",
            model=self.config.model,
            revision=self.config.revision,
            progress=tuple(self._words),
            starting=tuple(start for start in starts if start is not None),
            target_groups=self.target,
            epoch=max(0, self.scheduler.epoch),
        )

    # ---- larger and smaller

    def resize(self, groups: int) -> None:
        """Groups come and go, one after the other and beside the requests, until there are so many; where an autoscaler works,
        it alone takes groups away. Returns at once. Errors: ValueError for a number that is not allowed."""
        if groups < 1:
            raise ValueError(f"groups={groups} is below 1: raise it")
        if self.config.max_groups is not None and groups > self.config.max_groups:
            raise ValueError(f"groups={groups} is above max_groups={self.config.max_groups}: lower it or raise max_groups")
        with self._lock:
            self._wanted = groups
            if self._resizing is None and self._ready and not self._groups.closed:
                self._resizing = threading.Thread(target=self._resize, name="manta-resize", daemon=True)
                self._resizing.start()

    def add_group(self) -> int:
        """Asks for one more group and returns its number at once: Ray's autoscaler brings a node if none has room. If it does
        not come up, the log says why, and it is no longer counted."""
        return self._groups.add(self.config.node_timeout_s, added=True).group

    def remove_group(self, group: int, *, last: bool = False) -> bool:
        """Lets a group run empty and takes it down; False if the scheduler needs it. Takes as long as its requests do, no
        longer than `drain_timeout_s`: then they start again elsewhere. last: it may be the last one, and they end there."""
        if not self.scheduler.call("drain", group, last):
            return False
        self._run_empty(group, returning=last, vacates=not last)
        self._groups.remove(group)
        return True

    def give_up(self, group: int) -> None:
        """Ends a group that is not up, and does not start it again."""
        self._groups.remove(group)

    def drain(self, group: int, *, replace: bool = False) -> None:
        """Lets a group run empty beside the requests, then ends it and wants one group fewer, or starts it anew. Returns at
        once. Errors: ValueError that says why it cannot; EngineError if the scheduler does not answer."""
        with self._lock:
            if group not in self._keepers:
                there = ", ".join(map(str, sorted(self._keepers)))
                raise ValueError(f"there is no group {group}: its groups are {there or 'none'}")
            if group in self._leaving:
                raise ValueError(f"group {group} is running empty already")
        if not self.scheduler.call("drain", group, replace):
            raise ValueError(
                f"group {group} cannot go: it is not up, the last that takes requests, or the only one large enough for some "
                "of them. Add a group first, or let it be started anew"
            )
        if not replace:
            with self._lock:
                self._wanted = max(1, min(self._wanted, self.target - 1))
        self._begin_leave(group, replace=replace)

    # ---- the end

    def stop(self) -> None:
        """From now on no end is a failure."""
        self._groups.stop()

    def close(self) -> None:
        """Ends every process of the fleet, within seconds. A second call does nothing."""
        self.stop()
        self.scheduler.close()
        self._groups.close()
        if self._owner is not None:
            self._owner.close()

    # ---- common

    def _take_over(self, progress: Progress) -> Adopted:
        """What another Fleet has left in this estate is kept by this one from now on."""
        if self._owner is None:
            return Adopted()
        adopted = take_over(self._owner, self.scheduler, self._groups.handle)
        self._groups.epochs |= adopted.epochs
        for handle in adopted.groups:
            self._groups.adopt(handle)
        if adopted.begun:
            self._say(f"{len(adopted.begun)} group(s) are coming up already", progress)
        if adopted.next_life is not None and adopted.groups:
            self._say(f"took over {len(adopted.groups)} group(s), which have lost their scheduler", progress)
        elif adopted.next_life is None:
            self._say(f"took over the scheduler and {len(adopted.groups)} group(s)", progress)
        return adopted

    def _go_on(self, leaving: Sequence[int]) -> None:
        """With what others have asked for meanwhile, or had begun. leaving: groups that run empty."""
        self._ready = True
        self.resize(self._wanted)
        excess = self.target - self._wanted
        for number, group in enumerate(leaving):  # requests may wait for one that is wanted
            self._begin_leave(group, replace=number >= excess)

    def _forget(self, awaited: list[int], coming: Sequence[GroupKeeper]) -> None:
        """Of groups that were coming up those that nobody starts any more: requests do not wait for them, but for those that
        do come."""
        forgotten = [group for group in awaited if group not in self._keepers]
        for keeper in coming if forgotten else ():
            self.scheduler.expect(keeper.group)
        for group in forgotten:
            self.scheduler.lose(group, "the engine that started it has died")

    def _resize(self) -> None:
        while True:
            with self._lock:
                missing = self._wanted - len(self._keepers)
                if self._groups.closed or missing == 0 or (missing < 0 and self.config.max_groups is not None):
                    self._resizing = None
                    return
                there = sorted(self._keepers)
            try:
                if missing > 0:
                    logger.warning("%d groups were asked for: group %d is being added", self._wanted, self.add_group())
                else:
                    self._remove_one(there)
            except EngineError as error:  # the scheduler is being replaced, or the fleet is closing
                logger.warning("the number of groups cannot be changed now: %s", error)
                time.sleep(DRAIN_POLL_S)
            except Exception:  # whatever it is: nobody else would change it any more
                logger.exception("the number of groups cannot be changed now")
                time.sleep(DRAIN_POLL_S)

    def _remove_one(self, there: Sequence[int]) -> None:
        """The newest of those that are not up, if others are: nothing runs there. Else the newest. Errors: EngineError."""
        engine = self.status().engine
        up = {stats.group for stats in engine.groups if stats.up} if engine is not None else set()
        down = [group for group in there if group not in up]
        leaving = (down if up and down else there)[-1]
        if leaving in down and up:
            self.give_up(leaving)
        elif not self.remove_group(leaving):
            time.sleep(DRAIN_POLL_S)  # no other group is up yet
            return
        logger.warning("%d groups were asked for: group %d is gone", self._wanted, leaving)

    def _begin_leave(self, group: int, *, replace: bool) -> None:
        with self._lock:
            self._leaving.add(group)
        threading.Thread(target=self._leave, args=(group, replace), name=f"manta-drain-{group}", daemon=True).start()

    def _leave(self, group: int, replace: bool) -> None:
        """In a thread of its own: a group runs empty in its own time."""
        try:
            self._run_empty(group, returning=replace, vacates=True)
            if replace:
                self._groups.renew(group)
            else:
                self._groups.remove(group)
                self.resize(self._wanted)  # whoever began this may have died, and his wish with him
            logger.warning("group %d has run empty and %s", group, "is started anew" if replace else "is gone")
        except (EngineError, KeyError) as error:  # the fleet is closing, or the group was lost
            logger.warning("group %d could not be drained: %s", group, error)
        finally:
            with self._lock:
                self._leaving.discard(group)

    def _run_empty(self, group: int, *, returning: bool, vacates: bool) -> None:
        """A scheduler that has come meanwhile, or to which the group has come back, knows nothing of it, and is told."""
        deadline = time.monotonic() + self.config.drain_timeout_s
        while not self._groups.closed:
            engine = self.status().engine
            stats = next((stats for stats in engine.groups if stats.group == group), None) if engine is not None else None
            if engine is not None and (stats is None or not stats.running + stats.fetching):
                return
            try:
                if stats is not None and not stats.draining:
                    self.scheduler.call("drain", group, returning)
                elif stats is not None and vacates and time.monotonic() > deadline:
                    self.scheduler.call("vacate", group)
            except EngineError as error:  # the scheduler is being replaced, or the fleet is closing
                logger.warning("group %d runs empty, but for now nobody can be told: %s", group, error)
            time.sleep(DRAIN_POLL_S)

    def _say(self, words: str, progress: Progress) -> None:
        self._words.append(words)
        progress(words)


def _tell_download(keepers: Sequence[GroupKeeper], say: Report) -> None:
    """How far the first is that downloads: on one node the others wait for it."""
    starts = (keeper.starting for keeper in keepers)
    for start in starts:
        if start is not None and start.phase == DOWNLOADING:
            say(start.done, start.total)
            return
