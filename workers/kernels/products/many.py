"""Products of any number of tokens with a matrix in fewer bits.

    FP8, a scale for each row       x rounded token by token, the library's product (`torch._scaled_mm`)
    FP8, a scale for some columns   x rounded token by token in as many columns, a kernel of our own
    four bits, or x in float32      the matrix widened into memory, the library's product

Up to as many tokens as `matvec` takes, it computes what `choose` gives it. Imports torch and triton.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import interpreted, warps_for
from workers.kernels.products.matvec import MAX_TOKENS, choose, matvec
from workers.kernels.products.reduced import LARGEST_FP8, Reduced
from workers.kernels.products.widen import ONE, of_four_bits, of_fp8

MULTIPLE_OF_LIBRARY = 16
"""Of rows and columns, for the library's products of FP8."""

LEAST_OF_LIBRARY = (9, 0)
"""Compute capability."""

ROWS, TOKENS, COLUMNS = 128, 64, 128  # of a program's tile
LEAST_SCALE = tl.constexpr(1e-30)


def product(x: Tensor, weight: Reduced, bias: Tensor | None = None) -> Tensor:
    """x [tokens, columns] of 16 or 32 bits -> [tokens, rows]. bias [rows]."""
    rows, columns = weight.shape
    if len(x) <= MAX_TOKENS and choose(rows, columns, len(x), x.dtype, False, weight.bits) is not None:
        return matvec(x, weight, bias=bias)  # without counters: K is never split
    if _library_takes(x, weight):
        values, scales = rounded(x, columns)
        out: Tensor = torch._scaled_mm(
            values, weight.values.T, scale_a=scales, scale_b=weight.scales.T, out_dtype=x.dtype, use_fast_accum=True
        )
        return out if bias is None else out.add_(bias)
    if weight.bits == 8 and x.dtype != torch.float32:
        return fp8_product(x, weight, bias)
    return F.linear(x, expanded(weight, x.dtype), bias)


def _library_takes(x: Tensor, weight: Reduced) -> bool:
    """Whether it multiplies FP8 with a scale for each token and row."""
    fits = weight.by_row and x.dtype == torch.bfloat16 and not any(size % MULTIPLE_OF_LIBRARY for size in weight.shape)
    return fits and not interpreted() and torch.cuda.get_device_capability(x.device) >= LEAST_OF_LIBRARY


def rounded(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [tokens, columns] -> float8_e4m3fn [tokens, columns] and float32 [tokens, columns / group], with the least scale for
    each group of a token."""
    tokens, columns = x.shape
    values = torch.empty(tokens, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, columns // group, dtype=torch.float32, device=x.device)
    if tokens:
        width = triton.next_power_of_2(group)
        _round[(tokens, columns // group)](
            x, values, scales, x.stride(0), LARGEST_FP8, K=columns, GROUP=group, WIDTH=width, num_warps=warps_for(width)
        )
    return values, scales


def expanded(weight: Reduced, dtype: torch.dtype) -> Tensor:
    """What the matrix stands for, [rows, columns], on its device."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.values.device)
    zeros = weight.scales if weight.zeros is None else weight.zeros
    tile = 4, min(1024, triton.next_power_of_2(columns))
    grid = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    _expand[grid](
        weight.values, weight.scales, zeros, out, ONE, N=rows, K=columns, BITS=weight.bits,
        GROUP=0 if weight.by_row else weight.group, SPAN=weight.span if weight.bits == 4 else 0, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return out


def fp8_product(x: Tensor, weight: Reduced, bias: Tensor | None = None) -> Tensor:
    """The same as `product`, of FP8: with scales of groups of columns, or of rows where the library cannot take the shape."""
    (rows, columns), group = weight.shape, weight.group
    values, scales = rounded(x, group)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    if len(x):
        _multiply[(triton.cdiv(rows, ROWS), triton.cdiv(len(x), TOKENS))](
            values, scales, weight.values, weight.scales, out if bias is None else bias, out, len(x), N=rows, K=columns,
            GROUP=group, ROWS=ROWS, TOKENS=TOKENS, COLUMNS=COLUMNS if weight.by_row else min(COLUMNS, group),
            BIAS=bias is not None, WIDE=interpreted(),
            num_warps=8 if TOKENS * ROWS > 4096 else 4, num_stages=3,
        )  # fmt: skip
    return out


@triton.jit
def _round(x, values, scales, x_stride, largest, K: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """One program: a group of one token."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    there = column < GROUP
    wide = tl.load(x + token * x_stride + group * GROUP + column, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0) / largest, LEAST_SCALE)
    near = tl.minimum(tl.maximum(wide / scale, -largest), largest)
    tl.store(values + token * K + group * GROUP + column, near.to(values.dtype.element_ty), mask=there)
    tl.store(scales + token * (K // GROUP) + group, scale)


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


@triton.jit(do_not_specialize=["tokens"])
def _multiply(x, x_scales, weight, scales, bias, out, tokens, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
              ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """One program: [TOKENS, ROWS] of the output, a group of columns at a time, whose sums are scaled as they are added up.

    COLUMNS divides GROUP, or there is one group. WIDE: multiplied in float16, which has every number of FP8.
    """
    GROUPS: tl.constexpr = K // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    safe = tl.minimum(row, N - 1).to(tl.int64)
    near = tl.minimum(token, tokens - 1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    x_at, w_at = x + near[:, None] * K + column[None, :], weight + safe[:, None] * K + column[None, :]
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, K, COLUMNS):
        if K % COLUMNS == 0:
            a, b = tl.load(x_at + start), tl.load(w_at + start)
        else:
            there = (start + column < K)[None, :]
            a, b = tl.load(x_at + start, mask=there, other=0.0), tl.load(w_at + start, mask=there, other=0.0)
        if WIDE:
            a, b = a.to(tl.float16), b.to(tl.float16)
        group = start // GROUP
        scale = tl.load(x_scales + near * GROUPS + group)[:, None] * tl.load(scales + safe * GROUPS + group)[None, :]
        sums += tl.dot(a, tl.trans(b)) * scale
    if BIAS:
        sums += tl.load(bias + safe).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (row < N)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * N + row[None, :], sums.to(out.dtype.element_ty), mask=mask)
