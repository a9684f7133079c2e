"""Products of a few tokens with a large matrix, bound by the matrix's bytes, fused with what stands around them.

`y = f(x) @ W.T`, where f may be an RMSNorm, and y may get a bias, become SwiGLU's product, or be added to the residual: with
it, a decode layer is six launches. `stream` is for a few tokens, `fewer_bits` for a few where W has fewer, `tiles` for more;
`fp8_tiles` for more of bfloat16 where W is in FP8: they are rounded to FP8 too, in a launch before; `four_bit_tiles` for any
with W in four bits, for which a norm is a launch before it.

No sum is added up by atomics: results do not change from run to run. A row's result depends on the kernel that took it
and, within one kernel, not on how many rows there are. Configurations are fixed by shape; what others would give:
`python -m benchmarks.kernels --sweep`.

Imports torch and triton.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from workers.kernels.launch import interpreted
from workers.kernels.lora.few import LowRank, shrink
from workers.kernels.products.fewer import fewer_bits
from workers.kernels.products.four_bits import four_bit_tiles
from workers.kernels.products.fp8_tiles import fp8_tiles
from workers.kernels.products.stream import stream
from workers.kernels.products.tiles import tiles
from workers.kernels.products.widen import ONE
from workers.kernels.reduced import BLOCK, Reduced, Rounded
from workers.kernels.rows.norm import rms_norm, rounded_norm
from workers.kernels.rows.rounding import rounded

STREAM_TOKENS = 4  # of one program of `stream`; more tokens are more programs
FEWER_BITS_TOKENS = 2  # likewise
MAX_TOKENS = 64
MAX_TOKENS_OF_WIDE = 32  # of products with more outputs than inputs
FEW_OF_LARGE = 2  # tokens that `stream` takes where W is large
SMALL_NUMBERS = 8 << 20  # of W
LEAST_TILE_TOKENS = 8  # of the tensor cores' products
LEAST_ADAPTED_TOKENS = 16  # of those with adapters: at 8, QKV took twice as long beside A's product
DEEP_PROGRAMS, WIDE_PROGRAMS, FP8_PROGRAMS = 160, 128, 256
LEAST_OF_FP8 = 512  # columns of a program
FOUR_BIT_WARPS = 1600  # of all programs of `four_bit_tiles`
LEAST_OF_FOUR_BITS = 64  # columns that `four_bit_tiles` takes at a time
MAX_TILES = 1024  # of rows, where K is split among programs


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut. With SwiGLU, a program takes so many rows of the gate and as many of the other half."""

    rows: int  # of W that a program takes
    columns: int  # of W that it takes at a time; `four_bit_tiles`: a span of them at most
    warps: int
    stages: int = 0  # tiles in shared memory ahead of the sums; 0: the next tile in registers
    parts: int = 0  # `tiles`: among how many programs K is split; 0: `stream`
    rounded: bool = False  # `fp8_tiles`: x is rounded to FP8 too


ADAPTED_WIDE, ADAPTED_PROGRAMS = Tiling(64, 64, 4, 4), 256
"""Of products with more outputs than inputs which the library computes where there are no adapters."""

ADAPTED_STAGES = 4
"""At most: beside them a program of `shrink` has to fit into a multiprocessor's shared memory, or they wait for its end."""


def matvec(
    x: Tensor,
    weight: Tensor | Reduced,
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
    low_rank: LowRank | None = None,
) -> Tensor:
    """x [tokens, K], up to MAX_TOKENS rows that may lie apart; weight [N, K], contiguous -> f(x) @ weight.T [tokens, N].
    Weights in fewer bits become numbers in registers: in float32, in `tiles` as x's dtype has them, in `four_bit_tiles` as they
    are. By the latter, and in float16 by `tiles`, f(x) is rounded to x's dtype; where the configuration says so, it is rounded
    to FP8, token by token in the groups of columns that W has.

    norm_weight [K]: f is the RMSNorm with `eps`; else f(x) is x. bias [N] is added to the product. residual [tokens, N]:
    the result is added to it in place, in float32 and rounded once, and it is what is returned. swiglu: `weight` is
    [2 * I, K], the gate first, and the result silu(gate) * up [tokens, I]. counters: [N / config.rows] int32 zeros, which stay
    zeros, for calls that follow one another; None where K is never split among programs. `config` replaces the fixed choice
    of `choose`. low_rank: what adapters add to the product, before SwiGLU; it needs a configuration of `choose_adapted`, and
    with pdl the product begins while their A is multiplied.

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
        bits = 16 if isinstance(weight, Tensor) else weight.bits
        config = choose(n, k, tokens, x.dtype, swiglu, bits) or _stream_tiling(n, k, tokens, x.dtype, swiglu, bits)
        if counters is None and config.parts > 1:
            config = replace(config, parts=1)
    four_bits = isinstance(weight, Reduced) and weight.bits == 4
    pdl = pdl and not interpreted() and not four_bits  # which have not been run so
    tiled = config.parts > 0
    if low_rank is not None and (not tiled or config.rounded):
        raise ValueError("adapters' parts are added by the tensor cores' products: give a configuration of `choose_adapted`")
    if config.rounded:
        assert isinstance(weight, Reduced), "x is rounded for weights in FP8"
        group = weight.group
        near = rounded(x, group) if norm_weight is None else rounded_norm(x, norm_weight, eps, group)
        _fp8(near, weight, bias, target, residual is not None, swiglu, counters, config)
        return target
    # in float16 x times the norm's weight might overflow; few instructions fit beside four bits; and of many tokens with
    # adapters each program would repeat much, in many registers
    apart = x.dtype == torch.float16 or four_bits or (low_rank is not None and tokens > MAX_TOKENS_OF_WIDE)
    if norm_weight is not None and tiled and apart:
        x, norm_weight = rms_norm(x, norm_weight, eps, pdl=pdl), None
    flags = {
        "N": n, "K": k, "ROWS": config.rows, "COLUMNS": config.columns,
        "NORM": norm_weight is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None, "GATED": swiglu,
        "PDL": pdl, "num_warps": config.warps, "launch_pdl": pdl,
    }  # fmt: skip
    values, scales, zeros = (weight, x, x) if isinstance(weight, Tensor) else (weight.values, weight.scales, weight.zeros)
    reduced = {"BITS": 16, "GROUP": 0}
    if not isinstance(weight, Tensor):
        reduced = {"BITS": weight.bits, "GROUP": 0 if weight.by_row else weight.group}
    operands = (
        x, x if norm_weight is None else norm_weight, values, x if bias is None else bias, target, scales,
        scales if zeros is None else zeros, tokens, x.stride(0), values.stride(0), target.stride(0), eps,
    )  # fmt: skip
    programs = triton.cdiv(n, config.rows)
    if tiled:
        least = LEAST_TILE_TOKENS if low_rank is None else LEAST_ADAPTED_TOKENS
        padded = max(least, triton.next_power_of_2(tokens))
        partial = _partial(programs, config, padded, counters) if config.parts > 1 else target
        grid, counts = (programs * config.parts,), target if counters is None else counters
        if isinstance(weight, Reduced) and weight.bits == 4:
            four_bit_tiles[grid](
                x, *operands[2:7], partial, counts, tokens, x.stride(0), target.stride(0), N=n, K=k, TOKENS=padded,
                ROWS=config.rows, COLUMNS=min(config.columns, weight.span), SPAN=weight.span, GROUP=weight.group,
                PARTS=config.parts, STAGES=config.stages, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=swiglu,
                PDL=pdl, num_warps=config.warps, launch_pdl=pdl,
            )  # fmt: skip
            return target
        beside: tuple[Tensor, ...] = (x, x, x, x, x)
        if low_rank is not None:
            low = shrink(x, low_rank, norm_weight, padded=padded, overlap=pdl)
            beside = low, low_rank.b, *low_rank.rows
            first, second = (*low_rank.parts, 0)[:2]
            flags |= {
                "PDL": False, "OVERLAP": pdl, "RANK": low_rank.rank, "LOW": low.shape[1], "FIRST": first, "SECOND": second,
                "PER": low_rank.together, "SHARES": low.shape[0],
            }  # fmt: skip
        tiles[grid](
            *operands[:6], partial, counts, *beside, *operands[7:], TOKENS=padded, PARTS=config.parts, STAGES=config.stages,
            **flags, **reduced,
        )  # fmt: skip
    elif isinstance(weight, Tensor):
        share = 1 if tokens == 1 else 2 if tokens == 2 else STREAM_TOKENS
        stream[(programs * triton.cdiv(tokens, share),)](
            *operands[:5], *operands[7:], TOKENS=share, STAGES=config.stages, **flags
        )
    else:
        share = min(tokens, FEWER_BITS_TOKENS)
        fewer_bits[(programs * triton.cdiv(tokens, share),)](
            *operands[:9], *operands[10:], ONE, TOKENS=share, SPAN=weight.span if weight.bits == 4 else 0, **flags, **reduced
        )
    return target


def _fp8(
    x: Rounded, weight: Reduced, bias: Tensor | None, out: Tensor, add: bool, swiglu: bool, counters: Tensor | None,
    config: Tiling,
) -> None:  # fmt: skip
    """x times weight, with the scales of both, into `out`, or added to it. It never begins before x is rounded: a layer of the
    8B shape takes 87 us then instead of 71."""
    n, k = out.shape[1], weight.shape[1]
    programs, padded = triton.cdiv(n, config.rows), max(LEAST_TILE_TOKENS, triton.next_power_of_2(len(x)))
    columns = config.columns if weight.by_row else min(config.columns, weight.group)
    square = weight.blocks is not None and BLOCK % config.rows == 0 and n % config.rows == 0  # both halves' tiles lie in blocks
    fp8_tiles[(programs * config.parts,)](
        x.values, x.scales, weight.values, weight.scales, out if bias is None else bias, out,
        _partial(programs, config, padded, counters) if config.parts > 1 else out, out if counters is None else counters,
        len(x), len(x.values), out.stride(0), N=n, K=k, GROUP=0 if weight.by_row else weight.group, SQUARE=square,
        TOKENS=padded, ROWS=config.rows, COLUMNS=columns, PARTS=config.parts, STAGES=config.stages, BIAS=bias is not None,
        RESIDUAL=add, GATED=swiglu, WIDE=interpreted(), num_warps=config.warps,
    )  # fmt: skip


def _partial(programs: int, config: Tiling, tokens: int, counters: Tensor | None) -> Tensor:
    """Where programs among which K is split leave their sums."""
    if counters is None or len(counters) < programs:
        raise ValueError(f"K is split among programs, which count themselves: give {programs} counters")
    sums = programs * config.parts * (2 * config.rows + 1) * tokens
    return torch.empty(sums, dtype=torch.float32, device=counters.device)


def choose(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool = False, bits: int = 16) -> Tiling | None:
    """The configuration for an output of n numbers from k, by shape alone; None where the library's product is the faster.

    The best of sweeps on an H200 over the products of the 0.6B and the 8B shape (`python -m benchmarks.kernels --sweep`); with
    fewer bits, what these make likely.
    """
    if bits == 4 and dtype != torch.float32 and k % LEAST_OF_FOUR_BITS == 0:
        return _four_bit_tiling(n, k, tokens, swiglu) if tokens <= MAX_TOKENS else None
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if tokens <= (STREAM_TOKENS if small or dtype == torch.float32 else FEW_OF_LARGE):
        return _stream_tiling(n, k, tokens, dtype, swiglu, bits)
    if bits == 8 and dtype == torch.bfloat16 and tokens <= MAX_TOKENS:
        tile = Tiling(64, 128, 4, 3 if swiglu and tokens > MAX_TOKENS_OF_WIDE else 5, rounded=True)
        return _tiling(n, k, tile, FP8_PROGRAMS, LEAST_OF_FP8)
    return _tiles_tiling(n, k, tokens, dtype, swiglu) if bits != 4 else None


def choose_adapted(
    n: int, k: int, tokens: int, dtype: torch.dtype, parts: tuple[int, ...], swiglu: bool = False, bits: int = 16
) -> Tiling | None:  # fmt: skip
    """The same for a product to which adapters' parts are added: of the tensor cores' alone. parts: of the output, each with an
    A of its own."""
    if bits == 4:
        return None
    config = _tiles_tiling(n, k, tokens, dtype, swiglu)
    if config is None and dtype != torch.float32 and tokens <= MAX_TOKENS:
        config = _tiling(n, k, ADAPTED_WIDE, ADAPTED_PROGRAMS)
    if config is None or (not swiglu and len(parts) > 1 and any(part % config.rows for part in parts)):
        return None
    return replace(config, stages=min(config.stages, ADAPTED_STAGES))


def _tiles_tiling(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool) -> Tiling | None:
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if dtype == torch.float32 or tokens > MAX_TOKENS:
        return None
    if n <= k:  # what is added to the residual: few rows, so the library's products leave much of the device idle
        return _tiling(n, k, Tiling(32, 128, 4, 4) if n < 4096 else Tiling(64, 128, 4, 6), DEEP_PROGRAMS)
    if tokens > MAX_TOKENS_OF_WIDE:
        return None
    if small:
        return _tiling(n, k, Tiling(64, 64, 4, 8), WIDE_PROGRAMS)
    return _tiling(n, k, Tiling(64, 64, 4, 4), WIDE_PROGRAMS) if swiglu else None


def _four_bit_tiling(n: int, k: int, tokens: int, swiglu: bool) -> Tiling | None:
    if swiglu:
        tile = Tiling(64, 256, 4, 3)
    elif n <= 2048:
        tile = Tiling(32, 256, 2, 4)
    elif tokens <= LEAST_TILE_TOKENS:
        tile = Tiling(64, 512, 4, 3)
    else:
        tile = Tiling(64, 256, 4, 4) if tokens <= 32 else Tiling(128, 256, 8, 3)
    return _tiling(n, k, replace(tile, columns=min(tile.columns, k & -k)), FOUR_BIT_WARPS // tile.warps)


def _stream_tiling(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int = 16) -> Tiling:
    if bits < 16:
        return _fewer_bits_tiling(n, k, tokens, n * k * (2 if swiglu else 1) <= SMALL_NUMBERS, bits)
    if tokens == 1 and dtype != torch.float32 and k % 512 == 0:
        if n < 2048 and k % 2048 == 0:
            return Tiling(4, 2048, 8)
        if k <= 1024 and not swiglu:
            return Tiling(4, 512, 2)
        return Tiling(4, 512, 4) if k >= 8192 else Tiling(4, 1024, 4)
    rows = 2 if n < 2048 or swiglu else 4
    return Tiling(rows, min(1024, int(triton.next_power_of_2(k))), 4)


def _fewer_bits_tiling(n: int, k: int, tokens: int, small: bool, bits: int) -> Tiling:
    """A thread has sixteen bytes of each row at a time."""
    of_warp = 32 * 16 * 8 // bits
    warps = min(1 if small else 2 if bits == 8 and n > k else 4, max(1, (k & -k) // of_warp))
    return Tiling(2 if small else 8 if tokens == 1 else 4, of_warp * warps, warps)


def _tiling(n: int, k: int, tile: Tiling, programs: int, least: int = 0) -> Tiling | None:
    """K among as many programs as make so many in all, and as divide it, each with `least` columns; None if one is too many."""
    for parts in (8, 4, 2, 1):
        tiles = triton.cdiv(n, tile.rows)
        many = tiles * parts > min(programs, MAX_TILES) or k < least * parts
        if (parts == 1 or not many) and k % (tile.columns * parts) == 0:
            return replace(tile, parts=parts)
    return None
