"""What stands in the blocks of a group's pool, token by token: kept by its leader, told to a scheduler that is new to it.

    tokens       [blocks, block_size]  whose KV is in each slot
    filled       [blocks]              how many of them, as far as that is certain; 0: nobody knows
    before       [blocks]              the block before it in the block table in which it was filled; NOBODY for the first
    before_life  [blocks]              and which life of that one: whoever gets a block for himself begins its next life

So what followed a block that has been overwritten is not told any more, and nobody has to look for it. Contents follow from
what the log and the steps say anyway: `Start` brings the prompt and what of it stands, steps bring the rest. A step costs an
entry in a list; the list is worked off in one go, when a row is given up or there is enough of it.

Imports NumPy, `scheduler.protocol.messages`, `batch` and `kvcache.standing`.
"""

import numpy as np
import numpy.typing as npt

from kvcache.ids import BlockId
from kvcache.standing import Standing
from scheduler.batching import Ints
from scheduler.protocol.messages import ROW_MASK, Command, Copy, Drop, Grant, Load, Receive, Remap, Start
from workers.loop.batch import Launched, ResidentBatch

NOBODY = -1
MOST_STEPS = 64
"""Steps that are worked off together."""


class Ledger:
    """Follows a leader's batch: `take` comes before the batch applies a command, `note` before it collects a step, `leave` when
    it has ended a lease by itself.

    blocks: of the pool. Tokens that are not committed are not in it, and of a step for a lease that has ended nothing is.
    """

    def __init__(self, batch: ResidentBatch, blocks: int) -> None:
        self._batch = batch
        self._block_size = size = batch.block_size
        self._tokens = np.zeros((blocks, size), np.int32)
        self._filled = np.zeros(blocks, np.int32)
        self._before = np.full(blocks, NOBODY, np.int64)
        self._before_life = np.zeros(blocks, np.int64)
        self._life = np.zeros(blocks, np.int64)
        self._depth = np.zeros(blocks, np.int32)  # in the block table in which it was filled
        self._used = np.zeros(blocks, np.int64)  # by the count of leases that have ended
        self._salts: dict[int, str] = {}  # of first blocks
        self._ends = 0
        rows = len(batch.lease)
        self._lease = np.full(rows, -1, np.int64)
        self._held = np.zeros(rows, np.int64)  # blocks of the row
        self._stands = np.zeros(rows, np.int64)  # its tokens whose KV is committed, as of the steps worked off
        self._late = np.full(rows, NOBODY, np.int64)  # a token that was sampled before there was a block for it
        self._steps: list[tuple[Launched, Ints, npt.NDArray[np.bool_]]] = []

    # ---- the log

    def take(self, command: Command) -> None:
        """The next command, before the batch applies it."""
        if isinstance(command, Start):
            self._start(command)
        elif isinstance(command, Receive | Load):
            self._renew(np.frombuffer(command.blocks, np.int32))
        elif isinstance(command, Copy):
            self._renew(np.array([command.target]))
        elif not isinstance(command, Grant | Remap | Drop) or self._lease[command.lease & ROW_MASK] != command.lease:
            pass
        elif isinstance(command, Grant):
            self._grant(command.lease & ROW_MASK, np.array(command.blocks, np.int32))
        elif isinstance(command, Remap):
            self._remap(command.lease & ROW_MASK, command.index, command.block)
        else:
            self.leave(command.lease & ROW_MASK)

    def _start(self, start: Start) -> None:
        row, size = start.lease & ROW_MASK, self._block_size
        self.leave(row)
        tokens, blocks = np.frombuffer(start.tokens, np.int32), np.frombuffer(start.blocks, np.int32)
        hits, whole = start.cached_tokens // size, min(len(tokens) // size, len(blocks))
        self._renew(blocks[hits:])
        self._filled[blocks[:hits]] = size
        self._tokens[blocks[:whole]] = tokens[: whole * size].reshape(whole, size)
        if whole < len(blocks):
            rest = tokens[whole * size :]
            self._tokens[blocks[whole], : len(rest)] = rest
        self._lease[row], self._held[row], self._stands[row] = start.lease, len(blocks), start.cached_tokens
        self._link(NOBODY, blocks, 0)
        if len(blocks):
            self._salts[int(blocks[0])] = start.salt

    def _grant(self, row: int, blocks: npt.NDArray[np.int32]) -> None:
        held = int(self._held[row])
        self._renew(blocks)
        self._link(int(self._batch.block_table[row, held - 1]) if held else NOBODY, blocks, held)
        self._held[row] = held + len(blocks)
        if self._late[row] != NOBODY and len(blocks):
            self._tokens[blocks[0], 0] = self._late[row]
            self._late[row] = NOBODY

    def _remap(self, row: int, index: int, block: int) -> None:
        """The twin that was published first is what the next block follows from now on."""
        if index + 1 < self._held[row]:
            after = self._batch.block_table[row, index + 1]
            self._before[after], self._before_life[after] = block, self._life[block]

    def _renew(self, blocks: npt.NDArray[np.int32]) -> None:
        """They are somebody's own, or about to be overwritten: what stood there is gone."""
        self._life[blocks] += 1
        self._filled[blocks] = 0

    def _link(self, before: int, blocks: npt.NDArray[np.int32], depth: int) -> None:
        """They follow each other, the first of them at that place of a block table, after `before`."""
        above = np.concatenate([[before], blocks[:-1]]) if len(blocks) else blocks
        self._before[blocks] = above
        self._before_life[blocks] = self._life[above]  # of the last block where there is nobody: never read
        self._depth[blocks] = np.arange(depth, depth + len(blocks))

    # ---- the steps

    def note(self, step: Launched, ids: Ints, live: npt.NDArray[np.bool_]) -> None:
        """A step is committed: what it sampled [n], and whose lease had not ended [n]. The arrays must stay as they are."""
        self._steps.append((step, ids, live))
        if len(self._steps) == MOST_STEPS:
            self._work_off()

    def _work_off(self) -> None:
        """Every row in it still has the lease that it had then."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        rows = np.concatenate([step.plan.rows for step, *_ in steps])
        ends = np.concatenate([step.first for step, *_ in steps]) + np.concatenate([step.plan.counts for step, *_ in steps])
        ids = np.concatenate([ids for _, ids, _ in steps])
        live = np.concatenate([live for *_, live in steps])
        samples = np.concatenate([step.samples for step, *_ in steps])
        if not live.all():
            rows, ends, ids, samples = rows[live], ends[live], ids[live], samples[live]
        self._stands[rows] = ends  # in order: the last one of a row stays
        if not samples.all():
            rows, ends, ids = rows[samples], ends[samples], ids[samples]
        index = ends // self._block_size
        inside = index < self._held.take(rows)
        if not inside.all():
            self._late[rows[~inside]] = ids[~inside]
            rows, ends, ids, index = rows[inside], ends[inside], ids[inside], index[inside]
        table = self._batch.block_table
        blocks = table.reshape(-1).take(rows * table.shape[1] + index)
        self._tokens.reshape(-1)[blocks.astype(np.int64) * self._block_size + ends % self._block_size] = ids

    def leave(self, row: int) -> None:
        """Its lease has ended, and its blocks stand as they are. Nothing for a row without one."""
        if self._lease[row] == -1:
            return
        self._work_off()
        blocks = self._batch.block_table[row, : self._held[row]]
        self._filled[blocks] = np.clip(self._stands[row] - self._block_size * np.arange(len(blocks)), 0, self._block_size)
        self._ends += 1
        self._used[blocks] = self._ends
        self._lease[row], self._late[row] = -1, NOBODY

    # ---- what is told

    def standing(self) -> list[Standing]:
        """All that is certain, in the order of `BlockTable.restore`. No row may have a lease."""
        assert (self._lease == -1).all(), "who runs fills blocks meanwhile"
        size, told = self._block_size, set[int]()
        known = np.flatnonzero(self._filled)
        above = self._before[known]
        known = known[(above == NOBODY) | ((self._before_life[known] == self._life[above]) & (self._filled[above] == size))]
        known = known[np.lexsort((self._depth[known], -self._used[known]))]
        standing = []
        for block, before, filled in zip(
            known.tolist(), self._before[known].tolist(), self._filled[known].tolist(), strict=True
        ):
            if before == NOBODY or before in told:
                told.add(block)
                content = self._tokens[block, :filled].tobytes()
                follows = None if before == NOBODY else BlockId(before)
                standing.append(Standing(BlockId(block), follows, self._salts[block] if follows is None else "", content))
        return standing
