"""Keeps one group up: detect, fence, replace. One thread for each group, in the process that launched the cluster.

Imports `group` and ray. The scheduler notices a lost leader by itself, at its socket; what is decided here is whether the
group comes back.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.group import GroupHandle
from workers.actor import SchedulerAddress

logger = logging.getLogger(__name__)

POLL_S = 1.0
CALL_TIMEOUT_S = 30.0

NewHandle = Callable[[int], GroupHandle]


class GroupKeeper:
    """Watches a started group and starts it again, with the next epoch, at most `restarts` times.

    on_gone: called once, from the keeper's thread, when the group will not come back.
    """

    def __init__(
        self,
        handle: GroupHandle,
        new_handle: NewHandle,
        scheduler: Any,
        address: SchedulerAddress,
        restarts: int,
        start_timeout_s: float,
        on_gone: Callable[[int, str], None],
    ) -> None:
        self._handle = handle
        self._new_handle = new_handle
        self._scheduler = scheduler
        self._address = address
        self._restarts = restarts
        self._start_timeout_s = start_timeout_s
        self._on_gone = on_gone
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"manta-keeper-{handle.group}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """From now on the group's end is no failure."""
        self._closing.set()

    def close(self) -> None:
        """Ends the group and the watch. A second call does nothing."""
        self.stop()
        self._handle.kill()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=CALL_TIMEOUT_S)
        self._handle.kill()  # one that came up between the two

    def _keep(self) -> None:
        reason = self._watch()
        while reason is not None:
            self._handle.kill()
            logger.error("%s; %d restarts left", reason, self._restarts)
            if not self._restarts:
                self._give_up(reason)
                return
            self._restarts -= 1
            reason = self._restart() or self._watch()

    def _watch(self) -> str | None:
        """Waits for the group's end; None when the keeper itself is closed."""
        while not self._closing.is_set():
            reason = self._handle.wait(POLL_S)
            if reason is not None and not self._closing.is_set():
                return reason
        return None

    def _restart(self) -> str | None:
        """The next epoch; why it could not start, or None if it did."""
        self._handle = self._new_handle(self._handle.epoch + 1)
        try:
            ray.get(self._scheduler.expect.remote(self._handle.group), timeout=CALL_TIMEOUT_S)
            self._handle.start(self._address, time.monotonic() + self._start_timeout_s)
        except Exception as error:
            return f"group {self._handle.group} could not be started again: {error}"
        logger.warning("group %d is up again, epoch %d", self._handle.group, self._handle.epoch)
        return None

    def _give_up(self, reason: str) -> None:
        if self._closing.is_set():
            return
        try:
            ray.get(self._scheduler.group_lost.remote(self._handle.group, reason), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError:
            logger.exception("the scheduler could not be told that group %d is lost", self._handle.group)
        self._on_gone(self._handle.group, reason)
