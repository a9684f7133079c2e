"""A matrix in fewer bits, widened into memory: for products of so many tokens that its bytes do not matter.

Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.products.mxfp4 import plain_power, sixty_fourths
from workers.kernels.products.widen import ONE, of_four_bits, of_fp8
from workers.kernels.reduced import FP4_BLOCK, Microscaled, Reduced

ROWS, MOST_COLUMNS = 4, 1024  # of a program


def expanded(weight: Reduced | Microscaled, dtype: torch.dtype) -> Tensor:
    """What the matrix stands for, [rows, columns], on its device."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.values.device)
    if isinstance(weight, Microscaled):
        spans = weight.values.shape[1] * 4 // weight.span
        at_once = min(MOST_COLUMNS // weight.span, triton.next_power_of_2(spans))
        _expand_microscaled[triton.cdiv(rows, ROWS), triton.cdiv(spans, at_once)](
            weight.values, weight.scales.view(torch.int32), out, N=rows, K=columns, SPANS=spans, ROWS=ROWS, HERE=at_once,
            BLOCK=FP4_BLOCK,
        )  # fmt: skip
        return out
    zeros = weight.scales if weight.zeros is None else weight.zeros
    at_once = min(MOST_COLUMNS, triton.next_power_of_2(columns))
    _expand[triton.cdiv(rows, ROWS), triton.cdiv(columns, at_once)](
        weight.values, weight.scales, zeros, out, ONE, N=rows, K=columns, BITS=weight.bits,
        GROUP=0 if weight.by_row else weight.group, SPAN=weight.span if weight.bits == 4 else 0, ROWS=ROWS, COLUMNS=at_once,
    )  # fmt: skip
    return out


@triton.jit
def _expand_microscaled(values, scales, out, N: tl.constexpr, K: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
                        HERE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: HERE spans of ROWS rows. scales: those of a span's four blocks in one element."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, N - 1).to(tl.int64)
    span = tl.program_id(1) * HERE + tl.arange(0, HERE)
    there = (span < SPANS)[None, :]
    place = tl.arange(0, BLOCK)[None, None, :]
    element = safe[:, None, None] * (SPANS * BLOCK) + span[None, :, None] * BLOCK + place
    codes = tl.load(values + element, mask=there[:, :, None], other=0)
    four = tl.load(scales + safe[:, None] * SPANS + span[None, :], mask=there, other=0)
    numbers = sixty_fourths(codes)
    into = out + rows.to(tl.int64)[:, None, None] * K
    for block in tl.static_range(4):
        column = span[None, :, None] * (4 * BLOCK) + block * BLOCK + place
        wide = numbers[block].to(tl.float32) * 64 * plain_power(four, block)[:, :, None]
        tl.store(into + column, wide.to(out.dtype.element_ty), mask=(rows < N)[:, None, None] & (column < K))


@triton.jit
def _expand(values, scales, zeros, out, one, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
            SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: a tile of [ROWS, COLUMNS], or of as many columns in elements of four."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, N - 1)
    from_row = safe.to(tl.int64)[:, None] * K
    into = out + rows.to(tl.int64)[:, None] * K
    if BITS == 4:
        QUARTER: tl.constexpr = SPAN // 4
        WIDTH: tl.constexpr = COLUMNS // 4
        element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        eight = tl.program_id(1) * WIDTH + 8 * tl.arange(0, WIDTH // 8)
        column, firsts = element // QUARTER * SPAN + element % QUARTER, eight // QUARTER * SPAN + eight % QUARTER
        there = (element < K // 4)[None, :]
        tile = tl.load(values + from_row // 4 + element[None, :], mask=there, other=0)
        for place in tl.static_range(4):
            ahead = place * QUARTER
            numbers = of_four_bits(tile, scales, zeros, safe, firsts + ahead, one, place, K, GROUP, ROWS, WIDTH)
            tl.store(into + (column + ahead)[None, :], numbers.to(out.dtype.element_ty), mask=(rows < N)[:, None] & there)
    else:
        start = tl.program_id(1) * COLUMNS
        column = start + tl.arange(0, COLUMNS)
        there = (column < K)[None, :]
        tile = tl.load(values + from_row + column[None, :], mask=there, other=0.0)
        numbers = of_fp8(tile, scales, safe, start, GROUP, K, ROWS, COLUMNS)
        if GROUP == 0:
            numbers *= tl.load(scales + safe).to(tl.float32)[:, None]
        tl.store(into + column[None, :], numbers.to(out.dtype.element_ty), mask=(rows < N)[:, None] & there)
