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

from workers.kernels.launch import interpreted
from workers.kernels.products.matvec import MAX_TOKENS, choose, matvec
from workers.kernels.products.reduced import Reduced
from workers.kernels.products.widen import widened
from workers.kernels.rounding import Rounded, rounded

MULTIPLE_OF_LIBRARY = 16
"""Of rows and columns, for the library's products of FP8."""

LEAST_OF_LIBRARY = (9, 0)
"""Compute capability."""

COLUMNS = 128  # of a program's tile at a time
NEAR = tl.constexpr(8)  # tiles of tokens


def product(x: Tensor, weight: Reduced, bias: Tensor | None = None) -> Tensor:
    """x [tokens, columns] of 16 or 32 bits -> [tokens, rows]. bias [rows]."""
    rows, columns = weight.shape
    if len(x) <= MAX_TOKENS and choose(rows, columns, len(x), x.dtype, False, weight.bits) is not None:
        return matvec(x, weight, bias=bias)  # without counters: K is never split
    if _library_takes(x, weight):
        near = rounded(x, columns)
        out: Tensor = torch._scaled_mm(
            near.values, weight.values.T, scale_a=near.scales, scale_b=weight.scales.T, out_dtype=x.dtype, use_fast_accum=True
        )
        return out if bias is None else out.add_(bias)
    if weight.bits == 8 and x.dtype != torch.float32:
        return fp8_product(x, weight, bias)
    return F.linear(x, expanded(weight, x.dtype), bias)


def _library_takes(x: Tensor, weight: Reduced) -> bool:
    """Whether it multiplies FP8 with a scale for each token and row."""
    fits = weight.by_row and x.dtype == torch.bfloat16 and not any(size % MULTIPLE_OF_LIBRARY for size in weight.shape)
    return fits and not interpreted() and torch.cuda.get_device_capability(x.device) >= LEAST_OF_LIBRARY


def expanded(weight: Reduced, dtype: torch.dtype) -> Tensor:
    """What the matrix stands for, [rows, columns], on its device."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.values.device)
    zeros = weight.scales if weight.zeros is None else weight.zeros
    tile = 4, min(1024, triton.next_power_of_2(columns))
    grid = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    _expand[grid](
        weight.values, weight.scales, zeros, out, N=rows, K=columns, BITS=weight.bits,
        GROUP=0 if weight.by_row else weight.group, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return out


def fp8_product(
    x: Tensor | Rounded, weight: Reduced, bias: Tensor | None = None, *, square: bool = False, dtype: torch.dtype | None = None,
    tile: tuple[int, int, int, int] = (128, 128, 8, 3),
) -> Tensor:  # fmt: skip
    """The same as `product`, of FP8: with scales of groups of columns, or of rows where the library cannot take the shape."""
    (rows, columns), group = weight.shape, weight.group
    near = x if isinstance(x, Rounded) else rounded(x, group)
    out = torch.empty(len(x), rows, dtype=dtype or x.dtype, device=x.device)
    tokens, wide, warps, stages = tile
    if len(x):
        _multiply[(triton.cdiv(rows, wide) * triton.cdiv(len(x), tokens),)](
            near.values, near.scales, weight.values, weight.scales, out if bias is None else bias, out, len(x), N=rows, K=columns,
            GROUP=group, SQUARE=square, ROWS=wide, TOKENS=tokens, COLUMNS=COLUMNS if weight.by_row else min(COLUMNS, group),
            BIAS=bias is not None, WIDE=interpreted(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@triton.jit
def _expand(values, scales, zeros, out, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: a tile of [ROWS, COLUMNS]."""
    EACH: tl.constexpr = 2 if BITS == 4 else 1  # columns of an element
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, N - 1)
    start = tl.program_id(1) * COLUMNS
    stored = start // EACH + tl.arange(0, COLUMNS // EACH)
    at = values + safe.to(tl.int64)[:, None] * (K // EACH) + stored[None, :]
    tile = tl.load(at, mask=(stored < K // EACH)[None, :], other=0.0)
    numbers = widened(tile, scales, zeros, safe, start, BITS, GROUP, K, ROWS, COLUMNS)
    if GROUP == 0:
        numbers *= tl.load(scales + safe).to(tl.float32)[:, None]
    column = start + tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (column < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + column[None, :], numbers.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _multiply(x, x_scales, weight, scales, bias, out, tokens, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
              SQUARE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """One program: [TOKENS, ROWS] of the output, a group of columns at a time, whose sums are scaled as they are added up.

    COLUMNS divides GROUP, or there is one group. SQUARE: all rows of a program share their scales. WIDE: multiplied in float16,
    which has every number of FP8.
    """
    GROUPS: tl.constexpr = K // GROUP
    ACROSS: tl.constexpr = (N + ROWS - 1) // ROWS
    # neighbours share what they read: so many tiles of tokens go through the rows together
    first = tl.program_id(0) // (NEAR * ACROSS) * NEAR
    near_tiles = tl.minimum(tl.cdiv(tokens, TOKENS) - first, NEAR)
    inside = tl.program_id(0) % (NEAR * ACROSS)
    row = inside // near_tiles * ROWS + tl.arange(0, ROWS)
    token = (first + inside % near_tiles) * TOKENS + tl.arange(0, TOKENS)
    safe = tl.minimum(row, N - 1).to(tl.int64)
    near = tl.minimum(token, tokens - 1).to(tl.int64)
    scaled = (inside // near_tiles * ROWS).to(tl.int64) if SQUARE else safe
    column = tl.arange(0, COLUMNS)
    x_at, w_at = x + near[:, None] * K + column[None, :], weight + safe[:, None] * K + column[None, :]
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    of_x, of_w = tl.load(x_scales + near * GROUPS), tl.load(scales + scaled * GROUPS).to(tl.float32)
    for start in range(0, K, COLUMNS):
        if K % COLUMNS == 0:
            a, b = tl.load(x_at + start), tl.load(w_at + start)
        else:
            there = (start + column < K)[None, :]
            a, b = tl.load(x_at + start, mask=there, other=0.0), tl.load(w_at + start, mask=there, other=0.0)
        if WIDE:
            a, b = a.to(tl.float16), b.to(tl.float16)
        now_x, now_w = of_x, of_w
        group = tl.minimum(start + COLUMNS, K - 1) // GROUP
        of_x = tl.load(x_scales + near * GROUPS + group)
        of_w = tl.load(scales + scaled * GROUPS + group).to(tl.float32)
        if SQUARE:
            sums += tl.dot(a, tl.trans(b)) * (now_x * now_w)[:, None]
        else:
            sums += tl.dot(a, tl.trans(b)) * (now_x[:, None] * now_w[None, :])
    if BIAS:
        sums += tl.load(bias + safe).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (row < N)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * N + row[None, :], sums.to(out.dtype.element_ty), mask=mask)
