"""Products of up to 8 tokens, 16-bit, with a matrix in four bits: few rows a program, whose warps share K.

What `four_bits` does, where there is too little for each program: its parts of K are added up in shared memory, not by way of
the L2 cache by whichever program comes last. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.launch import fetch_rows
from workers.kernels.products.four_bits import added, of_scales, of_zeros
from workers.kernels.products.tiles import finish_tile


@triton.jit
def _of_x(x, column, element, token, tokens, x_stride):
    """x at columns [SLICES] and as many as there are in `element` behind each: [SLICES, WIDTH, TOKENS]."""
    at = x + (column[:, None, None] + element[None, :, None]) + token.to(tl.int64)[None, None, :] * x_stride
    return tl.load(at, mask=(token < tokens)[None, None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def four_bit_few(x, weight, bias, out, scales, zeros, tokens, x_stride, out_stride, N: tl.constexpr, K: tl.constexpr,
                 TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, SPAN: tl.constexpr,
                 GROUP: tl.constexpr, FOURS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
                 GATED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, SLICES times COLUMNS columns at a time, each
    slice by warps of its own. weight, scales, zeros, SPAN, FOURS: as in `four_bit_tiles`; COLUMNS divides SPAN, and all slices
    K."""
    ROW: tl.constexpr = K // 4  # elements
    WIDTH: tl.constexpr = COLUMNS // 4
    QUARTER: tl.constexpr = SPAN // 4
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = (rows if N % ROWS == 0 else tl.minimum(rows, N - 1)).to(tl.int64)
    token, element, own = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, SLICES) * WIDTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_rows(weight, safe, ROW, ROW)
        if GATED:
            fetch_rows(weight, N + safe, ROW, ROW)
        tl.extra.cuda.gdc_wait()
    mine = safe[None, :]
    w_at = weight + mine[:, :, None] * ROW + own[:, None, None] + element[None, None, :]
    sums = tl.zeros([SLICES, ROWS, TOKENS], tl.float32)
    gated = sums
    for start in tl.range(0, ROW, SLICES * WIDTH, num_stages=STAGES):
        column = (start + own) // QUARTER * SPAN + (start + own) % QUARTER
        its_zeros = of_zeros(zeros, mine, column[:, None], K, GROUP, QUARTER, FOURS)
        its_scales = of_scales(scales, mine, column[:, None], K, GROUP, QUARTER, FOURS)
        if GATED:
            other_zeros = of_zeros(zeros, N + mine, column[:, None], K, GROUP, QUARTER, FOURS)
            other_scales = of_scales(scales, N + mine, column[:, None], K, GROUP, QUARTER, FOURS)
        tile = tl.load(w_at + start, eviction_policy="evict_first")
        if GATED:
            other = tl.load(w_at + N * ROW + start, eviction_policy="evict_first")
        a0, a1 = _of_x(x, column, element, token, tokens, x_stride), _of_x(x, column + QUARTER, element, token, tokens, x_stride)
        a2 = _of_x(x, column + 2 * QUARTER, element, token, tokens, x_stride)
        a3 = _of_x(x, column + 3 * QUARTER, element, token, tokens, x_stride)
        sums = added(sums, tile, its_zeros, its_scales, a0, a1, a2, a3, DTYPE, "tf32")
        if GATED:
            gated = added(gated, other, other_zeros, other_scales, a0, a1, a2, a3, DTYPE, "tf32")
    total, up = tl.sum(sums, 0), tl.sum(gated, 0)
    finish_tile(total, up, rows, safe, token, tokens, bias, out, out_stride, N, BIAS, RESIDUAL, GATED)
