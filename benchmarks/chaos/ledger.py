"""What became of every stream, fault by fault. Written by the clients' thread, read by whoever makes the faults.

Imports asks and faults.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.chaos.asks import ROUNDING, Answer, Ask
from benchmarks.chaos.faults import Fault

SAMPLES = 20
"""Of wrong answers, in words."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How an attempt ended that was not answered. what: as the client saw it. lost: it had been taken; else it was refused.
    cut: the connection ended, nothing was said. again_s: what a Retry-After says. said: the text of an error event."""

    what: str
    lost: bool
    cut: bool = False
    again_s: float | None = None
    said: str = ""


@dataclass(slots=True)
class Incident:
    """One fault, from its beginning to the next one's.

    under_way: requests at that moment. silent_s: the longest time in which no client got any output. paused_s: the longest in
    which some client got none, whatever it asked for meanwhile. whole_s: until all that there was is there again; None if that
    did not come about, for want of what is missing. ended_s: what Ctrl-C took afterwards, where the endpoint was ended. left:
    processes that outlived it. said: what the error events among `lost` said, each text once.
    """

    fault: Fault | None
    at_s: float
    under_way: int = 0
    answered: int = 0
    taken_up: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    silent_s: float = 0.0
    paused_s: float = 0.0
    whole_s: float | None = None
    missing: str = ""
    ended_s: float | None = None
    left: int = 0
    said: list[str] = field(default_factory=list)


class Ledger:
    """expected: the answer to each ask, by its number, if nothing happens; None while these are gathered. rounding: between
    their log-probabilities."""

    def __init__(self, expected: Mapping[int, Answer] | None = None, rounding: float = ROUNDING) -> None:
        self.expected = expected
        self._rounding = rounding
        self.gathered: dict[int, Answer] = {}
        self.samples: list[str] = []
        self._lock = threading.Lock()
        self._under_way: set[int] = set()
        self._last_s: dict[int, float] = {}
        self._any_s = time.monotonic()
        self.incidents = [Incident(None, self._any_s)]

    # ---- whoever makes the faults

    def begin(self, fault: Fault | None) -> Incident:
        """What happens from now on is counted as this fault's."""
        with self._lock:
            now_s = time.monotonic()
            self._close(now_s)
            self.incidents.append(Incident(fault, now_s, len(self._under_way)))
            self._any_s = now_s
            self._last_s = dict.fromkeys(self._last_s, now_s)
            return self.incidents[-1]

    def end(self) -> None:
        with self._lock:
            self._close(time.monotonic())

    def flowing(self, clients: int) -> bool:
        """So many clients have had output since the fault."""
        with self._lock:
            return sum(last_s > self.incidents[-1].at_s for last_s in self._last_s.values()) >= clients

    def _close(self, now_s: float) -> None:
        incident = self.incidents[-1]
        incident.silent_s = max(incident.silent_s, now_s - self._any_s)
        for last_s in self._last_s.values():
            incident.paused_s = max(incident.paused_s, now_s - last_s)

    # ---- the clients

    def begins(self, client: int) -> None:
        with self._lock:
            self._under_way.add(client)
            self._last_s.setdefault(client, time.monotonic())

    def ends(self, client: int) -> None:
        with self._lock:
            self._under_way.discard(client)

    def token(self, client: int, now_s: float) -> None:
        """It has got output."""
        with self._lock:
            incident = self.incidents[-1]
            incident.silent_s = max(incident.silent_s, now_s - self._any_s)
            incident.paused_s = max(incident.paused_s, now_s - self._last_s[client])
            self._any_s = self._last_s[client] = now_s

    def loses(self, client: int, loss: Loss) -> None:  # noqa: ARG002
        with self._lock:
            incident = self.incidents[-1]
            if loss.lost:
                incident.lost[loss.what] += 1
                if loss.said and loss.said not in incident.said:
                    incident.said.append(loss.said)
            else:
                after = "" if loss.again_s is None else ", Retry-After"
                incident.refused[loss.what + after] += 1

    def taken_up(self, client: int) -> None:  # noqa: ARG002
        """A stream that was cut goes on by its last event's id."""
        with self._lock:
            self.incidents[-1].taken_up += 1

    def answered(self, ask: Ask, answer: Answer) -> None:
        with self._lock:
            self.incidents[-1].answered += 1
            if self.expected is None:
                self.gathered[ask.number] = answer
            elif (apart := answer.departs_from(self.expected[ask.number], self._rounding)) is not None:
                self.incidents[-1].wrong += 1
                if len(self.samples) < SAMPLES:
                    self.samples.append(f"{self.incidents[-1].fault}: ask {ask.number}: {apart}")
