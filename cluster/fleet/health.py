"""Keeps one group up: start, detect, fence, replace. One thread for each group, in the process that owns the cluster.

Imports `group`, `restarts` and `scheduler_keeper`. The scheduler notices a lost leader by itself, and a group that hangs; what
is decided here is when the group comes back, and that it goes on for another scheduler if its own dies.
"""

import logging
import threading
import time
from collections.abc import Callable

from cluster.engine import EngineError
from cluster.fleet.group import GroupHandle
from cluster.fleet.restarts import Restarts
from cluster.fleet.scheduler_keeper import LiveScheduler, SchedulerKeeper
from scheduler.server.stats import GroupStart

logger = logging.getLogger(__name__)

POLL_S = 0.5
REASON_S = 2.0
"""For the reason of a death to be known, beside what the scheduler has seen of it."""

JOIN_TIMEOUT_S = 30.0
REJOIN_S = 30.0
"""For a group to greet a scheduler that is up: it has to settle its steps and say what stands in its pool. One in a step that
may take longer has so long again."""

NewHandle = Callable[[int], GroupHandle]
"""Epoch -> the group's next life, not started yet."""


class GroupKeeper:
    """Starts a group and, when it dies or hangs, ends what is left of it and starts it again with the next epoch, as soon as
    `restarts` says. When the scheduler dies its ranks go on for the next one; should they not, they start again for free.

    added: nobody asks `up` for the error of the first start. on_gone: called once, from the keeper's thread, when such a group
    has not come up: it is not tried again. again: others serve, so its first start is tried again as any other is.
    """

    def __init__(
        self,
        group: int,
        epoch: int,
        new_handle: NewHandle,
        scheduler: SchedulerKeeper,
        *,
        restarts: Restarts,
        start_timeout_s: float,
        on_gone: Callable[[int, str], None],
        added: bool = False,
        again: bool = False,
    ) -> None:
        self.group = group
        self._new_handle = new_handle
        self._scheduler = scheduler
        self._restarts = restarts
        self._start_timeout_s = start_timeout_s
        self._on_gone = on_gone
        self._added, self._tries_again = added, again
        self.delayed = False
        """Its first start has failed, and is tried again."""
        self._handle = new_handle(epoch)
        self._scheduler_epoch = -1 if self._handle.waits else scheduler.epoch  # of the scheduler that this life serves
        self._start_s, self._up_s, self._lived_s = 0.0, time.monotonic(), 0.0  # of this life; up since it was taken over
        self._closing = threading.Event()
        self._renewing = threading.Event()
        self._decided = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, name=f"manta-keeper-{group}", daemon=True)

    @property
    def epoch(self) -> int:
        return self._handle.epoch

    @property
    def starting(self) -> GroupStart | None:
        """What the group is doing while it comes up for the first time; None afterwards."""
        return None if self._decided.is_set() else self._handle.phase

    @property
    def waits_for_room(self) -> bool:
        """Whether its start has found no place yet."""
        return self._error is None and not self._handle.placed

    def start(self) -> None:
        self._thread.start()

    def renew(self) -> None:
        """Ends this life and starts the next, at once and for free: of a group that nobody uses at this moment."""
        self._renewing.set()

    def up(self, timeout_s: float) -> bool:
        """Waits for the first start. False while it goes on. Errors: what a rank raised, EngineError."""
        decided = self._decided.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return decided

    def stop(self) -> None:
        """From now on the group's end is no failure."""
        self._closing.set()

    def close(self) -> None:
        """Ends the group and the watch. A second call does nothing."""
        self.stop()
        self._handle.kill()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=JOIN_TIMEOUT_S)
        self._handle.kill()  # one that came up between the two

    # ---- the thread

    def _keep(self) -> None:
        reason: str | None = None
        try:
            if not self._handle.adopted:
                if not self._added:  # the scheduler itself is only starting
                    self._handle.place(time.monotonic() + self._start_timeout_s)
                self._bring_up(self._scheduler.expect(self.group))
        except BaseException as error:
            if self._tries_again and isinstance(error, Exception) and not self._closing.is_set():
                reason, self.delayed = f"group {self.group} did not come up: {error}", True
            else:
                self._error = error
        self._decided.set()
        if self._added and self._error is not None and not self._closing.is_set():
            logger.error("group %d did not come up: %s", self.group, self._error)
            self._give_up(f"group {self.group} did not come up: {self._error}")
        if reason is None and self._error is None:
            reason = self._watch()
        while reason is not None:
            self._handle.kill()
            reason = self._again(reason)
        self._handle.kill()  # a life that came up while the keeper was being closed

    def _bring_up(self, live: LiveScheduler) -> None:
        self._scheduler_epoch, self._lived_s, began_s = live.epoch, 0.0, time.monotonic()
        self._handle.start(live.address, began_s + self._start_timeout_s)
        self._up_s = time.monotonic()
        self._start_s = self._up_s - began_s

    def _watch(self) -> str | None:
        """Waits for the group's end; None when the keeper itself is closed."""
        while not self._closing.is_set():
            try:
                reason = self._look()
            except Exception:  # whatever it is: without this thread its death is noticed by nobody
                if not self._closing.wait(POLL_S):
                    logger.exception("group %d could not be looked after; trying on", self.group)
                continue
            if reason is not None and not self._closing.is_set():
                self._lived_s = time.monotonic() - self._up_s
                return reason
        return None

    def _look(self) -> str | None:
        """Why it has ended, as far as is known; None while it runs."""
        reason = self._handle.wait(POLL_S)
        if reason is None and (fenced := self._scheduler.fenced(self.group, self._handle.epoch)) is not None:
            reason = self._handle.wait(REASON_S) or (self._rejoin() if fenced.cut else fenced.reason)
        if reason is None and self._renewing.is_set():
            reason = "it was asked to start anew"
        elif reason is None and not self._scheduler.up:
            self._handle.hold_on()
        elif reason is None and self._scheduler.epoch != self._scheduler_epoch:
            reason = self._rejoin()
        return reason

    def _rejoin(self) -> str | None:
        """The ranks go on for the scheduler that is up: theirs has gone, or is cut off. Why they do not; None if they do, or
        all is over."""
        deadline, last, why = 0.0, -1, ""
        while not self._closing.is_set():
            try:
                live = self._scheduler.expect(self.group)
            except EngineError:
                return None  # the cluster is closing
            if live.epoch != last:
                deadline, last = time.monotonic() + REJOIN_S, live.epoch
            elif time.monotonic() > deadline and self._handle.steps():
                deadline = time.monotonic() + REJOIN_S
            elif time.monotonic() > deadline:  # and the scheduler answers
                return f"group {self.group} did not come to the scheduler within {REJOIN_S:g} s: {why}"
            try:
                self._handle.rejoin(live.address, deadline)
            except Exception as error:
                why = str(error)
                if (reason := self._handle.wait(POLL_S)) is not None:
                    return reason
            else:
                self._scheduler_epoch = live.epoch
                logger.warning("group %d goes on as it is, epoch %d", self.group, self._handle.epoch)
                return None
        return None

    def _again(self, reason: str) -> str | None:
        """The next epoch, after a pause; why that one ended, or None when all is over."""
        try:
            live = self._scheduler.expect(self.group)
            # One that has waited for a scheduler in vain has not died of itself, nor has one that did not come to the next.
            if self._renewing.is_set():
                self._renewing.clear()
            elif live.epoch != self._scheduler_epoch:
                logger.error("%s; the scheduler was replaced", reason)
            elif not self._pause(reason):
                return None
            else:
                live = self._scheduler.expect(self.group)
        except EngineError:
            return None  # the cluster is closing
        if self._closing.is_set():
            return None
        self._handle = self._new_handle(self._handle.epoch + 1)
        try:
            self._bring_up(live)
        except Exception as error:
            return None if self._closing.is_set() else f"group {self.group} could not be started again: {error}"
        logger.warning("group %d is up again, epoch %d", self.group, self._handle.epoch)
        return self._watch()

    def _pause(self, reason: str) -> bool:
        """Before the next start; False when all is over. The group stays expected, unless it has died too often."""
        pause = self._restarts.after_death(time.monotonic(), self._lived_s, self._start_s)
        logger.error("%s; it starts again %s", reason, f"in {pause.seconds:g} s" if pause.seconds else "at once")
        if pause.spent:
            self._scheduler.rest(self.group, reason, pause.seconds)
        return not self._closing.wait(pause.seconds)

    def _give_up(self, reason: str) -> None:
        try:
            self._scheduler.lose(self.group, reason)
        except EngineError:
            logger.exception("the scheduler could not be told that group %d is lost", self.group)
        self._on_gone(self.group, reason)
