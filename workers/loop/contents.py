"""What stands in the blocks of one pool, token by token, as far as it is certain. NumPy only.

    tokens       [blocks, block_size]  whose KV is in each slot
    filled       [blocks]              how many of them, as far as that is certain; 0: nobody knows
    before       [blocks]              the block before it in the block table in which it was filled; NOBODY for the first
    before_life  [blocks]              and which life of that one: whoever gets a block for himself begins its next life

So what followed a block that has been overwritten is not told any more, and nobody has to look for it.
"""

import numpy as np
import numpy.typing as npt

from kvcache.ids import BlockId
from kvcache.standing import Standing

NOBODY = -1

Blocks = npt.NDArray[np.int32]


class Contents:
    """Of a pool of so many blocks. depth: of each block in its block table. used: a stamp of its last use. salts: of those that
    are the first of prompts."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = np.zeros((blocks, block_size), np.int32)
        self.filled = np.zeros(blocks, np.int32)
        self.before = np.full(blocks, NOBODY, np.int64)
        self.before_life = np.zeros(blocks, np.int64)
        self.life = np.zeros(blocks, np.int64)
        self.depth = np.zeros(blocks, np.int32)
        self.used = np.zeros(blocks, np.int64)
        self.salts: dict[int, str] = {}

    def renew(self, blocks: Blocks) -> None:
        """They are somebody's own, or about to be overwritten: what stood there is gone."""
        self.life[blocks] += 1
        self.filled[blocks] = 0

    def link(self, before: int, blocks: Blocks, depth: int, salt: str = "") -> None:
        """They follow each other, the first of them at that depth after `before`, or as the first of prompts of `salt`."""
        if not len(blocks):
            return
        above = np.concatenate([[before], blocks[:-1]])
        self.before[blocks] = above
        self.before_life[blocks] = self.life[above]  # where there is nobody, of the last block: never read
        self.depth[blocks] = np.arange(depth, depth + len(blocks))
        if before == NOBODY:
            self.salts[int(blocks[0])] = salt

    def cut(self, blocks: Blocks) -> None:
        """What they follow is not known."""
        self.before[blocks], self.before_life[blocks] = blocks, NOBODY

    def follows(self, blocks: Blocks) -> npt.NDArray[np.bool_]:
        """[n] whether the block before it still is what it followed, and full, or there is none."""
        above = self.before[blocks]
        same = (self.before_life[blocks] == self.life[above]) & (self.filled[above] == self.block_size)
        follows: npt.NDArray[np.bool_] = same | (above == NOBODY)
        return follows

    def standing(self) -> list[Standing]:
        """All that is certain, in the order of `BlockTable.restore`."""
        known = np.flatnonzero(self.filled).astype(np.int32)
        known = known[self.follows(known)]
        used = self.used.tolist()
        for block, before in zip(*self._deepest_first(known), strict=True):
            if before != NOBODY:
                used[before] = max(used[before], used[block])  # whoever uses a block uses those before it
        told = set[int]()
        standing = []
        known = known[np.lexsort((self.depth[known], -np.array(used, np.int64)[known]))]
        for block, before, filled in zip(
            known.tolist(), self.before[known].tolist(), self.filled[known].tolist(), strict=True
        ):
            if before == NOBODY or before in told:
                told.add(block)
                content = self.tokens[block, :filled].tobytes()
                first = before == NOBODY
                standing.append(
                    Standing(BlockId(block), None if first else BlockId(before), self.salts[block] if first else "", content)
                )
        return standing

    def _deepest_first(self, blocks: Blocks) -> tuple[list[int], list[int]]:
        """The blocks, and the one before each."""
        blocks = blocks[np.argsort(-self.depth[blocks], kind="stable")]
        return blocks.tolist(), self.before[blocks].tolist()
