"""Products of some tokens, 16-bit, by the tensor cores.

K may be split among programs, of which the last to end adds the sums in a fixed order. A norm's scale is applied to the sums
(`prenormed`). Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.products.prenormed import powers_of, scale_of, store_prenormed
from workers.kernels.products.widen import of_fp8


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
def kept(total, out, out_stride, next_weight, rows, safe, token, tokens, N: tl.constexpr, RESIDUAL: tl.constexpr,
         NEXT: tl.constexpr):  # fmt: skip
    """What `finish_tile` adds to and multiplies by, on its way before the sums are complete: the residual [ROWS, TOKENS] and
    the next norm's weights [ROWS]; anything, where there is none."""
    before, weights = total, total
    if RESIDUAL:
        mask = (token < tokens)[None, :] & (rows < N)[:, None]
        before = tl.load(out + token.to(tl.int64)[None, :] * out_stride + rows[:, None], mask=mask, other=0.0)
    if NEXT:
        weights = tl.load(next_weight + safe)
    return before, weights


@triton.jit
def finish_tile(total, up, before, weights, rows, safe, token, tokens, bias, out, out_stride, next_values, next_squares, part,
                N: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
                NEXT: tl.constexpr):  # fmt: skip
    """A tile's sums [ROWS, TOKENS], and those of the other half, to their places in `out`. before, weights: as `kept` gives
    them. NEXT: what has become of the residual is left to the next norm as well."""
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    mask = (token < tokens)[None, :] & (rows < N)[:, None]
    place = out + token.to(tl.int64)[None, :] * out_stride + rows[:, None]
    if GATED:
        if BIAS:
            up += tl.load(bias + N + safe).to(tl.float32)[:, None]
        total = total / (1 + tl.exp(-total)) * up
    if RESIDUAL:
        total += before.to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(place, rounded, mask=mask)
    if NEXT:
        store_prenormed(rounded, weights, next_values, next_squares, part, rows, token, tokens, N)


@triton.jit(do_not_specialize=["tokens"])
def tiles(x, weight, x_at, weight_at, bias, out, scales, squares, next_weight, next_values, next_squares, partial, counters,
          tokens, x_stride, weight_stride, out_stride, eps, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr,
          BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr,
          BITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, over one of PARTS parts of K.

    x_at, weight_at: descriptors of both, in such tiles; None where they are read by pointers. partial: of each program its sums
    [ROWS, TOKENS], and those of the other half. counters: one for each tile of rows and tokens, 0 before and after. COLUMNS
    divides K / PARTS. squares: the parts of a `Prenormed` x, SQUARES of them; 0: x is as it is. next_values, next_squares:
    where NEXT, of a `Prenormed` out. BITS, GROUP, scales: as in `of_fp8`.
    """
    SIZE: tl.constexpr = (2 * ROWS if GATED else ROWS) * TOKENS
    tile_of = tl.program_id(0) // PARTS
    of_tokens = tl.cdiv(tokens, TOKENS)
    block = tile_of // of_tokens
    row = tl.arange(0, ROWS)
    rows = block * ROWS + row
    safe = (rows if N % ROWS == 0 else tl.minimum(rows, N - 1)).to(tl.int64)
    half = weight + N * weight_stride if GATED else weight
    lane = tl.arange(0, TOKENS)
    token = tile_of % of_tokens * TOKENS + lane
    begin = tl.program_id(0) % PARTS * (K // PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    column = begin + tl.arange(0, COLUMNS)
    of_weight = safe[:, None] * weight_stride + column[None, :]
    of_x = token.to(tl.int64)[None, :] * x_stride + column[:, None]
    there = (token < tokens)[None, :]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    gated = sums
    if SQUARES > 0:
        powers = powers_of(squares, token, tokens, there, SQUARES)
    for start in tl.range(0, K // PARTS, COLUMNS, num_stages=STAGES):
        if weight_at is None:
            tile = tl.load(weight + start + of_weight, eviction_policy="evict_first")
            a = tl.load(x + start + of_x, mask=there, other=0.0)
        else:
            tile = weight_at.load([block * ROWS, begin + start])
            a = tl.trans(x_at.load([tile_of % of_tokens * TOKENS, begin + start]))
        if BITS == 8:
            tile = of_fp8(tile, scales, safe, begin + start, GROUP, K, ROWS, COLUMNS).to(a.dtype)
        sums = tl.dot(tile, a, sums)
        if GATED:
            if weight_at is None:
                other = tl.load(half + start + of_weight, eviction_policy="evict_first")
            else:
                other = weight_at.load([N + block * ROWS, begin + start])
            if BITS == 8:
                other = of_fp8(other, scales, N + safe, begin + start, GROUP, K, ROWS, COLUMNS).to(a.dtype)
            gated = tl.dot(other, a, gated)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    total, up = sums, gated
    before, weights = kept(total, out, out_stride, next_weight, rows, safe, token, tokens, N, RESIDUAL, NEXT)

    if PARTS > 1:
        at = row[:, None] * TOKENS + lane[None, :]
        counter = counters + tile_of
        if not is_last_of_parts(partial, at, total, up, counter, SIZE, ROWS * TOKENS, PARTS, GATED):
            return
        total, up = sums_of_parts(partial, at, up, counter, tile_of * PARTS, SIZE, ROWS * TOKENS, PARTS, GATED)

    if BITS < 16 and GROUP == 0:
        total *= tl.load(scales + safe).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scales + N + safe).to(tl.float32)[:, None]
    if SQUARES > 0:
        scale = scale_of(powers, eps, K)
        total *= scale
        if GATED:
            up *= scale
    finish_tile(total, up, before, weights, rows, safe, token, tokens, bias, out, out_stride, next_values, next_squares, block,
                N, BIAS, RESIDUAL, GATED, NEXT)  # fmt: skip
