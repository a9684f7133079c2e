"""Products of one or two tokens with a matrix in four bits: multiplies and adds in float32 while its words stream through
registers.

At four bits a byte may cost few instructions: turning integers into floats alone would take longer than memory does. So a
nibble is put into the mantissa of a float between 1 and 2, the sum of eight neighbours of a word is scaled as a whole, and
their offset is made good by the sum of what they were multiplied by. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.launch import fetch_rows
from workers.kernels.products.stream import _finish, _finish_gated, _within
from workers.kernels.products.widen import between_one_and_two

A_THREAD = tl.constexpr(4)
"""Words that a thread loads at once, of one group."""


@triton.jit
def _fours(numbers, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """[ROWS, WORDS] -> sums of what one thread holds."""
    return tl.sum(tl.reshape(numbers, [ROWS, WORDS // A_THREAD, A_THREAD]), 2)


@triton.jit
def _part(x, norm_weight, token, tokens, columns, x_stride, power, K: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """x[token, columns] times the norm's weight, in float32, and the squares of x added to `power`."""
    at = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + columns
    part = _within(at, columns, K, COLUMNS)
    if NORM:
        power += part * part
        part *= _within(norm_weight + columns, columns, K, COLUMNS)
    return part, power


@triton.jit
def _scaled(sums, offset, scales, zeros, rows, group, GROUPS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Sums [ROWS, WORDS] of numbers between 1 and 2, each times what `offset` [WORDS] sums up -> those of what they stand for."""
    at = rows.to(tl.int64)[:, None] * GROUPS + tl.minimum(group, GROUPS - 1)[None, :]
    scale, zero = tl.load(scales + at).to(tl.float32), tl.load(zeros + at).to(tl.float32)
    whole = tl.sum(tl.reshape(offset, [WORDS // A_THREAD, A_THREAD]), 1)
    return scale * (16 * _fours(sums, ROWS, WORDS) - (16 + zero) * whole[None, :])


@triton.jit(do_not_specialize=["tokens"])
def nibbles(x, norm_weight, words, bias, out, scales, zeros, tokens, x_stride, out_stride, eps, one, N: tl.constexpr,
            K: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, NORM: tl.constexpr,
            BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, 1 or 2. N counts rows of the output.

    words: int32 [rows, K / 8] as `Reduced` has them, WORDS of which are taken at a time; scales, zeros [rows, K / GROUP]; one: `widen.ONE`.
    """
    OF_GROUP: tl.constexpr = GROUP // 8
    GROUPS: tl.constexpr = K // GROUP
    ALL: tl.constexpr = K // 8
    shares = tl.cdiv(tokens, TOKENS)
    rows = tl.program_id(0) // shares * ROWS + tl.arange(0, ROWS)
    safe = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    first = tl.program_id(0) % shares * TOKENS
    half = words + N * ALL if GATED else words
    at = safe.to(tl.int64)[:, None] * ALL
    each = tl.arange(0, WORDS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_rows(words, safe, ALL, ALL)
        if GATED:
            fetch_rows(half, safe, ALL, ALL)
        tl.extra.cuda.gdc_wait()

    nought = tl.zeros([ROWS, WORDS // A_THREAD], tl.float32)
    none = tl.zeros([WORDS], tl.float32)
    s0, s1, g0, g1 = nought, nought, nought, nought
    p0, p1 = none, none
    for start in tl.static_range(0, ALL, WORDS):
        word = start + each
        there = (word < ALL)[None, :]
        if ALL % WORDS == 0:
            here = tl.load(words + at + word[None, :], eviction_policy="evict_first")
            beside = tl.load(half + at + word[None, :], eviction_policy="evict_first") if GATED else here
        else:
            here = tl.load(words + at + word[None, :], mask=there, other=0, eviction_policy="evict_first")
            beside = here
            if GATED:
                beside = tl.load(half + at + word[None, :], mask=there, other=0, eviction_policy="evict_first")
        columns = word // OF_GROUP * GROUP + word % OF_GROUP
        a0 = tl.zeros([ROWS, WORDS], tl.float32)
        a1, b0, b1 = a0, a0, a0
        x0, x1 = none, none
        for number in tl.static_range(8):
            column = columns + number * OF_GROUP
            mine = between_one_and_two(here, one, number)
            other = between_one_and_two(beside, one, number) if GATED else mine
            part, p0 = _part(x, norm_weight, first, tokens, column, x_stride, p0, K, 8 * WORDS, NORM)
            x0 += part
            a0 += mine * part[None, :]
            if GATED:
                b0 += other * part[None, :]
            if TOKENS > 1:
                part, p1 = _part(x, norm_weight, first + 1, tokens, column, x_stride, p1, K, 8 * WORDS, NORM)
                x1 += part
                a1 += mine * part[None, :]
                if GATED:
                    b1 += other * part[None, :]
        group = (start + tl.arange(0, WORDS // A_THREAD) * A_THREAD) // OF_GROUP
        s0 += _scaled(a0, x0, scales, zeros, safe, group, GROUPS, ROWS, WORDS)
        if GATED:
            g0 += _scaled(b0, x0, scales, zeros, N + safe, group, GROUPS, ROWS, WORDS)
        if TOKENS > 1:
            s1 += _scaled(a1, x1, scales, zeros, safe, group, GROUPS, ROWS, WORDS)
            if GATED:
                g1 += _scaled(b1, x1, scales, zeros, N + safe, group, GROUPS, ROWS, WORDS)

    _end(s0, g0, p0, first, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)
    if TOKENS > 1:
        _end(s1, g1, p1, first + 1, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)


@triton.jit
def _end(sums, gated, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
         NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    squares = tl.sum(power, 0)
    if GATED:
        _finish_gated(tl.sum(sums, 1), tl.sum(gated, 1), squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM,
                      BIAS)  # fmt: skip
    else:
        _finish(tl.sum(sums, 1), squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL)
