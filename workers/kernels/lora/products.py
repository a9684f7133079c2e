"""Low-rank products of many adapters at once: down to the rank, and up again onto the product of the whole weight.

    low[row] = A[slot of row] x[row]                 split along x where there are few rows, in float32
    product[row] += B[slot of row] low[row]          each number by one program, so the sum has one order

A program takes a tile of rows of one adapter; rows without one are in no tile and cost nothing. Everything is driven by device
tensors. After Punica's SGMV (arXiv 2310.18547). Triton; on the CPU under its interpreter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, enter_last, interpreted
from workers.kernels.lora.rows import GroupedRows, most_tiles, tile_of

FEW_ROWS, SOME_ROWS = 32, 256
"""Of a step: up to so many, x is split among programs, and tiles are small."""

LONGEST_SHARE, MOST_SHARES = 512, 8
WIDEST = 64
"""Columns of A's product in a tile."""


@dataclass(frozen=True, slots=True)
class LoraTiling:
    """rows: of a tile. columns: of x in a step of the loop. width: of the numbers that a program makes. shares: of x."""

    rows: int
    columns: int
    width: int
    shares: int
    warps: int = 4


@triton.jit(do_not_specialize=["rows"])
def _shrink(x, a, low, order, starts, rows, x_stride, K: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
            PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr,
            PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program: a tile of rows of one adapter, WIDTH rows of its A, a share of x."""
    enter_last(PDL)
    slot, first, end = tile_of(starts, tl.program_id(0), SLOTS, PADDED, ROWS)
    if slot >= SLOTS:
        return
    share = tl.program_id(2)
    index = first + tl.arange(0, ROWS)
    there = index < end
    row = tl.load(order + index, mask=there, other=0, cache_modifier=".cg").to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    each: tl.constexpr = ((K + COLUMNS - 1) // COLUMNS + SHARES - 1) // SHARES * COLUMNS
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(share * each, tl.minimum(share * each + each, K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        part = tl.load(x + row[:, None] * x_stride + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(a + (slot.to(tl.int64) * N + n)[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        sums = tl.dot(part, tl.trans(weight), sums, input_precision=PRECISION)
    tl.store(low + ((share * rows).to(tl.int64) + row)[:, None] * N + n[None, :], sums, mask=there[:, None])


@triton.jit(do_not_specialize=["rows"])
def _expand(low, b, product, order, starts, rows, product_stride, FIRST: tl.constexpr, SECOND: tl.constexpr,
            THIRD: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
            ROWS: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, PRECISION: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """A program: a tile of rows of one adapter, WIDTH numbers of one part of the product. FIRST, SECOND, THIRD: numbers of the
    parts, 0 where there are fewer."""
    slot, first, end = tile_of(starts, tl.program_id(0), SLOTS, PADDED, ROWS)  # known since the step began
    if slot >= SLOTS:
        enter(PDL)
        return
    tile = tl.program_id(1)
    of_first: tl.constexpr = (FIRST + WIDTH - 1) // WIDTH
    of_both: tl.constexpr = of_first + (SECOND + WIDTH - 1) // WIDTH
    part = (tile >= of_first).to(tl.int32) + (tile >= of_both).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, FIRST, FIRST + SECOND))
    count = tl.where(part == 0, FIRST, tl.where(part == 1, SECOND, THIRD))
    inside = (tile - tl.where(part == 0, 0, tl.where(part == 1, of_first, of_both))) * WIDTH + tl.arange(0, WIDTH)
    wanted = inside < count
    n = begin + inside
    index = first + tl.arange(0, ROWS)
    there = index < end
    row = tl.load(order + index, mask=there, other=0, cache_modifier=".cg").to(tl.int64)
    r = tl.arange(0, RANK)
    b_at = b + (slot.to(tl.int64) * (FIRST + SECOND + THIRD) + n)[:, None] * RANK + r[None, :]
    weight = tl.load(b_at, mask=wanted[:, None], other=0.0)
    enter(PDL)
    sums = tl.zeros([ROWS, RANK], tl.float32)
    for share in range(SHARES):
        at = low + ((share * rows).to(tl.int64) + row)[:, None] * N + (part * RANK + r)[None, :]
        sums += tl.load(at, mask=there[:, None], other=0.0)
    added = tl.dot(sums.to(weight.dtype), tl.trans(weight), input_precision=PRECISION)
    at = product + row[:, None] * product_stride + n[None, :]
    mask = there[:, None] & wanted[None, :]
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + added).to(product.dtype.element_ty), mask=mask)


def add_low_rank(
    product: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: tuple[int, ...], grouped: GroupedRows, *, pdl: bool = False
) -> None:
    """Adds B A x of each row's adapter to product [rows or more, out], in place.

    x: [rows or more, in]. a: [slots, parts * rank, in], b: [slots, out, rank]; rank: a power of two from 16 on. parts: of
    `out`, up to three, each with an A of its own.
    """
    width, rank = x.shape[1], b.shape[2]
    low_width = len(parts) * rank
    down, up = tilings(grouped.rows, width, rank)
    low = torch.empty(down.shares, grouped.rows, low_width, dtype=torch.float32, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    pdl = pdl and not interpreted()
    flags = {"N": low_width, "SLOTS": grouped.slots, "PADDED": int(triton.next_power_of_2(grouped.slots)),
             "SHARES": down.shares, "PRECISION": precision, "PDL": pdl, "launch_pdl": pdl}  # fmt: skip
    _shrink[(most_tiles(grouped, down.rows), low_width // down.width, down.shares)](
        x, a, low, grouped.order, grouped.starts, grouped.rows, x.stride(0), K=width, ROWS=down.rows, COLUMNS=down.columns,
        WIDTH=down.width, num_warps=down.warps, **flags,
    )  # fmt: skip
    first, second, third = (*parts, 0, 0)[:3]
    _expand[(most_tiles(grouped, up.rows), sum(triton.cdiv(part, up.width) for part in parts))](
        low, b, product, grouped.order, grouped.starts, grouped.rows, product.stride(0), FIRST=first, SECOND=second,
        THIRD=third, RANK=rank, ROWS=up.rows, WIDTH=up.width, num_warps=up.warps, **flags,
    )  # fmt: skip


def tilings(rows: int, width: int, rank: int) -> tuple[LoraTiling, LoraTiling]:
    """Down to the rank, and up again: by shape alone, so that a graph keeps them. Up to SOME_ROWS the best on an H200."""
    wide, shares = min(rank, WIDEST), min(MOST_SHARES, max(1, width // LONGEST_SHARE))
    if rows <= FEW_ROWS:
        return LoraTiling(16, 128, wide, shares), LoraTiling(16, 0, 64, shares)
    if rows <= SOME_ROWS:
        return LoraTiling(32, 128, wide, shares), LoraTiling(32, 0, 64, shares)
    return LoraTiling(64, 64, wide, 1), LoraTiling(64, 0, 128 if rank <= WIDEST else 64, 1)
