"""Products of up to 64 tokens, 16-bit, with a matrix in four bits, by the tensor cores.

Memory allows little more than three instructions a number. So codes go through shared memory to the threads as they are stored
and become numbers where they are multiplied, two at a time, as in Marlin (Frantar et al., 2024): put into the mantissa of a
number whose last bit is worth 1, from which that number and the zero point are subtracted. What is left is whole and small, and
exact in any dtype; a scale is applied to the sums of its group.

K may be split among programs, as in `tiles`. Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import interpreted
from workers.kernels.products.prenormed import powers_of, scale_of
from workers.kernels.products.tiles import finish_tile, is_last_of_parts, kept, sums_of_parts

INTERPRETED = tl.constexpr(interpreted())

# the lowest nibbles of two elements, next to 128 or 1024, whose last bit is worth 1; then the next ones
_BFLOAT16 = tl.constexpr("""{
    .reg .b32 one, moved, wide;
    mov.b32 one, 0x3F803F80;
    lop3.b32 wide, $4, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, wide, one, $5;
    shr.u32 moved, $4, 4;
    lop3.b32 wide, moved, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, wide, one, $6;
    shr.u32 moved, $4, 8;
    lop3.b32 wide, moved, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $2, wide, one, $7;
    shr.u32 moved, $4, 12;
    lop3.b32 wide, moved, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $3, wide, one, $8;
    }""")
_FLOAT16 = tl.constexpr("""{
    .reg .b32 moved, wide;
    lop3.b32 wide, $4, 0x000F000F, 0x64006400, 0xEA;
    add.rn.f16x2 $0, wide, $5;
    shr.u32 moved, $4, 4;
    lop3.b32 wide, moved, 0x000F000F, 0x64006400, 0xEA;
    add.rn.f16x2 $1, wide, $6;
    shr.u32 moved, $4, 8;
    lop3.b32 wide, moved, 0x000F000F, 0x64006400, 0xEA;
    add.rn.f16x2 $2, wide, $7;
    shr.u32 moved, $4, 12;
    lop3.b32 wide, moved, 0x000F000F, 0x64006400, 0xEA;
    add.rn.f16x2 $3, wide, $8;
    }""")


@triton.jit
def _plain(elements, zero, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    codes = (elements.to(tl.int32) >> 4 * PLACE) & 15
    return (codes - zero.to(tl.int32)[:, None]).to(tl.float32).to(DTYPE)


@triton.jit
def _subtracted(zero, shape: tl.constexpr, BRAIN: tl.constexpr):
    """zero [ROWS] -> the bits of -(128 + zero), or of -(1024 + zero), int16 of that shape."""
    bits = zero.to(tl.int16) | (0xC300 - 0x10000 if BRAIN else 0xE400 - 0x10000)
    return tl.broadcast_to(bits.to(tl.int16)[:, None], shape)


@triton.jit
def _numbers(elements, z0, z1, z2, z3, DTYPE: tl.constexpr):
    """Elements [ROWS, SPAN / 4], the zero points [ROWS] of their quarters -> the quarters, code minus zero point."""
    if INTERPRETED:
        n0, n1 = _plain(elements, z0, 0, DTYPE), _plain(elements, z1, 1, DTYPE)
        n2, n3 = _plain(elements, z2, 2, DTYPE), _plain(elements, z3, 3, DTYPE)
    else:
        BRAIN: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
        z0, z1 = _subtracted(z0, elements.shape, BRAIN), _subtracted(z1, elements.shape, BRAIN)
        z2, z3 = _subtracted(z2, elements.shape, BRAIN), _subtracted(z3, elements.shape, BRAIN)
        if BRAIN:
            n0, n1, n2, n3 = tl.inline_asm_elementwise(
                _BFLOAT16, "=&r,=&r,=&r,=&r,r,r,r,r,r", [elements, z0, z1, z2, z3],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)  # fmt: skip
        else:
            n0, n1, n2, n3 = tl.inline_asm_elementwise(
                _FLOAT16, "=&r,=&r,=&r,=&r,r,r,r,r,r", [elements, z0, z1, z2, z3],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
            if DTYPE == tl.float32:  # noqa: SIM300
                n0, n1, n2, n3 = n0.to(DTYPE), n1.to(DTYPE), n2.to(DTYPE), n3.to(DTYPE)
    return n0, n1, n2, n3


def in_fours(scales: Tensor, zeros: Tensor, group: int, span: int) -> tuple[Tensor, Tensor, int]:
    """Scales and zero points as the kernels read them, and how many bits of an element a scale has. Where a span has 4 groups,
    elements are large enough to be on their way while the span before is multiplied; 0: they are as they come."""
    bits = 8 * scales.element_size()
    if span != 4 * group or scales.dtype not in (torch.float16, torch.float32):
        return scales, zeros, 0
    return scales.view(torch.int64), zeros.view(torch.int32), bits


@triton.jit
def _of_each(base, rows, column, K: tl.constexpr, GROUP: tl.constexpr, QUARTER: tl.constexpr):
    at = base + rows * (K // GROUP)
    v0, v1 = tl.load(at + column // GROUP), tl.load(at + (column + QUARTER) // GROUP)
    return v0, v1, tl.load(at + (column + 2 * QUARTER) // GROUP), tl.load(at + (column + 3 * QUARTER) // GROUP)


@triton.jit
def of_zeros(base, rows, column, K: tl.constexpr, GROUP: tl.constexpr, QUARTER: tl.constexpr, FOURS: tl.constexpr):
    """The zero points of the groups of that column and of those a quarter, two and three quarters on, [ROWS] each. FOURS: as
    `in_fours` has it."""
    if FOURS == 0:
        z0, z1, z2, z3 = _of_each(base, rows, column, K, GROUP, QUARTER)
    else:
        four = tl.load(base + rows * (K // GROUP // 4) + column // (4 * GROUP))
        z0, z1, z2, z3 = four & 255, (four >> 8) & 255, (four >> 16) & 255, (four >> 24) & 255
    return z0, z1, z2, z3


@triton.jit
def of_scales(base, rows, column, K: tl.constexpr, GROUP: tl.constexpr, QUARTER: tl.constexpr, FOURS: tl.constexpr):
    """Their scales."""
    if FOURS == 0:
        s0, s1, s2, s3 = _of_each(base, rows, column, K, GROUP, QUARTER)
    elif FOURS == 16:
        four = tl.load(base + rows * (K // GROUP // 4) + column // (4 * GROUP))
        low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
        s0, s1 = low.to(tl.int16).to(tl.float16, bitcast=True), (low >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        s2, s3 = high.to(tl.int16).to(tl.float16, bitcast=True), (high >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        at = base + rows * (K // GROUP // 2) + column // (4 * GROUP) * 2
        first, second = tl.load(at), tl.load(at + 1)
        s0, s1 = first.to(tl.int32).to(tl.float32, bitcast=True), (first >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        s2, s3 = second.to(tl.int32).to(tl.float32, bitcast=True), (second >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return s0, s1, s2, s3


@triton.jit
def added(sums, elements, zeros, scales, a0, a1, a2, a3, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """sums [ROWS, TOKENS] and the products of what is in elements with x, each times its scale."""
    n0, n1, n2, n3 = _numbers(elements, zeros[0], zeros[1], zeros[2], zeros[3], DTYPE)
    sums += tl.dot(n0, a0, input_precision=PRECISION) * scales[0].to(tl.float32)[:, None]
    sums += tl.dot(n1, a1, input_precision=PRECISION) * scales[1].to(tl.float32)[:, None]
    sums += tl.dot(n2, a2, input_precision=PRECISION) * scales[2].to(tl.float32)[:, None]
    return sums + tl.dot(n3, a3, input_precision=PRECISION) * scales[3].to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def four_bit_tiles(x, weight, bias, out, scales, zeros, squares, next_weight, next_values, next_squares, partial, counters,
                   tokens, x_stride, out_stride, eps, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, FOURS: tl.constexpr,
                   PARTS: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
                   GATED: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of W (twice as many where GATED) times TOKENS tokens, over one of PARTS parts of K, COLUMNS at
    a time: elements that follow one another. weight, SPAN: as `Reduced` has them; scales, zeros, FOURS: as `in_fours` gives
    them. COLUMNS divides SPAN and K / PARTS. squares, next_weight and the like, partial, counters: as in `tiles`.
    """
    ROW: tl.constexpr = K // 4  # elements
    PART: tl.constexpr = ROW // PARTS
    WIDTH: tl.constexpr = COLUMNS // 4
    QUARTER: tl.constexpr = SPAN // 4
    DTYPE: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0) // PARTS
    rows = block * ROWS + tl.arange(0, ROWS)
    safe = (rows if N % ROWS == 0 else tl.minimum(rows, N - 1)).to(tl.int64)
    half = weight + N * ROW if GATED else weight
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(0) % PARTS * PART
    if PDL:
        tl.extra.cuda.gdc_wait()

    element = tl.arange(0, WIDTH)
    w_at = safe[:, None] * ROW + (begin + element)[None, :]
    x_at = x + token.to(tl.int64)[None, :] * x_stride + element[:, None]
    there = (token < tokens)[None, :]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    gated = sums
    if SQUARES > 0:
        powers = powers_of(squares, token, tokens, there, SQUARES)
    for start in tl.range(0, PART, WIDTH, num_stages=STAGES):
        column = tl.multiple_of((begin + start) // QUARTER * SPAN + (begin + start) % QUARTER, WIDTH)
        # these come first, so that they are under way while what was asked for long ago is waited for
        its_zeros = of_zeros(zeros, safe, column, K, GROUP, QUARTER, FOURS)
        its_scales = of_scales(scales, safe, column, K, GROUP, QUARTER, FOURS)
        if GATED:
            other_zeros = of_zeros(zeros, N + safe, column, K, GROUP, QUARTER, FOURS)
            other_scales = of_scales(scales, N + safe, column, K, GROUP, QUARTER, FOURS)
        tile = tl.load(weight + start + w_at, eviction_policy="evict_first")
        if GATED:
            other = tl.load(half + start + w_at, eviction_policy="evict_first")
        a0 = tl.load(x_at + column, mask=there, other=0.0)
        a1 = tl.load(x_at + column + QUARTER, mask=there, other=0.0)
        a2 = tl.load(x_at + column + 2 * QUARTER, mask=there, other=0.0)
        a3 = tl.load(x_at + column + 3 * QUARTER, mask=there, other=0.0)
        sums = added(sums, tile, its_zeros, its_scales, a0, a1, a2, a3, DTYPE, "tf32")
        if GATED:
            gated = added(gated, other, other_zeros, other_scales, a0, a1, a2, a3, DTYPE, "tf32")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    total, up = sums, gated
    before, weights = kept(total, out, out_stride, next_weight, rows, safe, token, tokens, N, RESIDUAL, NEXT)

    if PARTS > 1:
        SIZE: tl.constexpr = (2 * ROWS if GATED else ROWS) * TOKENS
        at = tl.arange(0, ROWS)[:, None] * TOKENS + token[None, :]
        if not is_last_of_parts(partial, at, total, up, counters + block, SIZE, ROWS * TOKENS, PARTS, GATED):
            return
        total, up = sums_of_parts(partial, at, up, counters + block, block * PARTS, SIZE, ROWS * TOKENS, PARTS, GATED)

    if SQUARES > 0:
        scale = scale_of(powers, eps, K)
        total *= scale
        if GATED:
            up *= scale
    finish_tile(total, up, before, weights, rows, safe, token, tokens, bias, out, out_stride, next_values, next_squares, block,
                N, BIAS, RESIDUAL, GATED, NEXT)  # fmt: skip
