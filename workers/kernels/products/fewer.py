"""Products of one or two tokens with a matrix in FP8 or four bits: multiplies and adds in float32 while it streams through
registers.

A byte may cost few instructions here, or they take longer than memory does:

    four bits   turning integers into floats alone would be too many, so a nibble is put into the mantissa of a float between
                1 and 2; the sum of eight is scaled as a whole, and their offset is made good by the sum of what they were
                multiplied by. With x in 16 bits, `four_bits` is faster
    FP8         a thread has sixteen numbers of a row at a time, but x eight at a time: so both are taken in two pieces, or x
                would go through shared memory

A norm's scale is one number per token, so it is applied to the sums. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.products.stream import finish, finish_gated, residual_of, within
from workers.kernels.products.widen import between_one_and_two


@triton.jit
def _tile(base, rows, start, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] elements of rows that have ROW of them, zeros beyond."""
    element = start + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * ROW + element[None, :]
    if ROW % WIDTH == 0:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(element < ROW)[None, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _halves(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """FP8 [ROWS, WIDTH] -> [ROWS, WIDTH / 2] twice: of each sixteen the first eight, and the others."""
    sixteens = tl.permute(tl.reshape(tile, [ROWS, WIDTH // 16, 2, 8]), [0, 1, 3, 2])
    first, second = tl.split(sixteens)
    return tl.reshape(first, [ROWS, WIDTH // 2]), tl.reshape(second, [ROWS, WIDTH // 2])


@triton.jit
def _piece(tile, first, second, one, PIECE: tl.constexpr, BITS: tl.constexpr):
    """Numbers in float32: between 1 and 2 for four bits."""
    return between_one_and_two(tile, one, PIECE) if BITS == 4 else (first if PIECE == 0 else second).to(tl.float32)


@triton.jit
def _part(x, norm_weight, token, tokens, columns, x_stride, power, K: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """x[token, columns] times the norm's weight, in float32, and the squares of x added to `power`."""
    at = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + columns
    part = within(at, columns, K, COLUMNS)
    if NORM:
        power += part * part
        part *= within(norm_weight + columns, columns, K, COLUMNS)
    return part, power


@triton.jit
def _added(sums, offset, scales, zeros, rows, columns, K: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
           BITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Sums [ROWS, EACH], times their scales: sums of each eight of them, which one thread holds, the first of which are of
    `columns`. offset [EACH]: what numbers between 1 and 2 were multiplied by."""
    eights = tl.sum(tl.reshape(sums, [ROWS, EACH // 8, 8]), 2)
    if GROUP > 0:
        at = rows.to(tl.int64)[:, None] * (K // GROUP) + tl.minimum(columns // GROUP, K // GROUP - 1)[None, :]
        if BITS == 4:
            whole = tl.sum(tl.reshape(offset, [EACH // 8, 8]), 1)
            eights = 16 * eights - (16 + tl.load(zeros + at).to(tl.float32)) * whole[None, :]
        eights *= tl.load(scales + at).to(tl.float32)
    return eights


@triton.jit(do_not_specialize=["tokens"])
def fewer_bits(x, norm_weight, weight, bias, out, scales, zeros, tokens, x_stride, out_stride, eps, one, N: tl.constexpr,
               K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
               BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, 1 or 2, COLUMNS of K at a time. N counts
    rows of the output. weight, scales, zeros, SPAN: as `Reduced` has them; GROUP: columns that share a scale, 0 for all. one:
    `widen.ONE`.
    """
    PIECES: tl.constexpr = 4 if BITS == 4 else 2
    OF_ELEMENT: tl.constexpr = 4 if BITS == 4 else 1  # numbers
    ROW: tl.constexpr = K // OF_ELEMENT
    WIDTH: tl.constexpr = COLUMNS // OF_ELEMENT
    EACH: tl.constexpr = COLUMNS // PIECES  # numbers of a piece
    ALONE: tl.constexpr = BITS == 4  # a piece has scales of its own
    STEP: tl.constexpr = SPAN // 4 if BITS == 4 else 8  # columns from a piece to the next
    shares = tl.cdiv(tokens, TOKENS)
    rows = tl.program_id(0) // shares * ROWS + tl.arange(0, ROWS)
    safe = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    first = tl.program_id(0) % shares * TOKENS
    half = weight + N * ROW if GATED else weight
    if PDL:
        tl.extra.cuda.gdc_wait()

    before0 = residual_of(out, first, tokens, rows, out_stride, N, RESIDUAL)
    before1 = residual_of(out, first + 1, tokens, rows, out_stride, N, RESIDUAL) if TOKENS > 1 else before0
    each = tl.arange(0, EACH)
    inside = each // STEP * (STEP * PIECES) + each % STEP
    eight = 8 * tl.arange(0, EACH // 8)
    firsts = eight // STEP * (STEP * PIECES) + eight % STEP
    nought = tl.zeros([ROWS, EACH // 8], tl.float32)
    none = tl.zeros([EACH], tl.float32)
    s0, s1, g0, g1 = nought, nought, nought, nought
    p0, p1 = none, none
    for start in tl.static_range(0, K, COLUMNS):
        here = _tile(weight, safe, start // OF_ELEMENT, ROW, WIDTH)
        beside = _tile(half, safe, start // OF_ELEMENT, ROW, WIDTH) if GATED else here
        here0, here1, beside0, beside1 = here, here, beside, beside
        if BITS == 8:
            here0, here1 = _halves(here, ROWS, WIDTH)
            if GATED:
                beside0, beside1 = _halves(beside, ROWS, WIDTH)
        for piece in tl.static_range(PIECES):
            if piece == 0 or ALONE:
                a0 = tl.zeros([ROWS, EACH], tl.float32)
                a1, b0, b1 = a0, a0, a0
                x0, x1 = none, none
            columns = start + inside + piece * STEP
            mine = _piece(here, here0, here1, one, piece, BITS)
            other = _piece(beside, beside0, beside1, one, piece, BITS) if GATED else mine
            part, p0 = _part(x, norm_weight, first, tokens, columns, x_stride, p0, K, COLUMNS, NORM)
            x0 += part
            a0 += mine * part[None, :]
            if GATED:
                b0 += other * part[None, :]
            if TOKENS > 1:
                part, p1 = _part(x, norm_weight, first + 1, tokens, columns, x_stride, p1, K, COLUMNS, NORM)
                x1 += part
                a1 += mine * part[None, :]
                if GATED:
                    b1 += other * part[None, :]
            if piece == PIECES - 1 or ALONE:
                begun = start + firsts + (piece * STEP if ALONE else 0)
                s0 += _added(a0, x0, scales, zeros, safe, begun, K, ROWS, EACH, BITS, GROUP)
                if GATED:
                    g0 += _added(b0, x0, scales, zeros, N + safe, begun, K, ROWS, EACH, BITS, GROUP)
                if TOKENS > 1:
                    s1 += _added(a1, x1, scales, zeros, safe, begun, K, ROWS, EACH, BITS, GROUP)
                    if GATED:
                        g1 += _added(b1, x1, scales, zeros, N + safe, begun, K, ROWS, EACH, BITS, GROUP)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    _end(s0, g0, before0, p0, first, tokens, rows, safe, bias, scales, out, out_stride, eps, N, K, NORM, BIAS, GATED,
         GROUP)  # fmt: skip
    if TOKENS > 1:
        _end(s1, g1, before1, p1, first + 1, tokens, rows, safe, bias, scales, out, out_stride, eps, N, K, NORM, BIAS, GATED,
             GROUP)  # fmt: skip


@triton.jit
def _end(sums, gated, before, power, token, tokens, rows, safe, bias, scales, out, out_stride, eps, N: tl.constexpr,
         K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    total, up = tl.sum(sums, 1), tl.sum(gated, 1)
    squares = tl.sum(power, 0)
    if GROUP == 0:
        total *= tl.load(scales + safe).to(tl.float32)
        if GATED:
            up *= tl.load(scales + N + safe).to(tl.float32)
    if GATED:
        finish_gated(total, up, squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS)
    else:
        finish(total, before, squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS)
