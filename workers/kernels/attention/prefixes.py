"""Prefixes that rows of a decode step have in common, as the kernels read them. Imports torch."""

from dataclasses import dataclass

from torch import Tensor

SET_FIELDS = 3  # where its members begin, how many they are, its tokens
FEW_SETS = 4


@dataclass(frozen=True, slots=True)
class PrefixLimits:
    """How a kernel shares prefixes. rows: of a set, at most; 1 where it cannot. tokens: a prefix is a multiple of so many."""

    rows: int
    tokens: int

    def sets(self, batch: int) -> int:
        """That a step of so many rows may have: enough for one prefix of all rows, or for a few of some. Each costs programs,
        used or not."""
        return min(batch // 2, max(FEW_SETS, -(-batch // self.rows))) if self.rows > 1 else 0


NOT_SHARED = PrefixLimits(1, 1)


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Sets of rows that begin with the same blocks. int32 on the device; a captured step follows them as they are at a replay.

    tokens: [batch or more] of each row, that its set attends to for it: fewer than its context. sets: [SET_FIELDS * sets or
    more], 0 tokens where there is none. members: [batch or more] rows, set by set.
    """

    tokens: Tensor
    sets: Tensor
    members: Tensor
