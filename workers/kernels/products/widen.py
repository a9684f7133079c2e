"""Tiles of a matrix in fewer bits as numbers, in registers. Imports triton.

    BITS 8    FP8, each number by itself
    BITS 4    four in an element of 16 bits, in the order of `Reduced`

GROUP columns, a power of two, share a scale; 0: a row does, which is applied to its sums at their end. BITS 16, of whoever
calls this, are plain numbers, for which it is not called.
"""

import triton
import triton.language as tl

ONE = 0x3F800000
"""The bits of 1.0 in float32, which kernels are given."""


@triton.jit
def between_one_and_two(elements, one, PLACE: tl.constexpr):
    """Elements in int16 -> 1 + n / 16 in float32, n the nibble at that place, 0 to 3: its bits are the mantissa's first, since
    turning integers into floats takes a GPU many times as long. one: `ONE`, in a register, since an instruction takes one
    constant."""
    moved = elements.to(tl.int32) << (19 - 4 * PLACE)
    return ((moved & 0x780000) | one).to(tl.float32, bitcast=True)


@triton.jit
def of_fp8(tile, scales, rows, start, GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as it is loaded -> [ROWS, COLUMNS] in float32. rows: within the matrix; start: its first column.

    What is loaded beyond K is zero. Whatever it is multiplied by is zero there too.
    """
    numbers = tile.to(tl.float32)
    if GROUP > 0:
        GROUPS: tl.constexpr = K // GROUP
        first = rows.to(tl.int64) * GROUPS
        if GROUP >= COLUMNS:  # which it is a multiple of
            numbers *= tl.load(scales + first + start // GROUP).to(tl.float32)[:, None]
        else:
            HERE: tl.constexpr = COLUMNS // GROUP
            group = tl.minimum(start // GROUP + tl.arange(0, HERE), GROUPS - 1)
            scale = tl.load(scales + first[:, None] + group[None, :]).to(tl.float32)
            numbers = tl.reshape(tl.reshape(numbers, [ROWS, HERE, GROUP]) * scale[:, :, None], [ROWS, COLUMNS])
    return numbers


@triton.jit
def of_four_bits(elements, scales, zeros, rows, columns, one, PLACE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                 ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Elements [ROWS, WIDTH] -> what their codes at that place stand for, in float32. rows: within the matrix; columns
    [WIDTH / 8]: that of the first of each eight, which share a scale. Of columns beyond K: anything."""
    at = rows.to(tl.int64)[:, None] * (K // GROUP) + tl.minimum(columns // GROUP, K // GROUP - 1)[None, :]
    scale, nought = 16 * tl.load(scales + at).to(tl.float32), 1 + tl.load(zeros + at).to(tl.float32) / 16
    eights = tl.reshape(between_one_and_two(elements, one, PLACE), [ROWS, WIDTH // 8, 8])
    return tl.reshape((eights - nought[:, :, None]) * scale[:, :, None], [ROWS, WIDTH])
