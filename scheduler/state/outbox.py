"""What the front ends are to be told about one event, gathered by front end. Filled by the core, drained by its shell.

Imports `messages`, `resident` and `sequence`.
"""

from collections.abc import Sequence as Listing

import numpy as np
import numpy.typing as npt
from msgspec import structs

from scheduler.protocol.messages import Deltas, Failure, Finished, FinishReason, Started
from scheduler.state.resident import Listener
from scheduler.state.sequence import Sequence

NO_TOKENS = Deltas(b"", b"")


class Outbox:
    """One `Deltas` for each front end and event; the ends of streams come after their tokens."""

    def __init__(self) -> None:
        self._tokens: list[tuple[int, Deltas]] = []
        self._finished: dict[int, list[Finished]] = {}
        self._logprobs: dict[int, list[tuple[int, bytes]]] = {}
        self._started: dict[int, list[Started]] = {}

    def tokens(self, audience: Listing[Listener], tokens: npt.NDArray[np.int32], advanced: int) -> None:
        """tokens: [steps, n] as committed, in the order of the audience, which is as in `Roster`. advanced: steps committed
        between the audience's positions and these."""
        for front_end, first, end, streams, positions in audience:
            part = Deltas(streams, tokens[:, first:end].tobytes(), positions=positions, advanced=advanced)
            self._tokens.append((front_end, part))

    def logprobs(self, sequence: Sequence, payload: bytes) -> None:
        self._logprobs.setdefault(sequence.front_end, []).append((sequence.stream, payload))

    def started(self, sequence: Sequence, output: bytes = b"") -> None:
        """For the first time. Said with what comes next for its front end: no message of its own. output: as in `Started`."""
        said = Started(
            sequence.stream, sequence.seed, sequence.cached_tokens or 0, _queued_s(sequence), sequence.misses, output
        )
        self._started.setdefault(sequence.front_end, []).append(said)

    def finished(
        self, sequence: Sequence, reason: FinishReason, tokens: int, message: str, failure: Failure = Failure.FAULT
    ) -> None:
        end = Finished(
            sequence.stream, reason, sequence.cached_tokens or 0, tokens, message, failure,
            queued_s=_queued_s(sequence), preemptions=sequence.preemptions, misses=sequence.misses,
        )  # fmt: skip
        self._finished.setdefault(sequence.front_end, []).append(end)

    def forget(self, front_end: int) -> None:
        """The front end has gone; nobody is left to tell."""
        self._tokens = [part for part in self._tokens if part[0] != front_end]
        self._finished.pop(front_end, None)
        self._logprobs.pop(front_end, None)
        self._started.pop(front_end, None)

    def drain(self) -> list[tuple[int, Deltas]]:
        """(front end, what it must be told), in commit order for each; starts, ends and logprobs come with its last tokens."""
        deltas, self._tokens = self._tokens, []
        starts = self._started and any(front_end in self._started for front_end, _ in deltas)
        if not (self._finished or self._logprobs or starts):
            return deltas
        last = dict(deltas)
        deltas = [(front_end, part) for front_end, part in deltas if part is not last[front_end]]
        for front_end in last.keys() | self._finished.keys() | self._logprobs.keys():
            ends, logprobs = self._finished.get(front_end, ()), self._logprobs.get(front_end, ())
            part = structs.replace(
                last.get(front_end, NO_TOKENS), finished=tuple(ends), logprobs=tuple(logprobs),
                started=tuple(self._started.pop(front_end, ())),
            )  # fmt: skip
            deltas.append((front_end, part))
        self._finished.clear()
        self._logprobs.clear()
        return deltas


def _queued_s(sequence: Sequence) -> float:
    """Until its first start; 0 before it."""
    return max(0.0, sequence.started_s - sequence.arrived_s) if sequence.cached_tokens is not None else 0.0
