"""Products of up to 64 tokens in FP8 with a matrix in FP8, by the tensor cores, from shared memory as they are.

K may be split among programs as in `tiles`. Tensor cores add up 128 columns or so at less than float32's precision, these sums
are added in float32. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.products.tiles import finish_tile, is_last_of_parts, kept, sums_of_parts


@triton.jit
def _scale(x_scales, scales, near, padded, rows, group, GROUPS: tl.constexpr, SQUARE: tl.constexpr):
    """Of the sums of one group: [1, TOKENS] where the rows share a scale, else [ROWS, TOKENS]."""
    of_x = tl.load(x_scales + group * padded + near)[None, :]
    if SQUARE:
        scale = of_x * tl.load(scales + rows * GROUPS + group).to(tl.float32)
    else:
        scale = of_x * tl.load(scales + rows * GROUPS + group).to(tl.float32)[:, None]
    return scale


@triton.jit(do_not_specialize=["tokens", "padded"])
def fp8_tiles(x, x_scales, weight, scales, bias, out, partial, counters, tokens, padded, out_stride, N: tl.constexpr,
              K: tl.constexpr, GROUP: tl.constexpr, SQUARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
              GATED: tl.constexpr, PDL: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, over one of PARTS parts of K.

    x, x_scales: as `Rounded` has them. partial: of each program its sums [ROWS, TOKENS], and those of the other half. counters:
    one for each tile of rows, 0 before and after. COLUMNS divides K / PARTS, and GROUP, columns that share a scale; 0: all
    of a row, and of a token, do.
    SQUARE: all rows of a program share theirs. WIDE: multiplied in float16, which has every number of FP8.
    """
    SIZE: tl.constexpr = 2 * ROWS * TOKENS if GATED else ROWS * TOKENS
    GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 1
    block = tl.program_id(0) // PARTS
    row = tl.arange(0, ROWS)
    rows = block * ROWS + row
    safe = (rows if N % ROWS == 0 else tl.minimum(rows, N - 1)).to(tl.int64)
    half = weight + N * K if GATED else weight
    token = tl.arange(0, TOKENS)
    near = tl.minimum(token, tokens - 1)
    begin = tl.program_id(0) % PARTS * (K // PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    column = begin + tl.arange(0, COLUMNS)
    w_at = safe[:, None] * K + column[None, :]
    x_at = near[None, :] * K + column[:, None]
    scaled = (block * ROWS).to(tl.int64) if SQUARE else safe
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    gated = sums
    if GROUP > 0:
        scale = _scale(x_scales, scales, near, padded, scaled, begin // GROUP, GROUPS, SQUARE)
        beside = _scale(x_scales, scales, near, padded, N + scaled, begin // GROUP, GROUPS, SQUARE) if GATED else scale
    for start in tl.range(0, K // PARTS, COLUMNS, num_stages=STAGES):
        tile = tl.load(weight + start + w_at, eviction_policy="evict_first")
        a = tl.load(x + start + x_at)
        if GATED:
            other = tl.load(half + start + w_at, eviction_policy="evict_first")
        if WIDE:
            tile, a = tile.to(tl.float16), a.to(tl.float16)
            if GATED:
                other = other.to(tl.float16)
        if GROUP > 0:  # the next scales are on their way while these columns are multiplied
            now, now_beside = scale, beside
            group = tl.minimum(begin + start + COLUMNS, K - 1) // GROUP
            scale = _scale(x_scales, scales, near, padded, scaled, group, GROUPS, SQUARE)
            sums += tl.dot(tile, a) * now
            if GATED:
                beside = _scale(x_scales, scales, near, padded, N + scaled, group, GROUPS, SQUARE)
                gated += tl.dot(other, a) * now_beside
        else:
            sums += tl.dot(tile, a)
            if GATED:
                gated += tl.dot(other, a)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    total, up = sums, gated
    before, weights = kept(total, out, out_stride, out, rows, safe, token, tokens, N, RESIDUAL, False)

    if PARTS > 1:
        at = row[:, None] * TOKENS + token[None, :]
        if not is_last_of_parts(partial, at, total, up, counters + block, SIZE, ROWS * TOKENS, PARTS, GATED):
            return
        total, up = sums_of_parts(partial, at, up, counters + block, block * PARTS, SIZE, ROWS * TOKENS, PARTS, GATED)

    if GROUP == 0:
        of_x = tl.load(x_scales + near)[None, :]
        total *= of_x * tl.load(scales + safe).to(tl.float32)[:, None]
        if GATED:
            up *= of_x * tl.load(scales + N + safe).to(tl.float32)[:, None]
    finish_tile(total, up, before, weights, rows, safe, token, tokens, bias, out, out_stride, out, out, block, N, BIAS,
                RESIDUAL, GATED, False)  # fmt: skip
