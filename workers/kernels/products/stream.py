"""Products of up to 4 tokens: multiplies and adds in float32 while W streams through registers.

A norm's scale is one number per token, so it is applied to the sums: x is read once, and nothing is rounded before the end.
Imports triton.
"""

import triton
import triton.language as tl


@triton.jit
def _eights(products, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> sums of eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(products, [ROWS, COLUMNS // 8, 8]), 2)


@triton.jit
def _squares(x, COLUMNS: tl.constexpr):
    return tl.sum(tl.reshape(x * x, [COLUMNS // 8, 8]), 1)


@triton.jit
def residual_of(out, token, tokens, rows, out_stride, N: tl.constexpr, RESIDUAL: tl.constexpr):
    """What `finish` adds one token's sums to, [ROWS], on its way before they are complete; zeros where it adds nothing."""
    before = tl.zeros(rows.shape, tl.float32)
    if RESIDUAL:
        at = out + token.to(tl.int64) * out_stride + rows
        before = tl.load(at, mask=rows < tl.where(token < tokens, N, 0), other=0.0).to(tl.float32)
    return before


@triton.jit
def finish(sums, before, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
           NORM: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """One token's sums [ROWS] -> its place in `out`. `power`: the sum of its squares. before: of `residual_of`."""
    if NORM:
        sums *= tl.rsqrt(power / K + eps)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    at = out + token.to(tl.int64) * out_stride + rows
    tl.store(at, (sums + before).to(out.dtype.element_ty), mask=rows < tl.where(token < tokens, N, 0))


@triton.jit
def finish_gated(gate, up, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
                  NORM: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """One token's sums of the gate and of the other half [ROWS] -> silu(gate) * up in its place in `out`."""
    if NORM:
        scale = tl.rsqrt(power / K + eps)
        gate *= scale
        up *= scale
    if BIAS:
        gate += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
    at = out + token.to(tl.int64) * out_stride + rows
    tl.store(at, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=rows < tl.where(token < tokens, N, 0))


@triton.jit
def _tile(base, rows, columns, row_stride, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """W[rows, columns], zero beyond its edge; no mask where there is no edge."""
    at = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if K % COLUMNS == 0:
        if N % ROWS == 0:
            tile = tl.load(at, eviction_policy="evict_first")
        else:
            tile = tl.load(at, mask=(rows < N)[:, None], other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(rows < N)[:, None] & (columns < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def within(at, columns, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers in float32, zero beyond K; no mask where nothing is beyond."""
    return (tl.load(at) if K % COLUMNS == 0 else tl.load(at, mask=columns < K, other=0.0)).to(tl.float32)


@triton.jit
def _row(x, token, tokens, columns, x_stride, norm_weight, K: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """x[token, columns] in float32, and the same times the norm's weight. Rows beyond the last repeat it."""
    at = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + columns
    plain = within(at, columns, K, COLUMNS)
    scaled = plain
    if NORM:
        scaled = plain * within(norm_weight + columns, columns, K, COLUMNS)
    return plain, scaled


@triton.jit
def _step(tile, other, x, norm_weight, token, tokens, columns, x_stride, sums, gated, power, K: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Adds one tile's share of one token to its sums."""
    plain, scaled = _row(x, token, tokens, columns, x_stride, norm_weight, K, COLUMNS, NORM)
    if NORM:
        power += _squares(plain, COLUMNS)
    sums += _eights(tile.to(tl.float32) * scaled[None, :], ROWS, COLUMNS)
    if GATED:
        gated += _eights(other.to(tl.float32) * scaled[None, :], ROWS, COLUMNS)
    return sums, gated, power


@triton.jit(do_not_specialize=["tokens"])
def stream(x, norm_weight, weight, bias, out, tokens, x_stride, weight_stride, out_stride, eps, N: tl.constexpr,
           K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
           NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
           SMALL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens. N counts rows of the output. SMALL:
    W is, so that what comes behind may as well start at once; else as soon as the sums are complete.

    Programs of the same rows are neighbours, so that what one reads of W the next finds in the L2 cache.
    """
    shares = tl.cdiv(tokens, TOKENS)
    rows = tl.program_id(0) // shares * ROWS + tl.arange(0, ROWS)
    safe = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    first = tl.program_id(0) % shares * TOKENS
    columns = tl.arange(0, COLUMNS)
    half = weight + N * weight_stride if GATED else weight
    if PDL and SMALL:
        tl.extra.cuda.gdc_launch_dependents()
    if STAGES == 0:
        tile = _tile(weight, safe, columns, weight_stride, N, K, ROWS, COLUMNS)
        other = _tile(half, safe, columns, weight_stride, N, K, ROWS, COLUMNS) if GATED else tile
    if PDL:
        tl.extra.cuda.gdc_wait()

    before0 = residual_of(out, first, tokens, rows, out_stride, N, RESIDUAL)
    before1, before2, before3 = before0, before0, before0
    if TOKENS > 1:
        before1 = residual_of(out, first + 1, tokens, rows, out_stride, N, RESIDUAL)
    if TOKENS > 2:
        before2 = residual_of(out, first + 2, tokens, rows, out_stride, N, RESIDUAL)
        before3 = residual_of(out, first + 3, tokens, rows, out_stride, N, RESIDUAL)
    zeros = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    none = tl.zeros([COLUMNS // 8], tl.float32)
    s0, s1, s2, s3 = zeros, zeros, zeros, zeros
    g0, g1, g2, g3 = zeros, zeros, zeros, zeros
    p0, p1, p2, p3 = none, none, none, none
    if STAGES == 0:
        for start in tl.static_range(0, K, COLUMNS):
            now = start + columns
            here, beside = tile, other
            if start + COLUMNS < K:
                tile = _tile(weight, safe, now + COLUMNS, weight_stride, N, K, ROWS, COLUMNS)
                other = _tile(half, safe, now + COLUMNS, weight_stride, N, K, ROWS, COLUMNS) if GATED else tile
            s0, g0, p0 = _step(here, beside, x, norm_weight, first, tokens, now, x_stride, s0, g0, p0, K, ROWS,
                               COLUMNS, NORM, GATED)  # fmt: skip
            if TOKENS > 1:
                s1, g1, p1 = _step(here, beside, x, norm_weight, first + 1, tokens, now, x_stride, s1, g1, p1, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip
            if TOKENS > 2:
                s2, g2, p2 = _step(here, beside, x, norm_weight, first + 2, tokens, now, x_stride, s2, g2, p2, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip
                s3, g3, p3 = _step(here, beside, x, norm_weight, first + 3, tokens, now, x_stride, s3, g3, p3, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip
    else:
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            now = start + columns
            tile = _tile(weight, safe, now, weight_stride, N, K, ROWS, COLUMNS)
            other = _tile(half, safe, now, weight_stride, N, K, ROWS, COLUMNS) if GATED else tile
            s0, g0, p0 = _step(tile, other, x, norm_weight, first, tokens, now, x_stride, s0, g0, p0, K, ROWS,
                               COLUMNS, NORM, GATED)  # fmt: skip
            if TOKENS > 1:
                s1, g1, p1 = _step(tile, other, x, norm_weight, first + 1, tokens, now, x_stride, s1, g1, p1, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip
            if TOKENS > 2:
                s2, g2, p2 = _step(tile, other, x, norm_weight, first + 2, tokens, now, x_stride, s2, g2, p2, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip
                s3, g3, p3 = _step(tile, other, x, norm_weight, first + 3, tokens, now, x_stride, s3, g3, p3, K, ROWS,
                                   COLUMNS, NORM, GATED)  # fmt: skip

    if PDL and not SMALL:
        tl.extra.cuda.gdc_launch_dependents()
    _end(s0, g0, before0, p0, first, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, GATED)
    if TOKENS > 1:
        _end(s1, g1, before1, p1, first + 1, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, GATED)
    if TOKENS > 2:
        _end(s2, g2, before2, p2, first + 2, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, GATED)
        _end(s3, g3, before3, p3, first + 3, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, GATED)


@triton.jit
def _end(sums, gated, before, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
         NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    total = tl.sum(sums, 1)
    squares = tl.sum(power, 0)
    if GATED:
        finish_gated(total, tl.sum(gated, 1), squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS)
    else:
        finish(total, before, squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS)
