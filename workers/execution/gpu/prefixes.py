"""Which sequences of a decode step begin with the same blocks, so that attention reads these once for several of them.

Prefixes form a tree, and a row is in one set at most: it goes to that node of its path where its share of what is saved, were
all there who pass it, is largest. That is the best where all share one prompt, and near it where prompts fork. NumPy only, no
loop over rows: it is done whenever a batch's sequences change.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

LEAST_SAVED_TOKENS = 1024
"""Keys that need not be read again, from which on a set is worth the partial results that its rows then have to merge."""


@dataclass(frozen=True, slots=True)
class PrefixSets:
    """Disjoint sets of rows, those that save most first. members: [rows in sets], set by set. counts, blocks: [sets] how many
    members each has, and how many blocks their tables begin with alike."""

    members: Ints
    counts: Ints
    blocks: Ints


class PrefixFinder:
    """most_rows: in a set. multiple: of so many blocks a prefix is. least_saved: reads of blocks that a set saves."""

    def __init__(self, most_rows: int, multiple: int, least_saved: int) -> None:
        self._most_rows = most_rows
        self._multiple = multiple
        self._least_saved = max(1, least_saved)
        self._passing = np.zeros(0, np.int64)  # rows by block; zeros between calls

    def find(self, tables: Int32s, full: Ints) -> PrefixSets:
        """tables: [rows, width] block tables, ids that are small. full: [rows] blocks of each that are complete."""
        width = int(full.max(initial=0))
        tables, depth = tables[:, :width], np.arange(1, width + 1)
        passing = self._count(tables, depth <= full[:, None])
        share = (1 - 1 / np.clip(passing, 1, self._most_rows)) * (depth // self._multiple * self._multiple)
        rows = np.flatnonzero(share.max(1, initial=0.0))
        if not len(rows):
            return PrefixSets(rows, rows, rows)
        end = width - 1 - share[rows, ::-1].argmax(1)  # of equals the deepest
        order = np.lexsort((rows, tables[rows, end], -end))
        return self._divide(tables, rows[order], end[order])

    def _count(self, tables: Int32s, complete: npt.NDArray[np.bool_]) -> Ints:
        """[rows, width] rows whose tables have this block; 0 where it is not complete."""
        blocks = tables[complete]
        if len(self._passing) <= (highest := int(blocks.max(initial=0))):
            self._passing = np.zeros(2 * highest + 1, np.int64)
        np.add.at(self._passing, blocks, 1)
        passing = np.where(complete, self._passing[np.where(complete, tables, 0)], 0)  # what stands behind may be anything
        self._passing[blocks] = 0
        return passing

    def _divide(self, tables: Int32s, rows: Ints, end: Ints) -> PrefixSets:
        """Rows in order of their nodes into sets. end: [rows] the last place of each row's prefix."""
        number = np.arange(len(rows))
        node = tables[rows, end]
        begins = (np.diff(node, prepend=-1) != 0) | (np.diff(end, prepend=-1) != 0)
        starts = np.maximum.accumulate(np.where(begins, number, 0))
        first = starts + (number - starts) // self._most_rows * self._most_rows  # of each row's set
        within = np.arange(tables.shape[1]) <= end[:, None]
        alike = ((tables[rows] == tables[rows[first]]) | ~within).all(1)  # or a copy of a block stands before the same block
        rows, end, first = rows[alike], end[alike], first[alike]
        _, at, count = np.unique(first, return_index=True, return_counts=True)
        blocks = (end[at] + 1) // self._multiple * self._multiple
        saved = (count - 1) * blocks
        kept = np.argsort(-saved, kind="stable")
        kept = kept[saved[kept] >= self._least_saved]
        members = [rows[begin : begin + size] for begin, size in zip(at[kept], count[kept], strict=True)]
        return PrefixSets(np.concatenate(members) if members else rows[:0], count[kept], blocks[kept])
