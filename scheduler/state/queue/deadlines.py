"""Sequences by their deadlines. Imports `sequence`."""

import heapq
import math
from collections.abc import Mapping

from scheduler.state.sequence import Sequence

FEWEST_KEPT = 256


class Deadlines:
    """A heap of (deadline, stream): asking whether one has passed costs a comparison with `next_s`, the first of them.

    It names sequences instead of holding them, and is cleared of those that have ended when they are the larger part, so that
    long deadlines of short requests keep nothing alive.
    """

    def __init__(self, live: Mapping[tuple[int, int], Sequence]) -> None:
        """live: the sequences that have not ended, by front end and stream."""
        self.next_s = math.inf
        self._live = live
        self._heap: list[tuple[float, int, tuple[int, int]]] = []

    def add(self, sequence: Sequence) -> None:
        if len(self._heap) > 2 * len(self._live) + FEWEST_KEPT:
            self._heap = [entry for entry in self._heap if self._find(entry) is not None]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (sequence.deadline_s, sequence.number, (sequence.front_end, sequence.stream)))
        self.next_s = self._heap[0][0]

    def passed(self, now_s: float) -> Sequence | None:
        """Takes out the next sequence whose deadline has passed before it ended, None if there is none."""
        while self._heap and self.next_s <= now_s:
            sequence = self._find(heapq.heappop(self._heap))
            self.next_s = self._heap[0][0] if self._heap else math.inf
            if sequence is not None:
                return sequence
        return None

    def __len__(self) -> int:
        return len(self._heap)

    def _find(self, entry: tuple[float, int, tuple[int, int]]) -> Sequence | None:
        sequence = self._live.get(entry[2])
        return sequence if sequence is not None and sequence.number == entry[1] else None
