"""What one group runs, as arrays over the rows of its resident batch: a report costs array operations, not a loop.

    row            0     1     2   ...          one column for each place in the worker's batch
    lease        [17«16 18«16+1  -1 ...]        who sits there; -1 is free
    length       [ 301   77  ...]               committed tokens, prompt included
    pending      [   1   40  ...]               committed tokens without KV yet: 1 while decoding, more while prefilling
    due          [ 513  ...]                    length at which a page fills or a grant is wanted (decoding rows)
    ring         [rows, ring]  int32            sampled tokens by position, until a page of them is written back

Imports NumPy, `messages`, `sequence` and `kvcache` ids.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.ids import GroupId
from scheduler.messages import NO_TOKEN, ROW_MASK, Command, Commands, LeaseId
from scheduler.sequence import Sequence

Ints = npt.NDArray[np.int64]

NOBODY = -1
"""No front end has this number."""


class ProtocolError(RuntimeError):
    """A leader broke the lease protocol (a gap in its reports); its group must be fenced."""


class Listener(NamedTuple):
    """A front end's part of a roster: rows[first:end]. streams: their numbers, an int64 buffer."""

    front_end: int
    first: int
    end: int
    streams: bytes


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part in a report, and which front end wants to know. Kept while reports name the same leases.

    rows: [n] of the leases still alive, grouped by front end. columns: theirs in the report's arrays; None: all, in order.
    ring_base: [n] where each row's ring begins in the flat one. audience: who wants which part of `rows`.
    """

    key: bytes
    rows: Ints
    columns: Ints | None
    ring_base: Ints
    audience: tuple[Listener, ...]


class ResidentGroup:
    """One (group, epoch): its resident batch as the scheduler knows it, and its command log.

    Invariant: `sequences[row]` is the RUNNING sequence whose lease is `lease[row]`; backlog is the sum of pending - 1.
    """

    def __init__(self, group: GroupId, epoch: int, blocks: int, rows: int, page_size: int) -> None:
        self.group = group
        self.epoch = epoch
        self.blocks = blocks
        self.ring_size = 2 * page_size  # a power of two; at most a page and one report are not yet written back
        self._ring_mask = self.ring_size - 1
        self.lease = np.full(rows, -1, np.int64)
        self.length = np.zeros(rows, np.int64)
        self.pending = np.zeros(rows, np.int64)
        self.due = np.zeros(rows, np.int64)
        self.front_end = np.zeros(rows, np.int64)
        self.stream = np.zeros(rows, np.int64)
        self.ring = np.zeros((rows, self.ring_size), np.int32)
        self.sequences: list[Sequence | None] = [None] * rows
        self.running: set[Sequence] = set()
        self.starved: list[Sequence] = []
        self.backlog = 0
        self.free_rows = list(range(rows - 1, -1, -1))
        self.reports = 0
        self.applied = 0
        self._flat_ring = self.ring.reshape(-1)
        self._front_ends: Counter[int] = Counter()  # how many sequences each has here
        self._issued = 0
        self._log: list[Command] = []
        self._roster: Roster | None = None

    # ---- the log down

    def issue(self, command: Command) -> None:
        self._log.append(command)

    def drain(self) -> Commands | None:
        """The commands issued since the last call, numbered; None if there are none."""
        if not self._log:
            return None
        batch = Commands(self._issued, tuple(self._log))
        self._issued += len(self._log)
        self._log = []
        return batch

    # ---- rows

    def seat(self, sequence: Sequence, row: int, lease: LeaseId, uncached: int) -> None:
        """Puts a sequence into a row taken from `free_rows`; `uncached` of its tokens have no KV yet."""
        self.lease[row] = lease
        self.length[row] = sequence.committed
        self.pending[row] = uncached
        self.front_end[row] = sequence.front_end
        self.stream[row] = sequence.stream
        self.sequences[row] = sequence
        self._front_ends[sequence.front_end] += 1
        self.running.add(sequence)
        self.backlog += uncached - 1

    def unseat(self, sequence: Sequence) -> None:
        """Takes it out, its committed tokens written back. Its lease is over: what is still reported of it is discarded."""
        row = sequence.row
        self.write_back(sequence, int(self.length[row]))
        self.lease[row] = -1
        self.backlog -= int(self.pending[row]) - 1
        self.sequences[row] = None
        self.running.discard(sequence)
        self._front_ends[sequence.front_end] -= 1
        if not self._front_ends[sequence.front_end]:
            del self._front_ends[sequence.front_end]
        if sequence in self.starved:
            self.starved.remove(sequence)
        self.free_rows.append(row)
        self._roster = None

    def computed(self, row: int) -> int:
        """Tokens of the row whose KV stands in its pages."""
        return int(self.length[row]) - int(self.pending[row])

    def write_back(self, sequence: Sequence, end: int) -> None:
        """Moves the tokens at positions committed..end from the ring into the sequence."""
        start = sequence.committed
        if end > start:
            ring, first, last = self.ring[sequence.row], start & self._ring_mask, end & self._ring_mask
            sequence.append(ring[first:last] if first < last else np.concatenate([ring[first:], ring[:last]]))

    # ---- reports

    def roster(self, key: bytes) -> Roster:
        """Reads a report's lease buffer; costs one comparison while the same leases run."""
        if self._roster is None or self._roster.key != key:
            self._roster = self._read_roster(key)
        return self._roster

    def _read_roster(self, key: bytes) -> Roster:
        leases = np.frombuffer(key, np.int64)
        rows = leases & ROW_MASK
        alive = self.lease.take(rows) == leases
        columns = None
        if len(self._front_ends) > 1 or not alive.all():
            owner = np.where(alive, self.front_end.take(rows), NOBODY)
            parts = [np.flatnonzero(owner == front_end) for front_end in self._front_ends]
            sizes = [len(part) for part in parts]
            columns = np.concatenate(parts) if parts else np.empty(0, np.int64)
            rows = rows.take(columns)
        else:
            sizes = [len(rows)]
        streams = self.stream.take(rows)
        audience, first = [], 0
        for front_end, size in zip(self._front_ends, sizes, strict=False):
            if size:
                audience.append(Listener(front_end, first, first + size, streams[first : first + size].tobytes()))
            first += size
        return Roster(key, rows, columns, rows * self.ring_size, tuple(audience))

    def commit_decodes(self, roster: Roster, tokens: npt.NDArray[np.int32]) -> list[int]:
        """Every lease sampled one token in each step. tokens: [steps, n]. Returns the rows that are due."""
        length = self.length.take(roster.rows)
        for sampled in tokens:
            self._flat_ring[roster.ring_base + (length & self._ring_mask)] = sampled
            length += 1
        self.length[roster.rows] = length
        due: list[int] = roster.rows[length >= self.due.take(roster.rows)].tolist()
        return due

    def commit_mixed(self, roster: Roster, tokens: npt.NDArray[np.int32], computed: npt.NDArray[np.int32]) -> list[int]:
        """The general case: prefill chunks, leases that ended early. computed: [n]. Returns the rows that are due."""
        rows = roster.rows
        sampled = np.zeros(len(rows), np.int64)
        for step in tokens:
            at = np.flatnonzero(step != NO_TOKEN)
            position = self.length[rows[at]] + sampled[at]
            self._flat_ring[roster.ring_base[at] + (position & self._ring_mask)] = step[at]
            sampled[at] += 1
        self.length[rows] += sampled
        change = sampled - computed
        self.pending[rows] += change
        self.backlog += int(change.sum())
        due: list[int] = rows[(self.length[rows] >= self.due[rows]) | (change != 0)].tolist()
        return due
