"""How products of few tokens are cut, by shape alone. What other cuts would give: `python -m benchmarks.kernels.sweep`.

Imports torch, for dtypes, and triton, for its arithmetic.
"""

from dataclasses import dataclass, replace

import torch
import triton

STREAM_TOKENS = 4  # of one program of `stream`; more tokens are more programs
FEWER_BITS_TOKENS = 2  # likewise
MAX_TOKENS = 64
MOST_TOKENS = 256  # where W is small
SMALL_WEIGHT_BYTES = 16 << 20
FEW_OF_TILES = 32  # tokens up to which tiles are cut as for few
MOST_OUTPUTS = 4  # for one input, of products that are not the head's
FEW = 2  # tokens that `stream` takes
SMALL_NUMBERS, TINY_NUMBERS = 8 << 20, 1 << 20  # of W
LEAST_TILE_TOKENS = 8  # of the tensor cores' products
DEEP_PROGRAMS, FEW_DEEP_PROGRAMS, WIDE_PROGRAMS, FP8_PROGRAMS = 160, 100, 128, 256
LEAST_OF_FP8 = 512  # columns of a program
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
    tokens: int = 64  # of a program at most, where there are tiles
    described: bool = False  # `tiles` of 16 bits: the copy engine brings them, by descriptors

    @property
    def tiled(self) -> bool:
        """In tiles of numbers in x's dtype, or of W in four bits."""
        return self.parts > 0 and not self.rounded

    def blocks(self, n: int) -> int:
        """Tiles of rows of an output of n numbers."""
        return -(-n // self.rows)

    def stage_bytes(self, tokens: int, bits: int, swiglu: bool) -> int:
        """Of W in so many bits, and of so many tokens of a program."""
        of_w = self.rows * (2 if swiglu else 1) * bits // 8
        return (of_w + tokens * (1 if self.rounded else 2)) * self.columns


def choose(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool = False, bits: int = 16) -> Tiling | None:
    """The configuration for an output of n numbers from k, by shape alone; None where the library's product is the faster.

    The best of sweeps on an H200 over the products of the 0.6B and the 8B shape (`python -m benchmarks.kernels.sweep`); with
    fewer bits, what these make likely.
    """
    if bits == 4 and dtype != torch.float32 and k % LEAST_OF_FOUR_BITS == 0:
        return _four_bits(n, k, tokens, swiglu) if tokens <= MAX_TOKENS else None
    if tokens <= (STREAM_TOKENS if dtype == torch.float32 or n * k <= TINY_NUMBERS else FEW):
        return _streamed(n, k, tokens, dtype, swiglu, bits)
    if bits == 8 and dtype == torch.bfloat16 and tokens <= MAX_TOKENS:
        return _rounded(n, k, tokens, swiglu)
    return _sixteen_bits(n, k, tokens, dtype, swiglu, bits) if bits != 4 else None


def choose_ours(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int, split: bool) -> Tiling:
    """The same among our own products alone. split: K may be split among programs."""
    config = choose(n, k, tokens, dtype, swiglu, bits) or _streamed(n, k, tokens, dtype, swiglu, bits)
    return config if split or config.parts <= 1 else replace(config, parts=1)


def _sixteen_bits(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int) -> Tiling | None:
    small = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS
    if dtype == torch.float32 or tokens > (MOST_TOKENS if small and bits == 16 else MAX_TOKENS):
        return None
    if not small and n > MOST_OUTPUTS * k:
        return None
    if tokens <= FEW_OF_TILES:
        return _of_few(n, k, tokens, swiglu, small)
    if small:
        return _small_deep(n, k, tokens) if n <= k else _small_gated(n, k, tokens) if swiglu else _small_wide(n, k, tokens)
    if n <= k:  # what is added to the residual: few rows, so the library's products leave much of the device idle
        return _among(n, k, Tiling(64, 128, 4, 6, described=True), FEW_DEEP_PROGRAMS)
    tile = Tiling(64, 64, 4, 4, described=True) if swiglu else Tiling(64, 128, 4, 6, described=True)
    return _among(n, k, tile, WIDE_PROGRAMS)


# The best of whole steps of the 0.6B shape with 32, 64, 128, 192 and 256 rows, each tiling tried in turn; where W is not small,
# of the 8B shape with 32 and 64.


def _of_few(n: int, k: int, tokens: int, swiglu: bool, small: bool) -> Tiling | None:
    if n <= k:
        return _among(n, k, Tiling(32, 128, 4, 4) if small or n < 4096 else Tiling(64, 128, 4, 6), DEEP_PROGRAMS)
    if small and not swiglu:
        few = tokens <= FEW_OF_TILES // 2
        return _among(n, k, Tiling(64, 64, 4, 8) if few else Tiling(64, 128, 4, 4), WIDE_PROGRAMS if few else 2 * WIDE_PROGRAMS)
    tile = Tiling(32, 128, 4, 6) if small else Tiling(64, 64, 4, 4) if swiglu else Tiling(64, 128, 4, 6)
    return _among(n, k, tile, WIDE_PROGRAMS)


def _small_deep(n: int, k: int, tokens: int) -> Tiling | None:
    if tokens <= MAX_TOKENS:
        return _among(n, k, Tiling(64, 128, 4, 4, tokens=32), DEEP_PROGRAMS, tokens=tokens)
    stages = 6 if k > 2 * n or tokens > 2 * MAX_TOKENS else 4
    return _among(n, k, Tiling(64, 128, 4, stages, described=True), FEW_DEEP_PROGRAMS, tokens=tokens)


def _small_gated(n: int, k: int, tokens: int) -> Tiling | None:
    if tokens <= MAX_TOKENS:
        tile = Tiling(64, 128, 4, 4, tokens=32)
    else:
        tile = Tiling(64, 128 if tokens <= 2 * MAX_TOKENS else 64, 4, 4, described=True)
    return _among(n, k, tile, WIDE_PROGRAMS, tokens=tokens)


def _small_wide(n: int, k: int, tokens: int) -> Tiling | None:
    if tokens <= 2 * MAX_TOKENS:
        tile = Tiling(64, 128, 4, 6, described=True)
    elif tokens <= 3 * MAX_TOKENS:
        tile = Tiling(128, 128, 4, 4, described=True)
    else:
        tile = Tiling(64, 128, 4, 4, tokens=128, described=True)
    return _among(n, k, tile, 1)


def _rounded(n: int, k: int, tokens: int, swiglu: bool) -> Tiling | None:
    """Of FP8: 128 columns at a time, though more would be faster, since tensor cores add these up imprecisely. The best of
    whole steps of the 8B shape with 32 and 64 rows."""
    small, many = n * k * (2 if swiglu else 1) <= SMALL_NUMBERS, swiglu and tokens > FEW_OF_TILES
    if many and not small:
        return _among(n, k, Tiling(128, 128, 8, 4, rounded=True), WIDE_PROGRAMS)
    tile = Tiling(64, 128, 4, 7 if n <= k else 3 if many else 5, rounded=True)
    return _among(n, k, tile, FP8_PROGRAMS, LEAST_OF_FP8 if small else 4 * LEAST_OF_FP8)


def _four_bits(n: int, k: int, tokens: int, swiglu: bool) -> Tiling | None:
    """Of a sweep of 1 and 32 tokens at 8B; of more what these make likely."""
    if tokens <= LEAST_TILE_TOKENS and swiglu:  # two warps to a program, of which there are many
        tile, programs = Tiling(32, 256, 2, 3), 800
    elif tokens <= LEAST_TILE_TOKENS:
        tile, programs = Tiling(32, 512, 2, 3), 800 if n > k else 640
    elif tokens <= FEW_OF_TILES or swiglu:
        tile, programs = Tiling(64, 256, 4, 3), 256 if swiglu else 400
    else:
        tile, programs = Tiling(128, 256, 8, 3), 200
    return _among(n, k, replace(tile, columns=min(tile.columns, k & -k)), programs)


def _streamed(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int = 16) -> Tiling:
    if bits < 16:
        return _streamed_fewer_bits(n, k, tokens, n * k * (2 if swiglu else 1) <= SMALL_NUMBERS, bits)
    if tokens == 1 and dtype != torch.float32 and k % 512 == 0:
        if n < 2048 and k % 2048 == 0:
            return Tiling(4, 2048, 8)
        if k <= 1024 and not swiglu:
            return Tiling(4, 512, 2)
        return Tiling(4, 512, 4) if k >= 8192 else Tiling(4, 1024, 4)
    rows = 2 if n < 2048 or swiglu else 4
    return Tiling(rows, min(1024, int(triton.next_power_of_2(k))), 4)


def _streamed_fewer_bits(n: int, k: int, tokens: int, small: bool, bits: int) -> Tiling:
    """A thread has sixteen bytes of each row at a time."""
    of_warp = 32 * 16 * 8 // bits
    warps = min(1 if small else 2 if bits == 8 and n > k else 4, max(1, (k & -k) // of_warp))
    return Tiling(2 if small else 8 if tokens == 1 else 4, of_warp * warps, warps)


def _among(n: int, k: int, tile: Tiling, programs: int, least: int = 0, tokens: int = 1) -> Tiling | None:
    """K among as many programs as make so many in all, and as divide it, each with `least` columns; None if one is too many."""
    tiles = tile.blocks(n) * -(-tokens // tile.tokens)
    for parts in (8, 4, 2, 1):
        many = tiles * parts > min(programs, MAX_TILES) or k < least * parts
        if (parts == 1 or not many) and k % (tile.columns * parts) == 0:
            return replace(tile, parts=parts)
    return None
