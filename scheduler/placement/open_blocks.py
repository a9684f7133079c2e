"""Which block each running sequence fills, so that whoever is to fill the same one finds it.

Imports `sequence` and the hashing.
"""

from collections.abc import Iterable
from itertools import islice

from kvcache.hashing import hash_run
from scheduler.sequence import Sequence

MOST_TOKENS = 32
"""Of the beginning of a block, by which it is found, where no stride says how many."""

MOST_FILLERS = 16
"""Sequences that fill a block which begins alike, of those that are looked at for one prompt, the newest first."""


class OpenBlocks:
    """By the chained hash of the first `stride` tokens of the block, if they are known; otherwise by that of the block before,
    as where a block begins with decoded tokens. Looked up by both, so that either is found; a collision costs a comparison.

    Costs a dictionary entry for each running sequence, changed when a block is full, and nothing at any other step.
    Invariant: who is alone under its key is in `_alone`, all others are in `_crowds`; a crowd is two or more.
    """

    def __init__(self, block_size: int, stride: int, *, enabled: bool) -> None:
        """stride: 0 if parts of blocks are not reused, only whole ones. enabled: otherwise nothing is kept."""
        self._block_size = block_size
        self.stride = stride or min(MOST_TOKENS, block_size)
        self._enabled = enabled
        self._alone: dict[int, Sequence] = {}
        self._crowds: dict[int, dict[Sequence, None]] = {}

    def turn_to(self, sequence: Sequence, block: int) -> None:
        """From now on this is the block that `sequence` fills."""
        if not self._enabled:
            return
        self.close(sequence)
        start = block * self._block_size
        key = sequence.hash_before(block)
        if sequence.committed - start >= self.stride:
            key = self._begins(sequence, start, key)
        sequence.open_key = key
        if key in self._crowds:
            self._crowds[key][sequence] = None
        elif (other := self._alone.setdefault(key, sequence)) is not sequence:
            del self._alone[key]
            self._crowds[key] = {other: None, sequence: None}

    def close(self, sequence: Sequence) -> None:
        """It fills none, or another."""
        key, sequence.open_key = sequence.open_key, None
        if key is None or self._alone.pop(key, None) is not None:
            return
        crowd = self._crowds[key]
        del crowd[sequence]
        if len(crowd) == 1:
            del self._crowds[key]
            self._alone[key] = crowd.popitem()[0]

    def alike(self, sequence: Sequence, block: int, tokens: int) -> list[Sequence]:
        """Who fills, as far as is known here, what could be this block of `sequence`, whose first `tokens` tokens count.

        The tokens before it are the same but for a collision; those in it may differ from the first one on.
        """
        start = block * self._block_size
        if tokens - start < self.stride or not (self._alone or self._crowds):
            return []
        before = sequence.hash_before(block)
        return [*self._under(self._begins(sequence, start, before)), *self._under(before)]

    def everyone(self) -> dict[Sequence, int]:
        """The key under which each is found, for the invariants."""
        crowds = {sequence: key for key, crowd in self._crowds.items() for sequence in crowd}
        return {sequence: key for key, sequence in self._alone.items()} | crowds

    def _begins(self, sequence: Sequence, start: int, before: int) -> int:
        return hash_run(sequence.buffer[start : start + self.stride].tobytes(), before)

    def _under(self, key: int) -> Iterable[Sequence]:
        if (sequence := self._alone.get(key)) is not None:
            return (sequence,)
        return islice(reversed(self._crowds.get(key, {})), MOST_FILLERS)
