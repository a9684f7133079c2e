"""The way up from the rank, in the kernels that read a product anyway: each row adds its own adapter's part before it does
anything else with it, so that adapters take no launches of their own.

    number[row, n] += B[slot of row, n] low[row, slot of row]     in float32, before the row's kernel rounds anything

For few rows: every row reads its adapter's B by itself, the second row of an adapter out of the L2 cache, and low has been
computed for every slot, by the product's own launch. Imports torch and triton.
"""

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.lora.weights import Awaited

RANKS = 16
"""Of B at a time, for as many numbers as a program has."""


def operands(awaited: Awaited | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """low, b, slots, low's stride, as the kernels take them: without adapters they are compiled to what they are then."""
    if awaited is None:
        return None, None, None, 1
    return awaited.low, awaited.b, awaited.slots, awaited.low.stride(0)


def rank_of(awaited: Awaited | None) -> int:
    """0: nothing is awaited."""
    return 0 if awaited is None else awaited.b.shape[2]


@triton.jit
def slot_of(slots, row):
    """Of a row, and whether it has one; known since the step began, so it may be asked before the product is waited for."""
    slot = tl.load(slots + row, cache_modifier=".cg").to(tl.int64)
    return tl.maximum(slot, 0), slot >= 0


@triton.jit
def columns_of(b, n, wanted, first, RANK: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """B's columns from `first` on for numbers n, [*n's shape, COLUMNS]. b: where its slot's begins. AXIS: n's dimensions."""
    at = tl.expand_dims(n, AXIS) * RANK + first + tl.arange(0, COLUMNS)
    return tl.load(b + at, mask=tl.expand_dims(wanted, AXIS), other=0.0)


@triton.jit
def raised(columns, b, low, n, wanted, there, RANK: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """B low for numbers n, in float32. columns: the first of B. low: where the row's and part's begins, one, or for each of
    n's first dimension in as many dimensions as `columns` has. there: the row has an adapter."""
    r = tl.arange(0, COLUMNS)
    sums = tl.sum(columns.to(tl.float32) * tl.load(low + r, mask=(r < RANK) & there, other=0.0).to(tl.float32), AXIS)
    for first in range(COLUMNS, RANK, COLUMNS):
        part = tl.load(low + first + r, mask=(first + r < RANK) & there, other=0.0).to(tl.float32)
        sums += tl.sum(columns_of(b, n, wanted, first, RANK, COLUMNS, AXIS).to(tl.float32) * part, AXIS)
    return sums
