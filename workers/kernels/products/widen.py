"""Tiles of a matrix in fewer bits as numbers, in registers. Imports triton.

    BITS 8    FP8, each number by itself
    BITS 4    two neighbours in a byte, the first in its low half: COLUMNS / 2 bytes are COLUMNS numbers

GROUP columns, a power of two, share a scale; 0: a row does, which is applied to its sums at their end. BITS 16, of whoever
calls this, are plain numbers, for which it is not called.
"""

import triton
import triton.language as tl


@triton.jit
def widened(tile, scales, zeros, rows, start, BITS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    """A tile as it is loaded -> [ROWS, COLUMNS] in float32. rows: within the matrix; start: its first column.

    What is loaded beyond K is zero, and may become a number here: whatever it is multiplied by is zero there too.
    """
    if BITS == 4:
        tile = tl.reshape(tl.join(tile & 15, tile >> 4), [ROWS, COLUMNS])
    numbers = tile.to(tl.float32)
    if GROUP > 0:
        GROUPS: tl.constexpr = K // GROUP
        first = rows.to(tl.int64) * GROUPS
        if GROUP >= COLUMNS:  # which it is a multiple of
            at = first + start // GROUP
            if BITS == 4:
                numbers -= tl.load(zeros + at).to(tl.float32)[:, None]
            numbers *= tl.load(scales + at).to(tl.float32)[:, None]
        else:
            HERE: tl.constexpr = COLUMNS // GROUP
            group = tl.minimum(start // GROUP + tl.arange(0, HERE), GROUPS - 1)
            places = first[:, None] + group[None, :]
            numbers = tl.reshape(numbers, [ROWS, HERE, GROUP])
            if BITS == 4:
                numbers -= tl.load(zeros + places).to(tl.float32)[:, :, None]
            numbers *= tl.load(scales + places).to(tl.float32)[:, :, None]
            numbers = tl.reshape(numbers, [ROWS, COLUMNS])
    return numbers
