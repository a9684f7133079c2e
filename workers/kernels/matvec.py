"""Products of a few tokens with a large matrix, bound by the matrix's bytes, fused with what stands around them.

`y = f(x) @ W.T`, where f may be an RMSNorm, and y may get a bias, become SwiGLU's product, or be added to the residual: with
it, a decode layer is six launches. Two kernels:

- `_stream`, up to 4 tokens: multiplies and adds in float32 while W streams through registers. A norm's scale is one number per
  token, so it is applied to the sums: x is read once, and nothing is rounded before the end.
- `_tiles`, up to 64 tokens, 16-bit: tensor cores. K may be split among the warps of a program and among programs, of which the
  last to end adds the sums in a fixed order. x times the norm's weight is rounded to the dtype, the norm's scale is applied to
  the sums.

No sum is added up by atomics: results do not change from run to run. A row's result depends on the kernel that took it
and, within one kernel, not on how many rows there are. Configurations are fixed by shape; what others would give:
`python -m benchmarks.kernels --sweep`.

Imports torch and triton.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import fetch_rows, interpreted
from workers.kernels.norm import rms_norm

STREAM_TOKENS = 4  # of one program of `_stream`; more tokens are more programs
MAX_TOKENS = 64
MAX_TOKENS_OF_WIDE = 32  # of products with more outputs than inputs
FEW_OF_LARGE = 2  # tokens that `_stream` takes where W is large
SMALL_NUMBERS = 8 << 20  # of W
LEAST_TILE_TOKENS = 8  # of the tensor cores' products
DEEP_PROGRAMS, WIDE_PROGRAMS = 160, 128
MAX_TILES = 1024  # of rows, where K is split among programs


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut. With SwiGLU, a program takes so many rows of the gate and as many of the other half."""

    rows: int  # of W that a program takes
    columns: int  # of W that it takes at a time
    warps: int
    stages: int = 0  # tiles in shared memory ahead of the sums; 0: the next tile in registers
    splits: int = 0  # `_tiles`: into how many parts K is split among the warps; 0: `_stream`
    parts: int = 1  # `_tiles`: and among so many programs


@triton.jit
def _eights(products, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> sums of eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(products, [ROWS, COLUMNS // 8, 8]), 2)


@triton.jit
def _squares(x, COLUMNS: tl.constexpr):
    return tl.sum(tl.reshape(x * x, [COLUMNS // 8, 8]), 1)


@triton.jit
def _finish(sums, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
            NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """One token's sums [ROWS] -> its place in `out`. `power`: the sum of its squares."""
    if NORM:
        sums *= tl.rsqrt(power / K + eps)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    mask = rows < tl.where(token < tokens, N, 0)
    at = out + token.to(tl.int64) * out_stride + rows
    if RESIDUAL:
        sums += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finish_gated(gate, up, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
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
def _within(at, columns, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers in float32, zero beyond K; no mask where nothing is beyond."""
    return (tl.load(at) if K % COLUMNS == 0 else tl.load(at, mask=columns < K, other=0.0)).to(tl.float32)


@triton.jit
def _row(x, token, tokens, columns, x_stride, norm_weight, K: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """x[token, columns] in float32, and the same times the norm's weight. Rows beyond the last repeat it."""
    at = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + columns
    plain = _within(at, columns, K, COLUMNS)
    scaled = plain
    if NORM:
        scaled = plain * _within(norm_weight + columns, columns, K, COLUMNS)
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
def _stream(x, norm_weight, weight, bias, out, tokens, x_stride, weight_stride, out_stride, eps, N: tl.constexpr,
            K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
            NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens. N counts rows of the output.

    Programs of the same rows are neighbours, so that what one reads of W the next finds in the L2 cache.
    """
    shares = tl.cdiv(tokens, TOKENS)
    rows = tl.program_id(0) // shares * ROWS + tl.arange(0, ROWS)
    safe = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    first = tl.program_id(0) % shares * TOKENS
    columns = tl.arange(0, COLUMNS)
    half = weight + N * weight_stride if GATED else weight
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if STAGES == 0:
        tile = _tile(weight, safe, columns, weight_stride, N, K, ROWS, COLUMNS)
        other = _tile(half, safe, columns, weight_stride, N, K, ROWS, COLUMNS) if GATED else tile
    if PDL:
        if K > COLUMNS or STAGES > 0:
            fetch_rows(weight, safe, weight_stride, ROWS, K)
            if GATED:
                fetch_rows(half, safe, weight_stride, ROWS, K)
        tl.extra.cuda.gdc_wait()

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

    _end(s0, g0, p0, first, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)
    if TOKENS > 1:
        _end(s1, g1, p1, first + 1, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)
    if TOKENS > 2:
        _end(s2, g2, p2, first + 2, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)
        _end(s3, g3, p3, first + 3, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL, GATED)


@triton.jit
def _end(sums, gated, power, token, tokens, rows, bias, out, out_stride, eps, N: tl.constexpr, K: tl.constexpr,
         NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    total = tl.sum(sums, 1)
    squares = tl.sum(power, 0)
    if GATED:
        _finish_gated(total, tl.sum(gated, 1), squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS)
    else:
        _finish(total, squares, token, tokens, rows, bias, out, out_stride, eps, N, K, NORM, BIAS, RESIDUAL)


@triton.jit
def _sum_of_parts(partial, at, first, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """What the programs of one tile have left at their places from `first` on, added in their order."""
    total = tl.load(partial + first * SIZE + at, cache_modifier=".cg")
    for other in tl.static_range(1, PARTS):
        total += tl.load(partial + (first + other) * SIZE + at, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["tokens"])
def _tiles(x, norm_weight, weight, bias, out, partial, counters, tokens, x_stride, weight_stride, out_stride, eps,
           N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           SPLITS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, over one of PARTS parts of K.

    partial: of each program its sums [ROWS, TOKENS], those of the other half, and the sums of squares [TOKENS].
    counters: one for each tile of rows, 0 before and after. COLUMNS divides K / PARTS.
    """
    SPLIT: tl.constexpr = COLUMNS // SPLITS
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
        fetch_rows(weight + begin, safe, weight_stride, ROWS, K // PARTS)
        if GATED:
            fetch_rows(half + begin, safe, weight_stride, ROWS, K // PARTS)
        tl.extra.cuda.gdc_wait()

    if SPLITS == 1:
        column = begin + tl.arange(0, COLUMNS)
        w_at = safe[:, None] * weight_stride + column[None, :]
        x_at = token.to(tl.int64)[None, :] * x_stride + column[:, None]
        there = (token < tokens)[None, :]
        scale_at = column[:, None]
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        squares = tl.zeros([TOKENS], tl.float32)
    else:
        column = begin + tl.arange(0, SPLITS)[:, None] * SPLIT + tl.arange(0, SPLIT)[None, :]
        w_at = safe[None, :, None] * weight_stride + column[:, None, :]
        x_at = token.to(tl.int64)[None, None, :] * x_stride + column[:, :, None]
        there = (token < tokens)[None, None, :]
        scale_at = column[:, :, None]
        sums = tl.zeros([SPLITS, ROWS, TOKENS], tl.float32)
        squares = tl.zeros([SPLITS, TOKENS], tl.float32)
    gated = sums
    for start in tl.range(0, K // PARTS, COLUMNS, num_stages=STAGES):
        tile = tl.load(weight + start + w_at, eviction_policy="evict_first")
        a = tl.load(x + start + x_at, mask=there, other=0.0)
        if NORM:
            plain = a.to(tl.float32)
            squares += tl.sum(plain * plain, len(plain.shape) - 2)
            a = (plain * tl.load(norm_weight + start + scale_at).to(tl.float32)).to(a.dtype)
        sums = tl.dot(tile, a, sums)
        if GATED:
            gated = tl.dot(tl.load(half + start + w_at, eviction_policy="evict_first"), a, gated)
    total, up = sums, gated
    if SPLITS > 1:
        total, up, squares = tl.sum(sums, 0), tl.sum(gated, 0), tl.sum(squares, 0)

    if PARTS > 1:
        at = row[:, None] * TOKENS + token[None, :]
        here = partial + tl.program_id(0) * SIZE
        tl.store(here + at, total)
        if GATED:
            tl.store(here + ROWS * TOKENS + at, up)
        if NORM:
            tl.store(here + SIZE - TOKENS + token, squares)
        tl.debug_barrier()  # every thread's stores come before the count
        if tl.atomic_add(counters + block, 1, sem="acq_rel") < PARTS - 1:
            return
        tl.store(counters + block, 0)
        total = _sum_of_parts(partial, at, block * PARTS, SIZE, PARTS)
        if GATED:
            up = _sum_of_parts(partial, ROWS * TOKENS + at, block * PARTS, SIZE, PARTS)
        if NORM:
            squares = _sum_of_parts(partial, SIZE - TOKENS + token, block * PARTS, SIZE, PARTS)

    if NORM:
        total *= tl.rsqrt(squares / K + eps)[None, :]
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    mask = (token < tokens)[None, :] & (rows < N)[:, None]
    place = out + token.to(tl.int64)[None, :] * out_stride + rows[:, None]
    if GATED:
        if NORM:
            up *= tl.rsqrt(squares / K + eps)[None, :]
        if BIAS:
            up += tl.load(bias + N + safe).to(tl.float32)[:, None]
        total = total / (1 + tl.exp(-total)) * up
    if RESIDUAL:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def matvec(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    pdl: bool = False,
    counters: Tensor | None = None,
    config: Tiling | None = None,
) -> Tensor:
    """x [tokens, K], up to MAX_TOKENS rows that may lie apart; weight [N, K], contiguous -> f(x) @ weight.T [tokens, N].

    norm_weight [K]: f is the RMSNorm with `eps`; else f(x) is x. bias [N] is added to the product. residual [tokens, N]:
    the result is added to it in place, in float32 and rounded once, and it is what is returned. swiglu: `weight` is
    [2 * I, K], the gate first, and the result silu(gate) * up [tokens, I]. counters: [N / config.rows] int32 zeros, which stay
    zeros, for calls that follow one another; None where K is never split among programs. `config` replaces the fixed choice
    of `choose`.

    Raises ValueError for more tokens, for too few counters, and for what `out` or `residual` and `swiglu` cannot be at once.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if swiglu else weight.shape[0]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens are more than the {MAX_TOKENS} that matvec serves: use torch's F.linear for them")
    if residual is not None and (swiglu or out is not None):
        raise ValueError("a residual is itself the output, and of a plain product: give neither `out` nor `swiglu` with it")
    target = residual if residual is not None else out
    if target is None:
        target = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not tokens:
        return target
    if config is None:
        config = choose(n, k, tokens, x.dtype, swiglu) or _stream_tiling(n, k, tokens, x.dtype, swiglu)
    pdl = pdl and not interpreted()
    tiled = config.splits > 0
    if tiled and x.dtype == torch.float16 and norm_weight is not None:  # x times the norm's weight might overflow
        x, norm_weight = rms_norm(x, norm_weight, eps, pdl=pdl), None
    flags = {
        "N": n, "K": k, "ROWS": config.rows, "COLUMNS": config.columns, "STAGES": config.stages,
        "NORM": norm_weight is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None, "GATED": swiglu,
        "PDL": pdl, "num_warps": config.warps, "launch_pdl": pdl,
    }  # fmt: skip
    operands = (
        x, weight if norm_weight is None else norm_weight, weight, weight if bias is None else bias, target, tokens,
        x.stride(0), weight.stride(0), target.stride(0), eps,
    )  # fmt: skip
    programs = triton.cdiv(n, config.rows)
    if tiled:
        padded = max(LEAST_TILE_TOKENS, triton.next_power_of_2(tokens))
        partial = target
        if config.parts > 1:
            sums = programs * config.parts * (2 * config.rows + 1) * padded
            partial = torch.empty(sums, dtype=torch.float32, device=x.device)
            if counters is None or len(counters) < programs:
                raise ValueError(f"K is split among programs, which count themselves: give {programs} counters")
        _tiles[(programs * config.parts,)](
            *operands[:5], partial, target if counters is None else counters, *operands[5:], TOKENS=padded,
            SPLITS=config.splits, PARTS=config.parts, **flags,
        )  # fmt: skip
    else:
        share = 1 if tokens == 1 else 2 if tokens == 2 else STREAM_TOKENS
        _stream[(programs * triton.cdiv(tokens, share),)](*operands, TOKENS=share, **flags)
    return target


def choose(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool = False) -> Tiling | None:
    """The configuration for an output of n numbers from k, by shape alone; None where the library's product is the faster.

    The best of sweeps on an H200 over the products of the 0.6B and the 8B shape (`python -m benchmarks.kernels --sweep`).
    """
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if tokens <= (STREAM_TOKENS if small or dtype == torch.float32 else FEW_OF_LARGE):
        return _stream_tiling(n, k, tokens, dtype, swiglu)
    if dtype == torch.float32 or tokens > MAX_TOKENS:
        return None
    if n <= k:  # what is added to the residual: few rows, so the library's products leave much of the device idle
        return _tiling(n, k, Tiling(32, 128, 4, 4, 1) if n < 4096 else Tiling(64, 128, 4, 6, 1), DEEP_PROGRAMS)
    if small and tokens <= MAX_TOKENS_OF_WIDE:
        return _tiling(n, k, Tiling(64, 64, 4, 8, 1), WIDE_PROGRAMS)
    return None


def _stream_tiling(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool) -> Tiling:
    if tokens == 1 and dtype != torch.float32 and k % 512 == 0:
        if n < 2048 and k % 2048 == 0:
            return Tiling(4, 2048, 8)
        if k <= 1024 and not swiglu:
            return Tiling(4, 512, 2)
        return Tiling(4, 512, 4) if k >= 8192 else Tiling(4, 1024, 4)
    rows = 2 if n < 2048 or swiglu else 4
    return Tiling(rows, min(1024, int(triton.next_power_of_2(k))), 4)


def _tiling(n: int, k: int, tile: Tiling, programs: int) -> Tiling | None:
    """K among as many programs as make so many in all, and as divide it; None if one cannot take it."""
    for parts in (8, 4, 2, 1):
        tiles = triton.cdiv(n, tile.rows)
        if (parts == 1 or tiles * parts <= min(programs, MAX_TILES)) and k % (tile.columns * parts) == 0:
            return replace(tile, parts=parts)
    return None
