"""Products of up to 64 tokens, 16-bit, by the tensor cores.

K may be split among programs, of which the last to end adds the sums in a fixed order. x times the norm's weight is rounded to
the dtype, the norm's scale is applied to the sums. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.launch import fetch_rows
from workers.kernels.products.widen import of_fp8

FEW_TURNS = tl.constexpr(2)


@triton.jit
def sum_of_parts(partial, at, first, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """What the programs of one tile have left at their places from `first` on, added in their order."""
    total = tl.load(partial + first * SIZE + at, cache_modifier=".cg")
    for other in tl.static_range(1, PARTS):
        total += tl.load(partial + (first + other) * SIZE + at, cache_modifier=".cg")
    return total


@triton.jit
def is_last_of_parts(partial, at, total, up, counter, SIZE: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
                     GATED: tl.constexpr):  # fmt: skip
    """Leaves a program's sums, and HALF numbers behind those of the other half, for whoever of its tile ends last: whether it
    does. counter: the tile's; 0 again once the last has it."""
    here = partial + tl.program_id(0) * SIZE + at
    tl.store(here, total)
    if GATED:
        tl.store(here + HALF, up)
    tl.debug_barrier()  # every thread's stores come before the count
    return tl.atomic_add(counter, 1, sem="acq_rel") >= PARTS - 1


@triton.jit
def sums_of_parts(partial, at, up, counter, first, SIZE: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
                  GATED: tl.constexpr):  # fmt: skip
    """A tile's sums and, where GATED, those of the other half, for the last of its programs."""
    tl.store(counter, 0)
    total = sum_of_parts(partial, at, first, SIZE, PARTS)
    if GATED:
        up = sum_of_parts(partial, HALF + at, first, SIZE, PARTS)
    return total, up


@triton.jit
def finish_tile(total, up, rows, safe, token, tokens, bias, out, out_stride, N: tl.constexpr, BIAS: tl.constexpr,
                 RESIDUAL: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """A tile's sums [ROWS, TOKENS], and those of the other half, to their places in `out`."""
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    mask = (token < tokens)[None, :] & (rows < N)[:, None]
    place = out + token.to(tl.int64)[None, :] * out_stride + rows[:, None]
    if GATED:
        if BIAS:
            up += tl.load(bias + N + safe).to(tl.float32)[:, None]
        total = total / (1 + tl.exp(-total)) * up
    if RESIDUAL:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def tiles(x, norm_weight, weight, bias, out, scales, partial, counters, tokens, x_stride, weight_stride, out_stride, eps,
          N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          PARTS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
          GATED: tl.constexpr, PDL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, over one of PARTS parts of K.

    partial: of each program its sums [ROWS, TOKENS], those of the other half, and the sums of squares [TOKENS].
    counters: one for each tile of rows, 0 before and after. COLUMNS divides K / PARTS. BITS, GROUP, scales: as in `of_fp8`.
    """
    SIZE: tl.constexpr = (2 * ROWS + 1) * TOKENS if GATED else (ROWS + 1) * TOKENS
    block = tl.program_id(0) // PARTS
    row = tl.arange(0, ROWS)
    rows = block * ROWS + row
    safe = (rows if N % ROWS == 0 else tl.minimum(rows, N - 1)).to(tl.int64)
    half = weight + N * weight_stride if GATED else weight
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(0) % PARTS * (K // PARTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_rows(weight + begin, safe, weight_stride, K // PARTS)
        if GATED:
            fetch_rows(half + begin, safe, weight_stride, K // PARTS)
        tl.extra.cuda.gdc_wait()

    column = begin + tl.arange(0, COLUMNS)
    w_at = safe[:, None] * weight_stride + column[None, :]
    x_at = token.to(tl.int64)[None, :] * x_stride + column[:, None]
    there = (token < tokens)[None, :]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    gated = sums
    squares = tl.zeros([TOKENS], tl.float32)
    # sums across threads cost more than the few products of a short turn: where turns are many, they come once, at the end
    OFTEN: tl.constexpr = NORM and K // PARTS > FEW_TURNS * COLUMNS
    if OFTEN:
        powers = tl.zeros([COLUMNS, TOKENS], tl.float32)
    for start in tl.range(0, K // PARTS, COLUMNS, num_stages=STAGES):
        tile = tl.load(weight + start + w_at, eviction_policy="evict_first")
        a = tl.load(x + start + x_at, mask=there, other=0.0)
        if NORM:
            plain = a.to(tl.float32)
            if OFTEN:
                powers += plain * plain
            else:
                squares += tl.sum(plain * plain, 0)
            a = (plain * tl.load(norm_weight + start + column[:, None]).to(tl.float32)).to(a.dtype)
        if BITS == 8:
            tile = of_fp8(tile, scales, safe, begin + start, GROUP, K, ROWS, COLUMNS).to(a.dtype)
        sums = tl.dot(tile, a, sums)
        if GATED:
            other = tl.load(half + start + w_at, eviction_policy="evict_first")
            if BITS == 8:
                other = of_fp8(other, scales, N + safe, begin + start, GROUP, K, ROWS, COLUMNS).to(a.dtype)
            gated = tl.dot(other, a, gated)
    total, up = sums, gated
    if OFTEN:
        squares = tl.sum(powers, 0)

    if PARTS > 1:
        at = row[:, None] * TOKENS + token[None, :]
        if NORM:
            tl.store(partial + tl.program_id(0) * SIZE + SIZE - TOKENS + token, squares)
        if not is_last_of_parts(partial, at, total, up, counters + block, SIZE, ROWS * TOKENS, PARTS, GATED):
            return
        total, up = sums_of_parts(partial, at, up, counters + block, block * PARTS, SIZE, ROWS * TOKENS, PARTS, GATED)
        if NORM:
            squares = sum_of_parts(partial, SIZE - TOKENS + token, block * PARTS, SIZE, PARTS)

    if BITS < 16 and GROUP == 0:
        total *= tl.load(scales + safe).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scales + N + safe).to(tl.float32)[:, None]
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[None, :]
        total *= scale
        if GATED:
            up *= scale
    finish_tile(total, up, rows, safe, token, tokens, bias, out, out_stride, N, BIAS, RESIDUAL, GATED)
