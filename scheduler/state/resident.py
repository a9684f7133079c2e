"""What one group runs, as arrays over the rows of its resident batch: a report costs array operations, not a loop.

    row            0     1     2   ...          one column for each place in the worker's batch
    lease        [17«16 18«16+1  -1 ...]        who sits there; -1 is free
    length       [ 301   77  ...]               committed tokens, prompt included
    pending      [   1   40  ...]               committed tokens without KV yet: 1 while decoding, more while prefilling
    due          [ 513  ...]                    length at which a block fills or a grant is wanted (decoding rows)
    ring         [rows, ring]  int32            sampled tokens by position, until a block of them is written back

Imports NumPy, `config`, `leaders`, `messages`, `policy`, `sequence`, `window` and `kvcache` ids.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.ids import BlockId, GroupId
from kvcache.table import SequenceBlocks
from scheduler.protocol.leaders import ROW_BITS, ROW_MASK, Command, Commands, Copy, LeaseId, Report, Start
from scheduler.protocol.messages import NO_TOKEN
from scheduler.state.experts import ExpertBalance
from scheduler.state.sequence import Sequence, State, Tokens
from scheduler.state.window import Window

Ints = npt.NDArray[np.int64]

RING_PADDING = 16
"""Keeps rows of equal length out of one set of the CPU's cache, where rings a power of two apart would all fall."""


class ProtocolError(RuntimeError):
    """A leader broke the lease protocol (a gap in its reports); its group must be fenced."""


class Listener(NamedTuple):
    """A front end's part of a roster: [first:end] of what is in its order. streams: their numbers, an int64 buffer.
    positions: how many tokens each had when the roster was made, prompt included, an int32 buffer."""

    front_end: int
    first: int
    end: int
    streams: bytes
    positions: bytes


class Roster(NamedTuple):
    """Who takes part in a report, and which front end wants to know. Kept while reports name the same leases.

    columns: of the report, those of leases still alive; None: all. rows: [n] theirs. places: the same as an index, a slice
    if they are the first n, as in a full batch: a view costs less than a copy. ring_base: [n] where each one's ring begins in
    the flat one. order: [n] of these, grouped by front end; None: as they are. audience: who wants which part of that.
    """

    key: bytes
    columns: Ints | None
    rows: Ints
    places: Ints | slice
    ring_base: Ints
    order: Ints | None
    audience: tuple[Listener, ...]


@dataclass(slots=True)
class Watch:
    """Groups to which something has happened, so that whoever looks after all groups need not ask each of them.

    told: their logs were empty, and are not now. touched: their loads may have changed. Whoever has looked empties the list,
    which may be a long time from now. Invariant: both list groups that are up, each once.
    """

    told: "list[ResidentGroup]" = field(default_factory=list)
    touched: "list[ResidentGroup]" = field(default_factory=list)

    def forget(self, group: "ResidentGroup") -> None:
        """It has gone, and is not told or touched any more."""
        for groups in (self.told, self.touched):
            if group in groups:
                groups.remove(group)


class ResidentGroup:
    """One (group, epoch): its resident batch as the scheduler knows it, and its command log.

    Invariant: `sequences[row]` is the RUNNING sequence whose lease is `lease[row]`; backlog is the sum of pending - 1.
    """

    def __init__(
        self, group: GroupId, epoch: int, blocks: int, max_num_seqs: int, block_size: int, grant_ahead: int, watch: Watch,
        window: Window | None = None, narrow: Window | None = None,
    ) -> None:  # fmt: skip
        self.group = group
        self.epoch = epoch
        self.blocks = blocks
        self._block_size = block_size
        self._grant_ahead = grant_ahead
        self._window, self._narrow = window, narrow
        self.ring_size = 2 * block_size  # a power of two; at most a block and one report are not yet written back
        self._ring_mask = self.ring_size - 1
        self.lease = np.full(max_num_seqs, -1, np.int64)
        self.length = np.zeros(max_num_seqs, np.int64)
        self.pending = np.zeros(max_num_seqs, np.int64)
        self.due = np.zeros(max_num_seqs, np.int64)
        self.front_end = np.zeros(max_num_seqs, np.uint16)
        self.stream = np.zeros(max_num_seqs, np.int64)
        self.ring = np.zeros((max_num_seqs, self.ring_size + RING_PADDING), np.int32)
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.running: set[Sequence] = set()
        self.starved: list[Sequence] = []
        self.fetching: dict[Sequence, int] = {}  # have blocks here, wait for their prefix, keep a row; tokens to compute then
        self.ports: tuple[str, ...] = ()  # of each rank, where others fetch blocks; empty: no transfers
        self.host_blocks = 0  # of each rank
        self.sending = self.receiving = 0  # blocks on their way
        self.backlog = 0
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.reports = 0
        self.life = epoch  # the epoch in which its ranks were started
        self.whole_s = math.inf  # the last moment at which all its ranks are known to have lived; inf where nobody says so
        self.draining = False  # it takes no new sequences
        self.alone: Sequence | None = None  # for whom it is kept: nobody else starts there
        self.closed = False  # to newcomers, for either reason
        self.steps = self.step_tokens = self.starts = self.lease_waits = 0  # since it came up
        self.step_s = 0.0
        self.experts = ExpertBalance()
        self._flat_ring = self.ring.reshape(-1)
        self._all_rows = np.arange(max_num_seqs)
        self._ring_starts = self._all_rows * self.ring.shape[1]
        self._front_ends: dict[int, int] = {}  # front end -> the number that stands for it in `front_end`
        self._issued = 0
        self._log: list[Command] = []
        self.touched = False
        self._watch = watch
        self._roster: Roster | None = None
        self._advanced = 0  # steps committed since the positions of the roster's audience were taken, a token each

    def set_draining(self, draining: bool) -> None:
        """Whether it takes no new sequences from now on."""
        self.draining, self.closed = draining, draining or self.alone is not None
        self.touch()

    def keep_for(self, sequence: Sequence | None) -> None:
        """Until that one's lease ends; None: for nobody from now on."""
        self.alone, self.closed = sequence, self.draining or sequence is not None
        self.touch()

    @property
    def rows_left(self) -> int:
        return len(self.free_rows) - len(self.fetching)

    @property
    def coming(self) -> int:
        """Tokens to compute of those who run, and of those whose prefix is on its way."""
        return self.backlog + sum(self.fetching.values()) if self.fetching else self.backlog

    # ---- the log down

    def issue(self, command: Command) -> None:
        if not self._log:
            self._watch.told.append(self)
        self._log.append(command)
        self.touch()

    def copy(self, source: BlockId, target: BlockId, tokens: int) -> None:
        """The part of a block that a hit ends with; once this is in the log, `source` may be granted again."""
        self.issue(Copy(source, target, tokens))

    def copy_narrow(self, source: BlockId, target: BlockId, tokens: int) -> None:
        """The same of narrow layers."""
        self.issue(Copy(source, target, tokens, narrow=True))

    def touch(self) -> None:
        """Its load may have changed: what waits or runs there, or the blocks that are left."""
        if not self.touched:
            self.touched = True
            self._watch.touched.append(self)

    def drain(self) -> Commands | None:
        """The commands issued since the last call, numbered; None if there are none."""
        if not self._log:
            return None
        batch = Commands(self._issued, tuple(self._log))
        self._issued += len(self._log)
        self._log = []
        return batch

    # ---- rows

    def seat(self, sequence: Sequence, serial: int, cached_tokens: int) -> None:
        """Starts a sequence that has its blocks, in a row and with a new lease; the KV of its first `cached_tokens` stands."""
        blocks, narrow = sequence.blocks, sequence.narrow
        assert blocks is not None
        held = blocks.held if blocks.first else blocks.blocks
        row = self.free_rows.pop()
        lease, pending = LeaseId(serial << ROW_BITS | row), sequence.committed - cached_tokens
        sequence.state, sequence.row, sequence.lease = State.RUNNING, row, lease
        self.lease[row] = lease
        self.length[row] = sequence.committed
        self.pending[row] = pending
        self.front_end[row] = self._front_ends.setdefault(sequence.front_end, len(self._front_ends))
        self.stream[row] = sequence.stream
        self.sequences[row] = sequence
        self.running.add(sequence)
        self.backlog += pending - 1
        self.starts += 1
        self.schedule(sequence, sequence.committed, cached_tokens // self._block_size)
        self.issue(
            Start(
                lease=lease, tokens=sequence.buffer[: sequence.committed].tobytes(), prompt_tokens=sequence.prompt_tokens,
                cached_tokens=cached_tokens, blocks=np.array(held, np.int32).tobytes(),
                params=sequence.params, seed=sequence.seed, choice=sequence.choice, stop_ids=sequence.stop_ids,
                max_tokens=sequence.max_tokens, salt=sequence.salt, pooling=sequence.pooling, first=blocks.first,
                adapter=sequence.adapter, narrow=b"" if narrow is None else np.array(narrow.held, np.int32).tobytes(),
                narrow_first=0 if narrow is None else narrow.first,
            )
        )  # fmt: skip

    def unseat(self, sequence: Sequence) -> None:
        """Takes it out. Its lease is over: what is still reported of it is discarded."""
        row = sequence.row
        self.lease[row] = -1
        self.backlog -= self.pending.item(row) - 1
        self.sequences[row] = None
        self.running.discard(sequence)
        if not self.running:
            self._front_ends.clear()
        if sequence in self.starved:
            self.starved.remove(sequence)
        self.free_rows.append(row)
        if self.alone is sequence:
            self.keep_for(None)
        sequence.lease, sequence.row = None, -1
        self._roster = None
        self.touch()

    def schedule(self, sequence: Sequence, length: int, full: int) -> bool:
        """Says when its row is due next: the length at which it fills a block or runs low, while it decodes.

        length: its tokens. full: blocks that it has filled. Returns whether it runs low already. What is granted of a prompt
        that is seen through a window is less than there is to compute: such a row is due with each of its chunks anyway.
        """
        assert sequence.blocks is not None
        block_size, blocks = self._block_size, len(sequence.blocks.blocks)
        filled = (full + 1) * block_size + 1
        low = blocks * block_size - self._grant_ahead + 1
        self.due[sequence.row] = filled if blocks == sequence.blocks_at_most or filled < low else low
        short = length >= low and blocks < (sequence.blocks_at_most if self._window is None else self.wanted(sequence, length))
        return short if sequence.narrow is None else self._schedule_narrow(sequence, sequence.narrow, length) or short

    def _schedule_narrow(self, sequence: Sequence, narrow: SequenceBlocks, length: int) -> bool:
        """It is due earlier where the blocks of its narrow layers run low first. Returns whether they do already."""
        blocks = len(narrow.blocks)
        low = blocks * self._block_size - self._grant_ahead + 1
        if blocks < sequence.blocks_at_most:
            self.due[sequence.row] = min(self.due.item(sequence.row), low)
        return length >= low and blocks < self.wanted_narrow(sequence, narrow, length)

    def wanted(self, sequence: Sequence, length: int) -> int:
        """Where the block table of a sequence with so many tokens should end."""
        assert sequence.blocks is not None
        wanted = min(-(-(length + self._grant_ahead) // self._block_size), sequence.blocks_at_most)
        return wanted if self._window is None else min(wanted, sequence.blocks.first + self._window.most)

    def wanted_narrow(self, sequence: Sequence, narrow: SequenceBlocks, length: int) -> int:
        """Where the block table of its narrow layers should."""
        assert self._narrow is not None
        return min(self.wanted(sequence, length), narrow.first + self._narrow.most)

    def holder(self, lease: int) -> Sequence | None:
        """The sequence that still holds it, None if it has ended."""
        sequence = self.sequences[lease & ROW_MASK]
        return sequence if sequence is not None and sequence.lease == lease else None

    def computed(self, row: int) -> int:
        """Tokens of the row whose KV stands in its blocks."""
        return self.length.item(row) - self.pending.item(row)

    def ahead_of(self, row: int) -> int:
        """Tokens to compute of those who started before the row: as a rule those come first."""
        older = (self.lease >= 0) & (self.lease < self.lease[row])
        return int((self.pending[older] - 1).sum())

    def write_back(self, sequence: Sequence, end: int | None = None) -> None:
        """Moves the tokens at positions committed..end, None: all of them, from the ring into the sequence."""
        start = sequence.committed
        end = self.length.item(sequence.row) if end is None else end
        if end > start:
            ring, first, last = self.ring[sequence.row], start & self._ring_mask, (end - 1 & self._ring_mask) + 1
            if first >= last:  # it wraps around
                sequence.append(ring[first : self.ring_size])
                first = 0
            sequence.append(ring[first:last])

    def tail(self, sequence: Sequence) -> Tokens:
        """Of the block that it fills the tokens whose KV stands, less than a block of them; a view."""
        end = self.computed(sequence.row)
        start = end - end % self._block_size
        if sequence.committed <= start:
            first = start & self._ring_mask  # the ring is two blocks: what begins with one does not wrap around inside it
            return self.ring[sequence.row, first : first + end - start]
        self.write_back(sequence, end)
        return sequence.buffer[start:end]

    # ---- reports

    def commit(
        self, report: Report
    ) -> tuple[list[int], int, int, tuple[Listener, ...], npt.NDArray[np.int32], int]:  # fmt: skip
        """The report's tokens become true. Returns the rows that are due; how many tokens were sampled, and how many computed;
        and for the front ends the audience, the tokens in its order, and the steps between its positions and these."""
        roster = self._roster
        if roster is None or roster.key != report.leases:  # while the same leases run it costs this comparison
            roster, self._advanced = self._read_roster(report.leases), 0
            self._roster = roster
        columns, advanced = roster.columns, self._advanced
        tokens = np.frombuffer(report.tokens, np.int32).reshape(report.steps, -1)
        if columns is not None:
            tokens = tokens.take(columns, axis=1)
        if not report.computed:
            due = self._commit_decodes(roster, tokens)
            sampled = computed = tokens.size
        else:
            counts = np.frombuffer(report.computed, np.int32)
            counts = counts if columns is None else counts.take(columns)
            due = self._commit_mixed(roster, tokens, counts)
            sampled, computed = int(np.count_nonzero(tokens != NO_TOKEN)), int(counts.sum())
        self.reports += 1
        self.steps += report.steps
        self.step_s += report.elapsed_s
        self.step_tokens += computed
        if report.expert_load is not None:
            self.experts.take(report.expert_load)
        told = tokens if roster.order is None else tokens.take(roster.order, axis=1)
        return due, sampled, computed, roster.audience, told, advanced

    def _read_roster(self, key: bytes) -> Roster:
        count, columns = len(key) // 8, None
        rows: Ints = self._all_rows[:count]
        places: Ints | slice = slice(count)
        if self.lease[places].tobytes() != key:  # not a full batch whose leases all live
            leases = np.frombuffer(key, np.int64)
            rows = places = leases & ROW_MASK
            present = self.lease.take(rows)
            if present.tobytes() != key:
                columns = (present == leases).nonzero()[0]
                rows = places = rows.take(columns)
        order, audience = self._group(places, len(rows))
        return Roster(key, columns, rows, places, self._ring_starts[places], order, audience)

    def _group(self, places: Ints | slice, count: int) -> tuple[Ints | None, tuple[Listener, ...]]:
        """(order, audience) of a roster with so many rows."""
        streams, lengths, ends, order = self.stream[places], self.length[places], [count], None
        if len(self._front_ends) > 1:
            # NumPy sorts both by radix, and half the bytes in half the time.
            numbers = self.front_end[places].astype(np.uint8 if len(self._front_ends) <= 1 << 8 else np.uint16)
            order = numbers.argsort(kind="stable")
            streams, lengths = streams.take(order), lengths.take(order)
            ends = np.bincount(numbers, minlength=len(self._front_ends)).cumsum().tolist()
        positions = lengths.astype(np.int32)
        return order, tuple(
            Listener(front_end, first, end, streams[first:end].tobytes(), positions[first:end].tobytes())
            for front_end, first, end in zip(self._front_ends, [0, *ends], ends, strict=False)
            if end > first
        )

    def _renew_positions(self, roster: Roster) -> None:
        """After a report in which not every lease has advanced by as much."""
        lengths = self.length[roster.places] if roster.order is None else self.length[roster.places].take(roster.order)
        positions = lengths.astype(np.int32)
        audience = (
            Listener(front_end, first, end, streams, positions[first:end].tobytes())
            for front_end, first, end, streams, _ in roster.audience
        )
        self._roster, self._advanced = roster._replace(audience=tuple(audience)), 0

    def _commit_decodes(self, roster: Roster, tokens: npt.NDArray[np.int32]) -> list[int]:
        """Every lease sampled one token in each step. tokens: [steps, n]. Returns the rows that are due."""
        length = self.length[roster.places]
        for sampled in tokens:
            at = length & self._ring_mask
            at += roster.ring_base
            self._flat_ring[at] = sampled
            length += 1
        self.length[roster.places] = length
        self._advanced += len(tokens)
        due = (length >= self.due[roster.places]).nonzero()[0]
        rows: list[int] = roster.rows.take(due).tolist()
        return rows

    def _commit_mixed(self, roster: Roster, tokens: npt.NDArray[np.int32], computed: npt.NDArray[np.int32]) -> list[int]:
        """The general case: prefill chunks, leases that ended early. computed: [n]. Returns the rows that are due."""
        rows = roster.rows
        sampled = np.zeros(len(rows), np.int64)
        for step in tokens:
            at = np.flatnonzero(step != NO_TOKEN)
            position = self.length[rows[at]] + sampled[at]
            self._flat_ring[roster.ring_base[at] + (position & self._ring_mask)] = step[at]
            sampled[at] += 1
        self.length[rows] += sampled
        self._renew_positions(roster)
        change = sampled - computed
        self.pending[rows] += change
        self.backlog += int(change.sum())
        self.touch()
        due: list[int] = rows[(self.length[rows] >= self.due[rows]) | (change != 0)].tolist()
        return due
