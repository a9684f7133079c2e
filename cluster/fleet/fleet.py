"""The scheduler and its groups on Ray, as one thing: started, watched, made larger and smaller, taken down.

Imports `group`, `health`, `scheduler_keeper` and `adoption`. Whoever holds a Fleet owns every actor of it: they end with that
process or, with an estate, wait for the next Fleet of the same one.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from functools import partial

import msgspec

from cluster.config import EngineConfig
from cluster.engine import EngineError, OnFailure, Progress
from cluster.fleet.adoption import Adopted, take_over
from cluster.fleet.estate import Owner
from cluster.fleet.group import GroupHandle
from cluster.fleet.health import GroupKeeper, NewHandle
from cluster.fleet.restarts import Restarts
from cluster.fleet.scheduler_keeper import LiveScheduler, SchedulerKeeper
from scheduler.config import QueueBounds
from scheduler.protocol.orphans import Estate
from scheduler.server.stats import ClusterStatus, GroupStats
from workers.config import ResolvedWorker

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
        self._resolved = resolved
        self._log_format = log_format
        self._on_lost = on_lost
        self._keepers: dict[int, GroupKeeper] = {}
        self._epochs: dict[int, int] = {}
        self._lock = threading.Lock()
        self._words: deque[str] = deque(maxlen=64)
        self._ready = False
        self._closed = False
        self._wanted = config.groups
        self._resizing: threading.Thread | None = None

    def start(self, progress: Progress) -> None:
        """Scheduler and all groups side by side; returns when all are ready. Errors: the first group's error."""
        config, wanted = self.config, self._wanted
        deadline = time.monotonic() + config.start_timeout_s
        adopted = self._take_over(progress)
        missing = max(0, wanted - self.target)
        workers = f"{missing} group(s) of {config.tensor_parallel_size} {self._resolved.device} rank(s)"
        if adopted.next_life is not None:
            self._say(f"starting the scheduler and {workers}", progress)
        elif missing:
            self._say(f"starting {workers}", progress)
        keepers = [self._add(config.start_timeout_s) for _ in range(missing)]
        if adopted.next_life is not None:
            self.scheduler.start(config.start_timeout_s, adopted.next_life)
        for group in adopted.awaited:
            if group not in self._keepers:
                self.scheduler.lose(group, "the engine that started it has died")
        if missing:
            self._say(f"loading {config.model}", progress)
        while [keeper.group for keeper in keepers if not keeper.up(POLL_S)]:
            pass  # in slices, and asking every one, so that Ctrl-C and any group's error are heard
        while sum(group.up for group in self.groups()) < wanted:  # the leaders have yet to greet the scheduler
            if time.monotonic() > deadline:
                raise EngineError("the groups did not reach the scheduler in time: raise start_timeout_s")
            time.sleep(POLL_S)
        self._ready = True
        self._say(f"{wanted} group(s) are ready", progress)
        self.resize(self._wanted)  # another number may have been asked for meanwhile
        for group in adopted.leaving:  # its end was under way
            threading.Thread(target=self._remove, args=(group,), name=f"manta-drain-{group}", daemon=True).start()

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
        status = self.scheduler.status(maps) or ClusterStatus(phase="stopped" if self._closed else "starting")
        starts = (keeper.starting for keeper in [*self._keepers.values()])
        return msgspec.structs.replace(
            status,
            phase=status.phase if self._ready else "starting",
            model=self.config.model,
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
            if self._resizing is None and self._ready and not self._closed:
                self._resizing = threading.Thread(target=self._resize, name="manta-resize", daemon=True)
                self._resizing.start()

    def add_group(self) -> int:
        """Asks for one more group and returns its number at once: Ray's autoscaler brings a node if none has room. If it does
        not come up, the log says why, and it is no longer counted."""
        return self._add(self.config.node_timeout_s, added=True).group

    def remove_group(self, group: int) -> bool:
        """Lets a group run empty and takes it down; False if the scheduler needs it. Takes as long as its requests do, no
        longer than `drain_timeout_s`: then they start again elsewhere."""
        if not self.scheduler.call("drain", group):
            return False
        deadline = time.monotonic() + self.config.drain_timeout_s
        while self._running(group) and not self._closed:
            if time.monotonic() > deadline:
                self.scheduler.call("vacate", group)
            time.sleep(DRAIN_POLL_S)
        with self._lock:
            keeper = self._keepers.pop(group, None)
            if keeper is not None:
                self._epochs[group] = keeper.epoch + 1
        if keeper is not None:  # else it was lost for good meanwhile
            keeper.close()
            self.scheduler.lose(group, "it was not needed any more")
        return True

    def stop(self) -> None:
        """From now on no end is a failure."""
        with self._lock:
            self._closed = True
            keepers = [*self._keepers.values()]
        for keeper in keepers:
            keeper.stop()

    def close(self) -> None:
        """Ends every process of the fleet, within seconds. A second call does nothing."""
        self.stop()
        keepers = [*self._keepers.values()]
        self.scheduler.close()
        for keeper in keepers:
            with contextlib.suppress(Exception):  # nothing may keep the rest from being ended
                keeper.close()
        if self._owner is not None:
            self._owner.close()

    # ---- common

    def _take_over(self, progress: Progress) -> Adopted:
        """What another Fleet has left in this estate is kept by this one from now on."""
        if self._owner is None:
            return Adopted()
        adopted = take_over(self._owner, self.scheduler, self._handle)
        self._epochs |= adopted.epochs
        for handle in adopted.groups:
            keeper = self._keeper(handle.group, handle.epoch, partial(self._life_of, handle), self.config.start_timeout_s)
            self.scheduler.announce(handle.group)
            keeper.start()
        if adopted.next_life is None:
            self._say(f"took over the scheduler and {len(adopted.groups)} group(s)", progress)
        return adopted

    def _life_of(self, adopted: GroupHandle, epoch: int) -> GroupHandle:
        return adopted if epoch == adopted.epoch else self._handle(adopted.group, epoch)

    def _resize(self) -> None:
        while True:
            with self._lock:
                missing = self._wanted - len(self._keepers)
                if self._closed or missing == 0 or (missing < 0 and self.config.max_groups is not None):
                    self._resizing = None
                    return
                newest = max(self._keepers, default=0)
            try:
                if missing > 0:
                    logger.warning("%d groups were asked for: group %d is being added", self._wanted, self.add_group())
                elif self.remove_group(newest):
                    logger.warning("%d groups were asked for: group %d is gone", self._wanted, newest)
                else:
                    time.sleep(DRAIN_POLL_S)  # no other group is up yet
            except EngineError as error:  # the scheduler is being replaced, or the fleet is closing
                logger.warning("the number of groups cannot be changed now: %s", error)
                time.sleep(DRAIN_POLL_S)

    def _add(self, start_timeout_s: float, *, added: bool = False) -> GroupKeeper:
        with self._lock:
            if self._closed:
                raise EngineError("the cluster was shut down")
            group = next(number for number in range(len(self._keepers) + 1) if number not in self._keepers)
            epoch = self._epochs.get(group, 0)
            keeper = self._keeper(group, epoch, lambda epoch: self._handle(group, epoch), start_timeout_s, added=added)
        self.scheduler.announce(group)
        keeper.start()
        return keeper

    def _keeper(
        self, group: int, epoch: int, new_handle: NewHandle, start_timeout_s: float, *, added: bool = False
    ) -> GroupKeeper:
        keeper = self._keepers[group] = GroupKeeper(
            group, epoch, new_handle, self.scheduler,
            restarts=Restarts(self.config.max_group_restarts, self.config.restart_window_s),
            start_timeout_s=start_timeout_s, on_gone=self._gone, added=added,
        )  # fmt: skip
        return keeper

    def _handle(self, group: int, epoch: int) -> GroupHandle:
        return GroupHandle(group, epoch, self.config, self._resolved, self._log_format, self._owner)

    def _remove(self, group: int) -> None:
        try:
            self.remove_group(group)
        except EngineError as error:
            logger.warning("group %d could not be drained: %s", group, error)

    def _running(self, group: int) -> int:
        return sum(stats.running + stats.fetching for stats in self.groups() if stats.group == group)

    def _gone(self, group: int, reason: str) -> None:
        with self._lock:
            keeper = self._keepers.pop(group, None)
            self._epochs[group] = keeper.epoch + 1 if keeper is not None else 0
            lost = not self._keepers and not self._closed
        if lost:
            self._on_lost(reason)

    def _say(self, words: str, progress: Progress) -> None:
        self._words.append(words)
        progress(words)
