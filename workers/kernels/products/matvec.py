"""Products of a few tokens with a large matrix, bound by the matrix's bytes, fused with what stands around them.

`y = f(x) @ W.T`, where f may be an RMSNorm, and y may get a bias, become SwiGLU's product, or be added to the residual: with
it, a decode layer is six launches. Two kernels: `stream` for a few tokens, `tiles` for more.

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
from workers.kernels.norm import rms_norm
from workers.kernels.products.reduced import Reduced
from workers.kernels.products.stream import stream
from workers.kernels.products.tiles import tiles

STREAM_TOKENS = 4  # of one program of `stream`; more tokens are more programs
MAX_TOKENS = 64
MAX_TOKENS_OF_WIDE = 32  # of products with more outputs than inputs
FEW_OF_LARGE = 2  # tokens that `stream` takes where W is large
SMALL_NUMBERS = 8 << 20  # of W
LEAST_TILE_TOKENS = 8  # of the tensor cores' products
LEAST_ADAPTED_TOKENS = 16  # of those with adapters: at 8, QKV took twice as long beside A's product
DEEP_PROGRAMS, WIDE_PROGRAMS = 160, 128
MAX_TILES = 1024  # of rows, where K is split among programs


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut. With SwiGLU, a program takes so many rows of the gate and as many of the other half."""

    rows: int  # of W that a program takes
    columns: int  # of W that it takes at a time
    warps: int
    stages: int = 0  # tiles in shared memory ahead of the sums; 0: the next tile in registers
    parts: int = 0  # `tiles`: among how many programs K is split; 0: `stream`


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
    Weights in fewer bits become numbers in registers: in float32, or in `tiles` as x's dtype has them.

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
        config = choose(n, k, tokens, x.dtype, swiglu, bits) or _stream_tiling(n, k, tokens, x.dtype, swiglu)
        if counters is None and config.parts > 1:
            config = replace(config, parts=1)
    pdl = pdl and not interpreted()
    tiled = config.parts > 0
    if low_rank is not None and not tiled:
        raise ValueError("adapters' parts are added by the tensor cores' products: give a configuration of `choose_adapted`")
    # in float16 x times the norm's weight might overflow; of many tokens each program would repeat much, in many registers
    apart = x.dtype == torch.float16 or (low_rank is not None and tokens > MAX_TOKENS_OF_WIDE)
    if tiled and apart and norm_weight is not None:
        x, norm_weight = rms_norm(x, norm_weight, eps, pdl=pdl), None
    flags = {
        "N": n, "K": k, "ROWS": config.rows, "COLUMNS": config.columns, "STAGES": config.stages,
        "NORM": norm_weight is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None, "GATED": swiglu,
        "PDL": pdl, "num_warps": config.warps, "launch_pdl": pdl, "BITS": 16, "GROUP": 0,
    }  # fmt: skip
    values, scales, zeros = (weight, x, x) if isinstance(weight, Tensor) else (weight.values, weight.scales, weight.zeros)
    if not isinstance(weight, Tensor):
        flags |= {"BITS": weight.bits, "GROUP": 0 if weight.by_row else weight.group}
    operands = (
        x, x if norm_weight is None else norm_weight, values, x if bias is None else bias, target, scales,
        scales if zeros is None else zeros, tokens, x.stride(0), values.stride(0), target.stride(0), eps,
    )  # fmt: skip
    programs = triton.cdiv(n, config.rows)
    if tiled:
        least = LEAST_TILE_TOKENS if low_rank is None else LEAST_ADAPTED_TOKENS
        padded = max(least, triton.next_power_of_2(tokens))
        partial = target
        if config.parts > 1:
            sums = programs * config.parts * (2 * config.rows + 1) * padded
            partial = torch.empty(sums, dtype=torch.float32, device=x.device)
            if counters is None or len(counters) < programs:
                raise ValueError(f"K is split among programs, which count themselves: give {programs} counters")
        beside: tuple[Tensor, ...] = (x, x, x, x, x)
        if low_rank is not None:
            low = shrink(x, low_rank, norm_weight, padded=padded, overlap=pdl)
            beside = low, low_rank.b, *low_rank.rows
            first, second = (*low_rank.parts, 0)[:2]
            flags |= {
                "PDL": False, "OVERLAP": pdl, "RANK": low_rank.rank, "LOW": low.shape[1], "FIRST": first, "SECOND": second,
                "PER": low_rank.together, "SHARES": low.shape[0],
            }  # fmt: skip
        tiles[(programs * config.parts,)](
            *operands[:7], partial, target if counters is None else counters, *beside, *operands[7:], TOKENS=padded,
            PARTS=config.parts, **flags,
        )  # fmt: skip
    else:
        share = 1 if tokens == 1 else 2 if tokens == 2 else STREAM_TOKENS
        stream[(programs * triton.cdiv(tokens, share),)](*operands, TOKENS=share, **flags)
    return target


def choose(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool = False, bits: int = 16) -> Tiling | None:
    """The configuration for an output of n numbers from k, by shape alone; None where the library's product is the faster.

    The best of sweeps on an H200 over the products of the 0.6B and the 8B shape (`python -m benchmarks.kernels --sweep`); with
    fewer bits, what these make likely.
    """
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if tokens <= (STREAM_TOKENS if small or dtype == torch.float32 else FEW_OF_LARGE):
        return _stream_tiling(n, k, tokens, dtype, swiglu)
    return _tiles_tiling(n, k, tokens, dtype, swiglu, bits)


def choose_adapted(
    n: int, k: int, tokens: int, dtype: torch.dtype, parts: tuple[int, ...], swiglu: bool = False, bits: int = 16
) -> Tiling | None:  # fmt: skip
    """The same for a product to which adapters' parts are added: of the tensor cores' alone. parts: of the output, each with an
    A of its own."""
    config = _tiles_tiling(n, k, tokens, dtype, swiglu, bits)
    if config is None and dtype != torch.float32 and tokens <= MAX_TOKENS:
        config = _tiling(n, k, ADAPTED_WIDE, ADAPTED_PROGRAMS)
    if config is None or (not swiglu and len(parts) > 1 and any(part % config.rows for part in parts)):
        return None
    return replace(config, stages=min(config.stages, ADAPTED_STAGES))


def _tiles_tiling(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int) -> Tiling | None:
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if dtype == torch.float32 or tokens > MAX_TOKENS:
        return None
    if bits == 4:  # the library would need them widened
        return _tiling(n, k, Tiling(32, 128, 4, 4), DEEP_PROGRAMS)
    if n <= k:  # what is added to the residual: few rows, so the library's products leave much of the device idle
        return _tiling(n, k, Tiling(32, 128, 4, 4) if n < 4096 else Tiling(64, 128, 4, 6), DEEP_PROGRAMS)
    if tokens > MAX_TOKENS_OF_WIDE:
        return None
    if small:
        return _tiling(n, k, Tiling(64, 64, 4, 8), WIDE_PROGRAMS)
    return _tiling(n, k, Tiling(64, 64, 4, 4), WIDE_PROGRAMS) if swiglu else None


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
