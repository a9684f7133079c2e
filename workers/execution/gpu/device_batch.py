"""The batch as it lives on the device: last tokens, positions, sampling settings and block tables of every row.

    last_token  [rows + 1]        int32   written by the sampler, read by the next step; by the host at a start alone
    position    [rows + 1]        int32   of the token to compute next; each decode moves it on
    order       [most]            int32   rows of the next decode step, then padding
    settings    [rows + 1, 16]    int32   how each row samples (`kernels.sampling.record`)
    tables      [rows + 1, blocks] int32   block tables; of narrow layers beside others once more
    prefixes    [most], [sets * 3], [most] int32   which of the next decode step share a prefix (`attention.prefixes`)
    adapters    [rows + 1]        int32   slots of their LoRA adapters

All of it is one tensor, so whatever has changed on the host since the last step is one list of (place, value), one pinned copy
and one kernel; where nothing has changed, nothing is sent. The last row is padding: its blocks are the scratch block, which no
sequence is ever granted, and its position stays 0. Imports torch, NumPy and the kernels of the batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.execution.gpu.pinned import PinnedRing
from workers.execution.gpu.prefixes import LEAST_SAVED_TOKENS, PrefixFinder
from workers.kernels.attention.prefixes import NOT_SHARED, SET_FIELDS, PrefixLimits, SharedPrefixes
from workers.kernels.batch import gather, scatter
from workers.kernels.sampling.record import WORDS
from workers.loop.batch import NO_ADAPTER, Launched, ResidentBatch

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

IN_FLIGHT = 4
"""Pinned buffers of each kind: more than the steps that are ever under way."""


class NarrowTables(NamedTuple):
    """Of narrow layers, as `DeviceBatch` has them of the others: tables, slots, step_tables."""

    tables: Tensor
    slots: Tensor
    step_tables: Tensor


class DeviceBatch:
    """max_num_seqs: rows of the batch. blocks: width of a block table. most: sequences in one decode step. scratch_block: where
    padding writes. narrow_scratch: the same of narrow layers, where these have block tables of their own. prefixes: how
    attention shares them.

    Invariant: before each decode step the device's positions of its rows are the host's, and nothing else of it is read.
    """

    def __init__(
        self, *, max_num_seqs: int, blocks: int, block_size: int, most: int, scratch_block: int, device: torch.device,
        prefixes: PrefixLimits = NOT_SHARED, narrow_scratch: int | None = None,
    ) -> None:  # fmt: skip
        self.padding = max_num_seqs
        self.scratch_slot = scratch_block * block_size
        self.narrow_scratch_slot = 0 if narrow_scratch is None else narrow_scratch * block_size
        self.longest = blocks * block_size
        self._block_size = block_size
        self._width = blocks
        self._limits = prefixes
        self._finder = PrefixFinder(
            prefixes.rows, max(1, prefixes.tokens // block_size), -(-LEAST_SAVED_TOKENS // block_size)
        )
        self._of_prefixes = most, prefixes.sets(most) * SET_FIELDS, most
        rows = max_num_seqs + 1
        sizes = [rows, rows, most, sum(self._of_prefixes), rows, rows * WORDS, rows * blocks]
        sizes += [] if narrow_scratch is None else [rows * blocks]
        starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._last_token, self._position, self._order, self._prefixes, self._adapters = starts[:5]
        self._settings, self._tables = starts[5], starts[6:-1]
        state = np.zeros(starts[-1], np.int32)
        state[self._order : self._order + most] = self.padding
        state[self._adapters : self._adapters + rows] = NO_ADAPTER
        for end, block in zip(starts[7:], (scratch_block, narrow_scratch or 0), strict=False):
            state[end - blocks : end] = block
        self._state = torch.from_numpy(state).to(device)
        parts = self._state.split_with_sizes(sizes)
        self.last_token, self.position, self.order = parts[:3]
        self.prefixes = SharedPrefixes(*parts[3].split_with_sizes(self._of_prefixes))
        self.adapters = parts[4]
        self.settings = parts[5].view(rows, WORDS)
        self.tables = parts[6].view(rows, blocks)
        # the inputs of a decode step, where a graph reads them
        self.tokens, self.positions, self.contexts = (torch.zeros(most, dtype=torch.int32, device=device) for _ in range(3))
        self.slots = torch.zeros(most, dtype=torch.int64, device=device)
        self.step_tables = torch.zeros(most, blocks, dtype=torch.int32, device=device)
        self.narrow: NarrowTables | None = None
        if narrow_scratch is not None:
            beside = parts[7].view(rows, blocks)
            self.narrow = NarrowTables(beside, torch.zeros_like(self.slots), torch.zeros_like(self.step_tables))
        # the host's idea of what the device holds
        self._known_order = np.full(most, self.padding, np.int32)
        self._known_position = np.zeros(max_num_seqs + 1, np.int64)
        self._known_adapters = np.full(max_num_seqs, NO_ADAPTER, np.int32)
        self._known_prefixes = np.zeros(sum(self._of_prefixes), np.int32)
        self._grouped = np.zeros(0, np.int64)  # the decodes of which they are
        self._admitted: dict[int, tuple[int, Int32s]] = {}
        self._ring = PinnedRing(device, IN_FLIGHT, 4096)
        self._edits = torch.zeros(8192, dtype=torch.int32, device=device)

    def admit(self, row: int, last_token: int, record: Int32s) -> None:
        """A sequence enters at `row`. record: [WORDS] its sampling settings. On the device before the next step."""
        self._admitted[row] = (last_token, record)

    def update(self, batch: ResidentBatch, step: Launched, padded: int) -> None:
        """Brings the device up to what the log has said, for `step`; its decodes are the first of `padded` sequences."""
        rows, first = step.plan.rows[: step.plan.decodes], step.first[: step.plan.decodes]
        places: list[Int32s | Ints] = []
        values: list[Int32s | Ints] = []
        for place, value in self._changes(batch, rows, first, padded):
            places.append(place)
            values.append(value)
        self._known_position[rows] = first + 1
        if places:
            self._send(np.concatenate(places), np.concatenate(values))

    def gather(self, padded: int) -> None:
        """The inputs of a decode step of the first `padded` of `order`; on the device alone, so it may be captured."""
        gather(
            self.order, self.last_token, self.position, self.tables, tokens=self.tokens, positions=self.positions,
            slots=self.slots, contexts=self.contexts, step_tables=self.step_tables, block_size=self._block_size, batch=padded,
            narrow=self.narrow,
        )  # fmt: skip

    def _changes(
        self, batch: ResidentBatch, rows: Ints, first: Ints, padded: int
    ) -> Iterator[tuple[Int32s | Ints, Int32s | Ints]]:
        """(places, values); a place that comes twice brings the same value."""
        for row, (token, record) in self._admitted.items():
            yield np.array([self._last_token + row]), np.array([token])
            yield self._settings + row * WORDS + np.arange(WORDS), record
        self._admitted.clear()
        for at, tables in zip(self._tables, batch.kinds, strict=True):
            for row, begin, end in tables.edited:
                yield at + row * self._width + np.arange(begin, end), tables.ids[row, begin:end]
        order = np.full(padded, self.padding, np.int32)
        order[: len(rows)] = rows
        moved = np.flatnonzero(order != self._known_order[:padded])
        if len(moved):
            self._known_order[:padded] = order
            yield self._order + moved, order[moved]
        if self._limits.rows > 1 and (self._remapped(batch) or not np.array_equal(rows, self._grouped)):
            self._grouped = rows.copy()
            # Blocks of each that are complete; where a beginning has been given back its ids say nothing.
            full = np.where(batch.full.first[rows], 0, first // self._block_size)
            prefixes = self._find_prefixes(batch.full.ids[rows, : full.max(initial=0)], full)
            changed = np.flatnonzero(prefixes != self._known_prefixes)
            self._known_prefixes = prefixes
            yield self._prefixes + changed, prefixes[changed]
        changed_rows = rows[self._known_adapters[rows] != batch.adapter[rows]]
        if len(changed_rows):
            self._known_adapters[changed_rows] = batch.adapter[changed_rows]
            yield self._adapters + changed_rows, batch.adapter[changed_rows]
        stale = rows[self._known_position[rows] != first]
        if len(stale):
            yield self._position + stale, first[self._known_position[rows] != first]

    def _remapped(self, batch: ResidentBatch) -> bool:
        """A block that holds a sequence's beginning is another one now."""
        return any(begin * self._block_size < self._known_position[row] for row, begin, _ in batch.full.edited)

    def _find_prefixes(self, tables: Int32s, full: Ints) -> Int32s:
        """What `prefixes` is to say. tables, full: of the decodes, as `PrefixFinder.find` takes them."""
        found = self._finder.find(tables, full)
        kept = self._limits.sets(len(tables))
        counts, common = found.counts[:kept], found.blocks[:kept] * self._block_size
        ends = np.cumsum(counts)
        rows = found.members[: counts.sum()]
        tokens, sets, members = (np.zeros(size, np.int32) for size in self._of_prefixes)
        tokens[rows], members[: len(rows)] = np.repeat(common, counts), rows
        sets[: SET_FIELDS * len(counts)] = np.stack([ends - counts, counts, common], 1).ravel()
        return np.concatenate([tokens, sets, members])

    def _send(self, places: Ints, values: Ints) -> None:
        count = len(places)
        if len(self._edits) < 2 * count:
            self._edits = torch.zeros(4 * count, dtype=torch.int32, device=self._edits.device)
        self._ring.send(np.concatenate([places, values]).astype(np.int32), self._edits)
        scatter(self._state, self._edits, count)
