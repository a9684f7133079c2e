"""What a leader knows to stand in its group's pool and in its host memory: told to a scheduler that is new to it.

Contents follow from what the log and the steps say anyway: `Start` brings the prompt and what of it stands, steps bring the
rest, and what is copied to host memory is what stood here. A step costs an entry in a list; the list is worked off in one go,
when a row is given up or there is enough of it.

Imports NumPy, `scheduler.protocol.leaders`, `batch` and `contents`.
"""

import queue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.ids import BlockId
from kvcache.standing import Standing
from scheduler.batching import Ints
from scheduler.protocol.inventory import MAX_PART_BYTES, narrow_parts, parts
from scheduler.protocol.leaders import (
    ROW_MASK,
    Command,
    Copy,
    Drop,
    Grant,
    Inventory,
    Load,
    Moved,
    Offload,
    Receive,
    Remap,
    Start,
    Trim,
)
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.beside import Beside
from workers.loop.contents import NOBODY, Blocks, Contents

MOST_STEPS = 64
"""Steps that are worked off together."""


class Offloading(NamedTuple):
    """Blocks on their way to host memory. lives: of the blocks here, then."""

    blocks: Blocks
    lives: Ints
    host_blocks: Blocks


class Ledger:
    """Follows a leader's batch: `take` comes before the batch applies a command, `note` before it collects a step, `leave` when
    it has ended a lease by itself; `moved` when all ranks have done their part of a transfer, from any thread.

    blocks: of the pool. host_blocks: in host memory. narrow_blocks: of narrow layers: of these is known beside what they stand;
    what such a model has in host memory is not told. Tokens that are not committed are not in it, and of a step for a lease
    that has ended nothing is.
    """

    def __init__(self, batch: ResidentBatch, blocks: int, host_blocks: int = 0, narrow_blocks: int = 0) -> None:
        self._batch = batch
        self._block_size = batch.block_size
        self._here, self._host = Contents(blocks, batch.block_size), Contents(host_blocks, batch.block_size)
        self._beside = None if batch.narrow is None else Beside(narrow_blocks)
        self._uses = 0  # counted by ends and transfers
        rows = len(batch.lease)
        self._lease = np.full(rows, -1, np.int64)
        self._held = np.zeros(rows, np.int64)  # blocks of the row, those included that it has given back,
        self._first = np.zeros(rows, np.int64)  # which stand before this one
        self._narrow_held, self._narrow_first = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._stands = np.zeros(rows, np.int64)  # its tokens whose KV is committed, as of the steps worked off
        self._late = np.full(rows, NOBODY, np.int64)  # a token that was sampled before there was a block for it
        self._steps: list[tuple[Launched, Ints, npt.NDArray[np.bool_]]] = []
        self._copy = np.full((3, blocks), NOBODY, np.int64)  # its block in host memory, that one's life, and its own life then
        self._offloading: dict[int, Offloading] = {}
        self._moved: queue.SimpleQueue[Moved] = queue.SimpleQueue()

    # ---- the log

    def take(self, command: Command) -> None:
        """The next command, before the batch applies it."""
        if self._beside is not None and self._takes_narrow(self._beside, command):
            return
        if isinstance(command, Start):
            self._start(command)
        elif isinstance(command, Receive):
            self._receive(np.frombuffer(command.blocks, np.int32))
        elif isinstance(command, Copy):
            self._here.renew(np.array([command.target], np.int32))
        elif isinstance(command, Offload | Load):
            self._settle()
            self._transfer(command, np.frombuffer(command.blocks, np.int32), np.frombuffer(command.host_blocks, np.int32))
        elif not isinstance(command, Grant | Remap | Drop | Trim) or self._lease[command.lease & ROW_MASK] != command.lease:
            pass
        elif isinstance(command, Grant):
            self._grant(command.lease & ROW_MASK, np.array(command.blocks, np.int32))
        elif isinstance(command, Remap):
            self._remap(command.lease & ROW_MASK, command.index, command.block)
        elif isinstance(command, Trim):
            self._trim(command.lease & ROW_MASK, command.first)
        else:
            self.leave(command.lease & ROW_MASK)

    def _takes_narrow(self, beside: Beside, command: Command) -> bool:
        """What it means for the blocks of narrow layers; whether it means nothing else."""
        if isinstance(command, Copy | Receive | Offload | Load | Remap | Trim):
            if not command.narrow:
                return False
            if isinstance(command, Copy):
                beside.renew(np.array([command.target], np.int32))
            elif isinstance(command, Receive | Load):
                beside.renew(np.frombuffer(command.blocks, np.int32))
            elif isinstance(command, Trim) and self._lease[command.lease & ROW_MASK] == command.lease:
                self._trim_narrow(beside, command.lease & ROW_MASK, command.first)
            return True
        if isinstance(command, Grant) and self._lease[command.lease & ROW_MASK] == command.lease:
            beside.renew(np.array(command.narrow, np.int32))
            self._narrow_held[command.lease & ROW_MASK] += len(command.narrow)
            return not command.blocks
        return False

    def _trim_narrow(self, beside: Beside, row: int, first: int) -> None:
        """Blocks that stand as they are, full, from now on."""
        if self._stands[row] < first * self._block_size:
            self._work_off()
        self._stand_beside(beside, row, first)

    def _stand_beside(self, beside: Beside, row: int, end: int) -> None:
        """The row's full blocks of narrow layers before that one stand beside its others."""
        narrow, first = self._batch.narrow, int(self._narrow_first[row])
        assert narrow is not None
        end = min(end, int(self._stands[row]) // self._block_size)
        if end > first:
            others = self._batch.full.ids[row, first:end]
            self._uses += 1
            beside.stand(narrow.ids[row, first:end], others, self._here.life[others], self._uses)
            self._narrow_first[row] = end

    def _start(self, start: Start) -> None:
        row, size, here = start.lease & ROW_MASK, self._block_size, self._here
        self.leave(row)
        tokens, blocks = np.frombuffer(start.tokens, np.int32)[start.first * size :], np.frombuffer(start.blocks, np.int32)
        hits = start.cached_tokens // size - start.first
        here.renew(blocks[hits:])
        here.filled[blocks[:hits]] = size
        self._enter(blocks, tokens)
        self._lease[row], self._stands[row] = start.lease, start.cached_tokens
        self._first[row], self._held[row] = start.first, start.first + len(blocks)
        if self._beside is not None:
            narrow = np.frombuffer(start.narrow, np.int32)
            self._beside.renew(narrow[max(0, start.cached_tokens // size - start.narrow_first) :])
            self._narrow_first[row], self._narrow_held[row] = start.narrow_first, start.narrow_first + len(narrow)
        if start.first:  # the first follows what it has followed
            here.link(int(blocks[0]), blocks[1:], start.first + 1)
        else:
            here.link(NOBODY, blocks, 0, start.salt)

    def _enter(self, blocks: Blocks, tokens: npt.NDArray[np.int32]) -> None:
        """What will stand in these blocks, as far as they go."""
        size, here = self._block_size, self._here
        whole = min(len(tokens) // size, len(blocks))
        here.tokens[blocks[:whole]] = tokens[: whole * size].reshape(whole, size)
        if whole < len(blocks):
            rest = tokens[whole * size :]
            here.tokens[blocks[whole], : len(rest)] = rest

    def _grant(self, row: int, blocks: Blocks) -> None:
        held, here = int(self._held[row]), self._here
        here.renew(blocks)
        here.link(int(self._batch.full.ids[row, held - 1]), blocks, held)
        if held * self._block_size < len(known := self._batch.tokens[row]):  # of its prompt not all was granted at the start
            self._enter(blocks, known[held * self._block_size :])
        self._held[row] = held + len(blocks)
        if self._late[row] != NOBODY and len(blocks):
            here.tokens[blocks[0], 0] = self._late[row]
            self._late[row] = NOBODY

    def _remap(self, row: int, index: int, block: int) -> None:
        """The twin that was published first is what the next block follows from now on."""
        if index + 1 < self._held[row]:
            after = self._batch.full.ids[row, index + 1]
            self._here.before[after], self._here.before_life[after] = block, self._here.life[block]

    def _trim(self, row: int, first: int) -> None:
        """Blocks that stand as they are, full, from now on."""
        if self._stands[row] < first * self._block_size:
            self._work_off()
        self._give_back(row, first)

    def _give_back(self, row: int, end: int) -> None:
        """The row's blocks before that one stand as they are."""
        first = int(self._first[row])
        blocks = self._batch.full.ids[row, first:end]
        filled = np.clip(self._stands[row] - self._block_size * np.arange(first, end), 0, self._block_size)
        self._here.filled[blocks] = filled
        self._uses += 1
        self._here.used[blocks] = self._uses
        self._first[row] = end

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
        table = self._batch.full.ids
        blocks = table.reshape(-1).take(rows * table.shape[1] + index).astype(np.int64)
        self._here.tokens.reshape(-1)[blocks * self._block_size + ends % self._block_size] = ids

    def leave(self, row: int) -> None:
        """Its lease has ended, and its blocks stand as they are. Nothing for a row without one."""
        if self._lease[row] == -1:
            return
        self._work_off()
        if self._beside is not None:
            self._stand_beside(self._beside, row, int(self._narrow_held[row]))
        self._give_back(row, int(self._held[row]))
        self._lease[row], self._late[row] = -1, NOBODY

    def _receive(self, blocks: Blocks) -> None:
        """Something comes there, and who starts on it says what it is, but for what the first block of a window follows."""
        self._here.renew(blocks)
        self._here.cut(blocks)

    # ---- host memory

    def moved(self, moved: Moved) -> None:
        """A transfer is over on all ranks. From any thread, before the scheduler is told."""
        self._moved.put(moved)

    def forget_transfers(self) -> None:
        """The scheduler has gone that has numbered them: those under way have failed, and others will bear their numbers."""
        self._settle()
        self._offloading.clear()

    def _transfer(self, command: Offload | Load, blocks: Blocks, host_blocks: Blocks) -> None:
        here, host = self._here, self._host
        if isinstance(command, Load):
            self._receive(blocks)
            self._copy[:, blocks] = host_blocks, host.life[host_blocks], here.life[blocks]
            return
        host.renew(host_blocks)
        above = int(here.before[blocks[0]])
        before = NOBODY if above == NOBODY else self._copy_of(above)
        known = here.follows(blocks) & (here.filled[blocks] == self._block_size)
        if before is None or not known.all() or (here.before[blocks[1:]] != blocks[:-1]).any():
            return  # what is copied there stays unknown
        host.tokens[host_blocks] = here.tokens[blocks]
        host.link(before, host_blocks, int(here.depth[blocks[0]]), here.salts.get(int(blocks[0]), ""))
        self._offloading[command.transfer] = Offloading(blocks, here.life[blocks], host_blocks)

    def _copy_of(self, block: int) -> int | None:
        """What in host memory holds the same."""
        copy, host_life, life = self._copy[:, block].tolist()
        same = copy != NOBODY and life == self._here.life[block] and host_life == self._host.life[copy]
        return copy if same and self._host.filled[copy] == self._block_size else None

    def _settle(self) -> None:
        """What has arrived in host memory stands there."""
        while not self._moved.empty():
            moved = self._moved.get()
            offloaded = self._offloading.pop(moved.transfer, None)
            if offloaded is not None and moved.ok:
                blocks, lives, host_blocks = offloaded
                self._uses += 1
                self._host.filled[host_blocks], self._host.used[host_blocks] = self._block_size, self._uses
                self._copy[:, blocks] = host_blocks, self._host.life[host_blocks], lives

    # ---- what is told

    def standing(self) -> tuple[list[Standing], list[Standing]]:
        """All that is certain of the pool, and of host memory, as `BlockTable.restore` wants it. No row may have a lease."""
        assert (self._lease == -1).all(), "who runs fills blocks meanwhile"
        self._settle()
        return self._here.standing(), self._host.standing() if self._beside is None else []

    def narrow(self) -> list[tuple[BlockId, BlockId]]:
        """Of the pool of narrow layers, after `standing`, as `BlockTable.restore_beside` wants it."""
        return [] if self._beside is None else self._beside.pairs(self._here)


def inventory(ledger: Ledger, most_bytes: int = MAX_PART_BYTES) -> list[Inventory]:
    """What the next scheduler is told, in parts of so many bytes of tokens."""
    here, host = ledger.standing()
    narrow = narrow_parts(ledger.narrow(), most_bytes)
    return [*parts(here, most_bytes), *parts(host, most_bytes, host=True), *narrow]
