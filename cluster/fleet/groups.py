"""The groups of a fleet by number: who keeps each, which epoch comes next, and that numbers are used again.

Imports `group`, `health` and `scheduler_keeper`.
"""

import contextlib
import threading
from functools import partial

from cluster.config import EngineConfig
from cluster.engine import EngineError, OnFailure
from cluster.fleet.group import GroupHandle
from cluster.fleet.health import GroupKeeper, NewHandle
from cluster.fleet.ownership.owner import Owner
from cluster.fleet.restarts import Restarts
from cluster.fleet.scheduler_keeper import SchedulerKeeper
from workers.config import ResolvedWorker


class Groups:
    """Every method may be called from any thread. on_lost: told, from a thread, when the last of them will not come back."""

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedWorker,
        log_format: str,
        scheduler: SchedulerKeeper,
        owner: Owner | None,
        on_lost: OnFailure,
    ) -> None:
        self.keepers: dict[int, GroupKeeper] = {}
        self.epochs: dict[int, int] = {}
        """The next one of each group that has gone."""
        self.closed = False
        self._config, self._resolved, self._log_format = config, resolved, log_format
        self._scheduler, self._owner = scheduler, owner
        self._on_lost = on_lost
        self._lock = threading.Lock()

    def handle(self, group: int, epoch: int) -> GroupHandle:
        """A life of it, not started yet."""
        return GroupHandle(group, epoch, self._config, self._resolved, self._log_format, self._owner)

    def add(self, start_timeout_s: float, *, added: bool = False, again: bool = False) -> GroupKeeper:
        """Starts one of the lowest number that is free. added, again: as of a keeper. Errors: EngineError at the end."""
        with self._lock:
            group = next(number for number in range(len(self.keepers) + 1) if number not in self.keepers)
            keeper = self._keep(
                group, self.epochs.get(group, 0), partial(self.handle, group), start_timeout_s, added=added, again=again
            )
        self._start(keeper)
        return keeper

    def adopt(self, handle: GroupHandle, *, again: bool = False) -> GroupKeeper:
        """Keeps one that runs, or comes up. again: as of a keeper."""

        def new_handle(epoch: int) -> GroupHandle:
            return handle if epoch == handle.epoch else self.handle(handle.group, epoch)

        with self._lock:
            keeper = self._keep(handle.group, handle.epoch, new_handle, self._config.start_timeout_s, again=again)
        self._start(keeper)
        return keeper

    def renew(self, group: int) -> None:
        """Ends one that has run empty and starts it anew, with the next epoch; requests wait for it. Errors: KeyError."""
        self.keepers[group].renew()

    def remove(self, group: int) -> None:
        """Ends one for good. Errors: EngineError if the scheduler does not hear of it."""
        with self._lock:
            keeper = self.keepers.pop(group, None)
            if keeper is not None:
                self.epochs[group] = keeper.epoch + 1
        if keeper is not None:  # else it was lost for good meanwhile
            keeper.close()
            self._scheduler.lose(group, "it was not needed any more")

    def stop(self) -> None:
        """From now on no end is a failure."""
        with self._lock:
            self.closed = True
        for keeper in [*self.keepers.values()]:
            keeper.stop()

    def close(self) -> None:
        for keeper in [*self.keepers.values()]:
            with contextlib.suppress(Exception):  # nothing may keep the rest from being ended
                keeper.close()

    def _keep(
        self, group: int, epoch: int, new_handle: NewHandle, start_timeout_s: float, *, added: bool = False, again: bool = False
    ) -> GroupKeeper:
        """Holding the lock."""
        if self.closed:
            raise EngineError("the cluster was shut down")
        keeper = self.keepers[group] = GroupKeeper(
            group, epoch, new_handle, self._scheduler,
            restarts=Restarts(self._config.max_group_restarts, self._config.restart_window_s),
            start_timeout_s=start_timeout_s, on_gone=self._gone, added=added, again=again,
        )  # fmt: skip
        return keeper

    def _start(self, keeper: GroupKeeper) -> None:
        self._scheduler.announce(keeper.group)
        keeper.start()

    def _gone(self, group: int, reason: str) -> None:
        with self._lock:
            keeper = self.keepers.pop(group, None)
            if keeper is not None:  # else it has been removed meanwhile
                self.epochs[group] = keeper.epoch + 1
            lost = not self.keepers and not self.closed
        if lost:
            self._on_lost(reason)
