"""Processes that outlive whoever started them, so that another can take them over; and that end by themselves if nobody does.

An *owner* (the fleet of an `Engine`) says to each of its actors that it lives. An actor that has not heard of one for some time
is an *orphan*, unless it is in use: a scheduler that has groups and front ends goes on for as long as it has, and so do ranks
for as long as a scheduler says that it lives. Whoever owns the front ends ends all by ending them.

Imports `silence`; what ends a process is its actor's business.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.protocol.silence import Silence

LOOKS = 20
"""So many in the time that an owner may be silent."""

OWNER = 0


@dataclass(frozen=True, slots=True)
class Estate:
    """What an owner leaves when it dies: a scheduler and groups that serve one version of a model, as detached actors.

    namespace: Ray's, of an application. version: of the model and all that scheduler and ranks are told. adoption_timeout_s:
    after which they end, unless somebody has taken them over.
    """

    namespace: str
    version: str
    adoption_timeout_s: float

    @property
    def prefix(self) -> str:
        """Of its placement groups' names: these know no namespace."""
        return f"{self.namespace}/{self.version}/"


class OwnerWatch:
    """A thread that calls `orphaned` once, when no owner has been heard of for `timeout_s`. Time in which this process slept
    itself does not count."""

    def __init__(self, timeout_s: float, orphaned: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._orphaned = orphaned
        self._clock = clock
        self._silence = Silence(clock(), timeout_s / LOOKS)
        self.heard()
        threading.Thread(target=self._run, name="manta-owner-watch", daemon=True).start()

    def heard(self) -> None:
        """An owner has called, or the process is in use. From any thread."""
        self._silence.heard(OWNER, self._clock())

    def _run(self) -> None:
        while self._silence.look(self._clock())[OWNER] < self._timeout_s:
            time.sleep(self._timeout_s / LOOKS)
        self._orphaned()
