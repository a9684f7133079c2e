"""What a sequence holds for layers that see the last tokens only. Pure arithmetic in blocks.

Imports `config`.
"""

from dataclasses import dataclass

from scheduler.config.core import Resolved


@dataclass(frozen=True, slots=True)
class Window:
    """What stands in the block table of a sequence of which `full` blocks are computed:

        0 ─── given back ─── first ─── seen ─── full ─── being filled, granted ahead ─── first + most

    seen: full blocks before the one that is being filled, of which the next token sees something; one at least, so that what is
    published next has a parent that is held. most: blocks that a sequence holds at once. A prompt is granted as many from its
    start on, so that nobody grows beyond what was looked at when he was admitted.
    """

    seen: int
    most: int

    @staticmethod
    def of(resolved: Resolved, block_size: int) -> "Window | None":
        """Of all layers; None: some layer sees all that came before."""
        return Window._of(resolved.window, resolved, block_size)

    @staticmethod
    def of_narrow(resolved: Resolved, block_size: int) -> "Window | None":
        """Of narrow layers beside others that see all; None: there are none."""
        return Window._of(resolved.narrow, resolved, block_size)

    @staticmethod
    def _of(tokens: int | None, resolved: Resolved, block_size: int) -> "Window | None":
        if tokens is None:
            return None
        seen = max(1, -(-(tokens - 1) // block_size))
        ahead = max(resolved.prefill_ahead, resolved.grant_ahead + 1)
        return Window(seen, seen + 1 - (-ahead // block_size))

    def first(self, full: int) -> int:
        """The first block that is held."""
        return max(0, full - self.seen)

    def at_rest(self, grant_ahead: int, block_size: int) -> int:
        """Blocks that one holds while it decodes."""
        return self.seen + 1 - (-grant_ahead // block_size)

    def to_bring(self, blocks: int, depth: int) -> int:
        """All blocks of such a sequence, if what it sees after `depth` blocks is brought to it."""
        return min(blocks - self.first(depth), self.most)

    def new_blocks(self, blocks: int, depth: int) -> int:
        """Blocks beside those of a hit of `depth` blocks, of a sequence that would hold `blocks` if it saw all."""
        return min(blocks - depth, self.most - min(depth, self.seen))
