"""Matrices of experts in fewer bits, as the two kinds of products read them: rows that stream past one token, and tiles for the
tensor cores. `Operand` says what weight, scales, zeros, KIND, GROUP and SPAN are; rows count through all experts, in int64.

Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.products.four_bits import added, of_scales, of_zeros
from workers.kernels.products.mxfp4 import made_good, plain_power, scaled, sixty_fourths
from workers.kernels.products.widen import between_one_and_two


@triton.jit
def _elements(weight, rows, first, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH elements from `first` on of rows [A, B] that have ROW of them, zeros beyond: [A, B, WIDTH]."""
    element = first + tl.arange(0, WIDTH)[None, None, :]
    at = weight + rows[:, :, None] * ROW + element
    if ROW % WIDTH == 0:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=element < ROW, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _halves(tile, A: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr):
    first, second = tl.split(tl.permute(tl.reshape(tile, [A, B, COLUMNS // 16, 2, 8]), [0, 1, 2, 4, 3]))
    return tl.reshape(first, [A, B, COLUMNS // 2]), tl.reshape(second, [A, B, COLUMNS // 2])


@triton.jit
def _between_one_and_two(tile, one):
    return (between_one_and_two(tile, one, 0), between_one_and_two(tile, one, 1), between_one_and_two(tile, one, 2),
            between_one_and_two(tile, one, 3))  # fmt: skip


@triton.jit
def _numbers(tile, one, A: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """A tile's pieces, in the numbers that are streamed: of FP8 of each sixteen the first eight and the others, of four bits
    the quarters, of int4 between 1 and 2, of MXFP4 sixty-fourths."""
    if KIND == "fp8":
        pieces = _halves(tile, A, B, COLUMNS)
    elif KIND == "int4":
        pieces = _between_one_and_two(tile, one)
    else:
        pieces = sixty_fourths(tile)
    return pieces


@triton.jit
def streamed(weight, scales, zeros, rows, x, there, factor, start, one, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
             COLUMNS: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
             SPAN: tl.constexpr):  # fmt: skip
    """What COLUMNS numbers of W's rows [A, B] give, from `start` on, in float32: [A, B, sums of a thread's own]. x: where the
    numbers begin that all rows are multiplied by, or those of each of B; there, of that shape: whether they are. factor: what
    they are multiplied by, of that shape or, with NORM, where its K numbers are. A scale for all of a row is not applied."""
    PIECES: tl.constexpr = 2 if KIND == "fp8" else 4
    ROW: tl.constexpr = (K + SPAN - 1) // SPAN * SPAN // (1 if KIND == "fp8" else 4)  # elements
    WIDTH: tl.constexpr = COLUMNS // (1 if KIND == "fp8" else 4)
    EACH: tl.constexpr = COLUMNS // PIECES
    STEP: tl.constexpr = 8 if KIND == "fp8" else SPAN // 4  # columns from a piece to the next
    each, eight = tl.arange(0, EACH), 8 * tl.arange(0, EACH // 8)
    first = start // (1 if KIND == "fp8" else 4)
    pieces = _numbers(_elements(weight, rows, first, ROW, WIDTH), one, A, B, COLUMNS, KIND)
    if KIND == "mxfp4":
        span = (first + eight) // (SPAN // 4)
        if ROW % WIDTH != 0:
            span = tl.minimum(span, ROW // (SPAN // 4) - 1)
        four = tl.load(scales + rows[:, :, None] * (ROW // (SPAN // 4)) + span[None, None, :])
    sums = tl.zeros([A, B, EACH // 8], tl.float32)
    for piece in tl.static_range(PIECES):
        columns = start + each // STEP * (STEP * PIECES) + each % STEP + piece * STEP
        inside = (columns < K)[None, None, :]
        part = tl.load(x[:, :, None] + columns[None, None, :], mask=there[:, :, None] & inside, other=0.0).to(tl.float32)
        if NORM:
            part *= tl.load(factor + columns[None, None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            part *= factor[:, :, None]
        eights = tl.sum(tl.reshape(pieces[piece].to(tl.float32) * part, [A, B, EACH // 8, 8]), 3)
        if KIND == "mxfp4":
            eights *= plain_power(four, piece)
        if KIND == "int4":
            begun = start + eight // STEP * (STEP * PIECES) + eight % STEP + piece * STEP
            at = rows[:, :, None] * (K // GROUP) + tl.minimum(begun // GROUP, K // GROUP - 1)[None, None, :]
            whole = tl.sum(tl.reshape(part, [1, part.shape[1], EACH // 8, 8]), 3)
            eights = 16 * eights - (16 + tl.load(zeros + at).to(tl.float32)) * whole
            eights *= tl.load(scales + at).to(tl.float32)
        sums += eights
    if KIND == "mxfp4":
        sums *= 64
    if KIND == "fp8" and GROUP > 0:
        at = rows[:, :, None] * (K // GROUP) + tl.minimum((start + 2 * eight) // GROUP, K // GROUP - 1)[None, None, :]
        sums *= tl.load(scales + at).to(tl.float32)
    return sums


@triton.jit
def _tile_sums(sums, elements, scale, zero, a0, a1, a2, a3, KIND: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    if KIND == "int4":
        sums = added(sums, elements, zero, scale, a0, a1, a2, a3, DTYPE, PRECISION)
    else:
        n0, n1, n2, n3 = scaled(elements, scale, DTYPE)
        sums = tl.dot(n0, a0, sums, input_precision=PRECISION)
        sums = tl.dot(n1, a1, sums, input_precision=PRECISION)
        sums = tl.dot(n2, a2, sums, input_precision=PRECISION)
        sums = tl.dot(n3, a3, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _of_place(scales, zeros, rows, column, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
              FOURS: tl.constexpr):  # fmt: skip
    """The scales and zero points [ROWS] of the four quarters at that column; of MXFP4 all scales in one element."""
    if KIND == "int4":
        scale = of_scales(scales, rows, column, K, GROUP, SPAN // 4, FOURS)
        zero = of_zeros(zeros, rows, column, K, GROUP, SPAN // 4, FOURS)
    else:
        scale = tl.load(scales + rows * ((K + SPAN - 1) // SPAN) + column // SPAN)
        zero = scale
    return scale, zero


@triton.jit
def _of_x(at, column, there, K: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """x [WIDTH, SIZE], zeros beyond K."""
    mask = there[None, :] if K % SPAN == 0 else there[None, :] & (column + tl.arange(0, WIDTH) < K)[:, None]
    return tl.load(at + column, mask=mask, other=0.0)


@triton.jit
def four_bit_sums(x, weight, scales, zeros, rows, others, source, there, x_stride, K: tl.constexpr, ROWS: tl.constexpr,
                  SIZE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
                  GROUP: tl.constexpr, SPAN: tl.constexpr, FOURS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W's rows [ROWS] and with GATED `others` times x[source], [ROWS, SIZE] each. COLUMNS divides SPAN: what is read at a time
    are elements that follow one another, and each of their quarters shares a scale."""
    WIDTH: tl.constexpr = COLUMNS // 4
    QUARTER: tl.constexpr = SPAN // 4
    ROW: tl.constexpr = (K + SPAN - 1) // SPAN * QUARTER  # elements
    DTYPE: tl.constexpr = x.dtype.element_ty
    element = tl.arange(0, WIDTH)
    x_at = x + source[None, :] * x_stride + element[:, None]
    mine, other = weight + rows[:, None] * ROW + element[None, :], weight + others[:, None] * ROW + element[None, :]
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    ups = sums
    for start in tl.range(0, ROW, WIDTH, num_stages=STAGES):
        column = tl.multiple_of(start // QUARTER * SPAN + start % QUARTER, WIDTH)
        scale, zero = _of_place(scales, zeros, rows, column, K, KIND, GROUP, SPAN, FOURS)
        if GATED:
            scale_of_other, zero_of_other = _of_place(scales, zeros, others, column, K, KIND, GROUP, SPAN, FOURS)
        a0 = _of_x(x_at, column, there, K, WIDTH, SPAN)
        a1 = _of_x(x_at, column + QUARTER, there, K, WIDTH, SPAN)
        a2 = _of_x(x_at, column + 2 * QUARTER, there, K, WIDTH, SPAN)
        a3 = _of_x(x_at, column + 3 * QUARTER, there, K, WIDTH, SPAN)
        sums = _tile_sums(sums, tl.load(mine + start), scale, zero, a0, a1, a2, a3, KIND, DTYPE, PRECISION)
        if GATED:
            ups = _tile_sums(ups, tl.load(other + start), scale_of_other, zero_of_other, a0, a1, a2, a3, KIND, DTYPE, PRECISION)
    if KIND == "mxfp4":
        sums, ups = made_good(sums, DTYPE), made_good(ups, DTYPE)
    return sums, ups
