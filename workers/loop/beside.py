"""What a leader knows to stand in its pool of narrow layers: beside which block of the group's pool. NumPy only; imports
`contents`."""

import numpy as np
import numpy.typing as npt

from kvcache.ids import BlockId
from workers.loop.contents import NOBODY, Blocks, Contents


class Beside:
    """other: [blocks] the block of the group's pool that has the other layers' part of the same tokens; NOBODY where none is
    known. other_life: [blocks] which life of that one. used: [blocks] a stamp of its last use."""

    def __init__(self, blocks: int) -> None:
        self.other = np.full(blocks, NOBODY, np.int64)
        self.other_life = np.zeros(blocks, np.int64)
        self.used = np.zeros(blocks, np.int64)

    def renew(self, blocks: Blocks) -> None:
        """They are somebody's own, or about to be overwritten."""
        self.other[blocks] = NOBODY

    def stand(self, blocks: Blocks, others: Blocks, lives: npt.NDArray[np.int64], used: int) -> None:
        """They are full, and have the narrow part of what stands in the others, in these lives of theirs."""
        self.other[blocks], self.other_life[blocks], self.used[blocks] = others, lives, used

    def pairs(self, contents: Contents) -> list[tuple[BlockId, BlockId]]:
        """Those that stand beside something that stands, with that, the most recently used first. contents: of the group's
        pool."""
        known = np.flatnonzero(self.other != NOBODY)
        others = self.other[known]
        same = (self.other_life[known] == contents.life[others]) & (contents.filled[others] == contents.block_size)
        known = known[same]
        known = known[np.argsort(-self.used[known], kind="stable")]
        return list(zip(map(BlockId, known.tolist()), map(BlockId, self.other[known].tolist()), strict=True))
