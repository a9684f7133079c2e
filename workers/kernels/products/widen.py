"""Tiles of a matrix in fewer bits as numbers, in registers. Imports triton.

    BITS 8    FP8, each number by itself
    BITS 4    eight in a word of 32 bits, in the order of `Reduced`

GROUP columns, a power of two, share a scale; 0: a row does, which is applied to its sums at their end. BITS 16, of whoever
calls this, are plain numbers, for which it is not called.
"""

import triton
import triton.language as tl

ONE = 0x3F800000
"""The bits of 1.0 in float32, which kernels are given."""


@triton.jit
def between_one_and_two(words, one, NUMBER: tl.constexpr):
    """Words in int32 -> 1 + n / 16 in float32, n the nibble of that number: its bits are the mantissa's first, since turning
    integers into floats takes a GPU many times as long. one: `ONE`, in a register: an instruction takes one constant."""
    SHIFT: tl.constexpr = 19 - 4 * NUMBER
    moved = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
    return ((moved & 0x780000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _joined(words, one, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """[..., 2, 2, 2] of words [...]: bit by bit of the nibble's number, the highest first."""
    if COUNT == 1:
        found = between_one_and_two(words, one, FIRST)
    else:
        even = _joined(words, one, FIRST, 2 * STEP, COUNT // 2)
        found = tl.join(even, _joined(words, one, FIRST + STEP, 2 * STEP, COUNT // 2))
    return found


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
def of_four_bits(words, scales, zeros, rows, start, one, GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """Words [ROWS, COLUMNS / 8] -> [ROWS, COLUMNS] in float32; COLUMNS are a multiple of GROUP. The rest: as in `of_fp8`, but
    what is loaded beyond K may become a number."""
    HERE: tl.constexpr = COLUMNS // GROUP
    GROUPS: tl.constexpr = K // GROUP
    group = tl.minimum(start // GROUP + tl.arange(0, HERE), GROUPS - 1)
    at = rows.to(tl.int64)[:, None] * GROUPS + group[None, :]
    scale, nought = 16 * tl.load(scales + at).to(tl.float32), 1 + tl.load(zeros + at).to(tl.float32) / 16
    eights = _joined(tl.reshape(words, [ROWS, HERE, GROUP // 8]), one, 0, 1, 8)
    eights = tl.reshape(eights, [ROWS, HERE, GROUP // 8, 8])
    numbers = tl.reshape(tl.permute(eights, [0, 1, 3, 2]), [ROWS, HERE, GROUP])
    return tl.reshape((numbers - nought[:, :, None]) * scale[:, :, None], [ROWS, COLUMNS])
