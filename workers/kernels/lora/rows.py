"""The rows of a step by their adapter: each adapter's together, in their order, so that products can take them tile by tile.

Triton; on the CPU under its interpreter. Beside each kernel its reference in torch stands in the tests.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_A_PASS, MOST_A_PASS = 32, 1024


class GroupedRows(NamedTuple):
    """order: [rows] int32, those of slot 0, then those of slot 1, ...; rows without an adapter are not in it. starts:
    [slots + 1] int32, where each slot's begin there."""

    order: Tensor
    starts: Tensor

    @property
    def rows(self) -> int:
        """Of the step, with an adapter or without."""
        return len(self.order)

    @property
    def slots(self) -> int:
        return len(self.starts) - 1


@triton.jit(do_not_specialize=["rows"])
def _group(slots, order, starts, rows, BLOCK: tl.constexpr):
    """One program is one slot."""
    slot = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found = tl.load(slots + at, mask=at < rows, other=-1)
        before += ((found >= 0) & (found < slot)).to(tl.int32)
    base = tl.sum(before, 0)
    tl.store(starts + slot, base)
    for first in range(0, rows, BLOCK):
        at = first + tl.arange(0, BLOCK)
        own = tl.load(slots + at, mask=at < rows, other=-1) == slot
        counted = own.to(tl.int32)
        tl.store(order + base + tl.cumsum(counted, 0) - 1, at, mask=own)
        base += tl.sum(counted, 0)
    if slot == tl.num_programs(0) - 1:
        tl.store(starts + slot + 1, base)


def group(slots: Tensor, count: int) -> GroupedRows:
    """slots: [rows] int32, each row's; negative: it has no adapter. count: of slots that there are. No wait on the host."""
    order = torch.empty_like(slots)
    starts = torch.empty(count + 1, dtype=torch.int32, device=slots.device)
    block = min(MOST_A_PASS, max(LEAST_A_PASS, int(triton.next_power_of_2(len(slots)))))
    _group[(count,)](slots, order, starts, len(slots), BLOCK=block)
    return GroupedRows(order, starts)


@triton.jit
def tile_of(starts, program, SLOTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(slot, first, end) in the order of the rows: which tile of at most ROWS rows is this program's. Programs beyond the last
    tile get a slot that is not below SLOTS. May be asked before what has grouped the rows is waited for, see `enter_last`."""
    each = tl.arange(0, PADDED)
    begins = tl.load(starts + each, mask=each < SLOTS, other=0, cache_modifier=".cg")
    ends = tl.load(starts + each + 1, mask=each < SLOTS, other=0, cache_modifier=".cg")
    tiles = (ends - begins + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    slot = tl.sum((upto <= program).to(tl.int32), 0)
    earlier = tl.sum(tl.where(upto <= program, tiles, 0), 0)
    first = tl.sum(tl.where(each == slot, begins, 0), 0) + (program - earlier) * ROWS
    return slot, first, tl.sum(tl.where(each == slot, ends, 0), 0)


def most_tiles(grouped: GroupedRows, rows: int) -> int:
    """Tiles of so many rows that there are at most, whoever has which adapter."""
    return -(-grouped.rows // rows) + min(grouped.slots, grouped.rows) - 1
