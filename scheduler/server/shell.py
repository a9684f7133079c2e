"""The one way into the core: the time is set, a call is made, and what follows from it is delivered, in order.

Around it are the scheduler actor's sockets (`server`), the engine without Ray (`cluster.local`) and the simulator. Each of them
makes one call at a time: by an event loop, a lock, or virtual time. Imports the core and its invariants.
"""

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from kvcache.ids import GroupId
from scheduler.core import SchedulerCore
from scheduler.placement.intake import streams_of
from scheduler.placement.limits import RequestRefused
from scheduler.protocol.leaders import Adapts, Commands, FromLeader, Moved, Refused, Report
from scheduler.protocol.messages import Abort, Alive, Deltas, Finished, FinishReason, FromFrontEnd, Request, Stop, Submit, Tally
from scheduler.server.tallies import Tallies

T = TypeVar("T")


class Shell:
    """tell_group, tell_front_end: deliver; neither may call in. clock: seconds. inside: entered around the core's own work."""

    def __init__(
        self,
        core: SchedulerCore,
        tell_group: Callable[[GroupId, Commands], None],
        tell_front_end: Callable[[int, Deltas], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        inside: contextlib.AbstractContextManager[None] | None = None,
        check_invariants: bool = False,
    ) -> None:
        self.core = core
        self.tallies = Tallies()
        self.busy_s = 0.0
        """What calls have cost, with their delivery."""
        self._tell_group = tell_group
        self._tell_front_end = tell_front_end
        self._clock = clock
        self._inside = inside or contextlib.nullcontext()
        self._check = check_invariants

    def call(self, change: Callable[[SchedulerCore], T]) -> T:
        """One call into the core, and delivery of what follows from it: also of what was committed before an error."""
        core, began_s = self.core, self._clock()
        core.now_s = began_s
        try:
            with self._inside:
                return change(core)
        finally:
            self._deliver()
            self.busy_s += self._clock() - began_s

    def front_end_says(self, front_end: int, message: FromFrontEnd) -> None:
        """What bears on the core or the tallies; that a front end lives is its shell's own."""
        if isinstance(message, Tally):
            self.tallies.add(message.metrics)
        elif not isinstance(message, Alive):
            self.call(lambda core: self._take(core, front_end, message))

    def leader_says(self, group: GroupId, message: FromLeader) -> None:
        """What bears on the core; that a rank lives is its shell's own. Errors: ProtocolError, for which the group is to be
        fenced."""
        if isinstance(message, Moved):
            self.call(lambda core: core.moved(group, message))
        elif isinstance(message, Report):
            self.call(lambda core: core.report(group, message))
        elif isinstance(message, Refused):
            self.call(lambda core: core.refuse(group, message))
        elif isinstance(message, Adapts):
            self.call(lambda core: core.adapts(group, message))

    def _take(self, core: SchedulerCore, front_end: int, message: Submit | Abort | Stop) -> None:
        if isinstance(message, Submit):
            for request in message.requests:
                try:
                    core.submit(front_end, request)
                except RequestRefused as refusal:
                    self._tell_front_end(front_end, _refused(request, refusal))
        elif isinstance(message, Abort):
            for stream in message.streams:
                core.abort(front_end, stream)
        else:
            core.end(front_end, message.stream, message.keep_tokens)

    def _deliver(self) -> None:
        """Logs before deltas: a block is never promised to a client before its group was told.

        What is taken out here is told to each, whatever becomes of the others: nobody would say it again.
        """
        if self._check:
            self.core.check()
        with self._inside:
            logs, told = self.core.take_logs(), self.core.outbox.drain()
        for group, commands in logs:
            self._tell_group(group, commands)
        for front_end, deltas in told:
            self._tell_front_end(front_end, deltas)


def _refused(request: Request, refusal: RequestRefused) -> Deltas:
    """Ends every stream of a request that was never taken in."""
    ends = tuple(
        Finished(
            stream, FinishReason.FAILED, 0, 0, str(refusal), failure=refusal.failure, retry_after_s=refusal.retry_after_s
        )
        for stream in streams_of(request)
    )
    return Deltas(b"", b"", ends)
