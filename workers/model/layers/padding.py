"""Steps of any number of tokens, in few widths: what a library that compiles for each shape wants. Imports torch."""

from torch import Tensor

EXACT_ROWS = 16
STEPS_AN_OCTAVE = 8


def padded_rows(rows: int) -> int:
    """How many rows a step of so many has where oneDNN computes it: the same up to 16, then the next of eight steps an octave.

    oneDNN compiles a kernel for every number of rows that it sees, in about a millisecond, and keeps it, with some 0.6 MiB.
    A step may have any number of tokens: a rank would compile, and grow, for thousands of requests. At most an eighth is added.
    """
    if rows <= EXACT_ROWS:
        return rows
    step = (1 << (rows - 1).bit_length()) // (2 * STEPS_AN_OCTAVE)
    return -(-rows // step) * step


def padded(x: Tensor, rows: int) -> Tensor:
    """x [n, ...] -> [rows, ...], zeros behind; x itself if it has as many."""
    if x.shape[0] == rows:
        return x
    wide = x.new_zeros((rows, *x.shape[1:]))
    wide[: x.shape[0]] = x
    return wide
