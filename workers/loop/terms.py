"""The schedulers that a group serves one after another. Whoever keeps the group says who is next; its leader waits for that.

A leader that loses its scheduler keeps its weights, its peers and what stands in its pool. But it must not wait for ever: who
is to say who is next may have gone as well. No torch, no ray.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.config import SchedulerAddress


@dataclass(frozen=True, slots=True)
class Term:
    """A group's time with one scheduler. epoch: the group's meanwhile."""

    scheduler: SchedulerAddress
    epoch: int


class SchedulerTerms:
    """The leader's loop calls `begin`, `next` and `end`; the others come from any other thread. patience_s: for word of the
    next scheduler, or that there will be one."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._next: Term | None = None  # it was called for; then it is taken, until it has begun, then it is the present one
        self._taken: Term | None = None
        self._present: Term | None = None
        self._leave: Callable[[], None] | None = None
        self._heard_s = time.monotonic()
        self._ended = False

    # ---- whoever keeps the group

    def call(self, term: Term) -> None:
        """The group is to serve this scheduler from now on, and leaves the one that it has. Returns once it has greeted it.

        Errors: ConnectionError if it has not begun: the scheduler could not be reached, another term was called for, or the
        leader's loop has ended.
        """
        with self._changed:
            self._next, self._heard_s = term, time.monotonic()
            leave = self._leave
            self._changed.notify_all()
        if leave is not None:
            leave()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or term not in (self._next, self._taken))
            if self._present != term:
                raise ConnectionError("the scheduler has gone again, or the group has")

    def hold_on(self) -> None:
        """There is no scheduler yet; there will be."""
        with self._changed:
            self._heard_s = time.monotonic()

    # ---- the leader

    def begin(self, term: Term, leave: Callable[[], None]) -> None:
        """Its scheduler has been greeted. leave: makes the leader's loop notice that it has gone; from any thread."""
        with self._changed:
            self._present, self._taken, self._leave = term, None, leave
            called = self._next is not None
            self._changed.notify_all()
        if called:
            leave()

    def next(self) -> Term | None:
        """Waits for the next term; None if nobody has said anything for too long."""
        with self._changed:
            self._present = self._taken = self._leave = None
            self._heard_s = time.monotonic()
            self._changed.notify_all()
            while self._next is None and (left_s := self._heard_s + self._patience_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            self._taken, self._next = self._next, None
            return self._taken

    def end(self) -> None:
        """The leader's loop has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
