"""Numbers of MXFP4, in registers: four codes of an element, as `Microscaled` has them, become four numbers.

    streamed      a code's bits are those of a number of float8_e4m3fn, 64 times less, which one instruction turns into float16,
                  two at a time: 13 instructions for eight
    multiplied    in bfloat16, by the tensor cores: likewise a number of bfloat16 that is 2^126 times less, which the product
                  with its scale makes good: 19 for eight, scale and all

In float16 a scale is applied to what is streamed. Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.launch import interpreted

INTERPRETED = tl.constexpr(interpreted())

_SIXTY_FOURTHS = tl.constexpr("""{
    .reg .b32 sign, even, odd;
    .reg .b16 first, second;
    shl.b32 sign, $4, 4;
    and.b32 sign, sign, 0x80808080;
    shl.b32 even, $4, 2;
    lop3.b32 even, even, 0x1C1C1C1C, sign, 0xEA;
    and.b32 sign, $4, 0x80808080;
    shr.u32 odd, $4, 2;
    lop3.b32 odd, odd, 0x1C1C1C1C, sign, 0xEA;
    prmt.b32 even, even, 0, 0x3120;
    mov.b32 {first, second}, even;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $2, second;
    prmt.b32 odd, odd, 0, 0x3120;
    mov.b32 {first, second}, odd;
    cvt.rn.f16x2.e4m3x2 $1, first;
    cvt.rn.f16x2.e4m3x2 $3, second;
    }""")
_BFLOAT16 = tl.constexpr("""{
    .reg .b32 nought, sign, moved;
    mov.b32 nought, 0x80008000;
    shl.b32 sign, $4, 12;
    and.b32 sign, sign, 0x80008000;
    shl.b32 moved, $4, 6;
    lop3.b32 moved, moved, 0x01C001C0, sign, 0xEA;
    fma.rn.bf16x2 $0, moved, $5, nought;
    shl.b32 sign, $4, 8;
    and.b32 sign, sign, 0x80008000;
    shl.b32 moved, $4, 2;
    lop3.b32 moved, moved, 0x01C001C0, sign, 0xEA;
    fma.rn.bf16x2 $1, moved, $6, nought;
    shl.b32 sign, $4, 4;
    and.b32 sign, sign, 0x80008000;
    shr.u32 moved, $4, 2;
    lop3.b32 moved, moved, 0x01C001C0, sign, 0xEA;
    fma.rn.bf16x2 $2, moved, $7, nought;
    and.b32 sign, $4, 0x80008000;
    shr.u32 moved, $4, 6;
    lop3.b32 moved, moved, 0x01C001C0, sign, 0xEA;
    fma.rn.bf16x2 $3, moved, $8, nought;
    }""")


@triton.jit
def _plain(elements, PLACE: tl.constexpr):
    code = elements.to(tl.int32) >> 4 * PLACE
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def sixty_fourths(elements):
    """Elements in int16 -> what each of their four codes stands for, divided by 64, in float16 of the same shape."""
    if INTERPRETED:
        n0, n1, n2, n3 = _plain(elements, 0), _plain(elements, 1), _plain(elements, 2), _plain(elements, 3)
    else:
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            _SIXTY_FOURTHS, "=&r,=&r,=&r,=&r,r", [elements], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2)  # fmt: skip
    return n0, n1, n2, n3


@triton.jit
def plain_power(four, PLACE: tl.constexpr):
    """four: int32, four exponents as they are stored, the first in the lowest bits -> two to the power of one of them, as it
    is meant, in float32."""
    moved = (four << 23 - 8 * PLACE) if PLACE < 3 else (four >> 1)
    return (moved & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _power(four, PLACE: tl.constexpr, MORE: tl.constexpr):
    """The same, and MORE; beyond 2^127: 2^127."""
    exponent = tl.minimum(((four >> 8 * PLACE) & 255) + MORE, 254)
    if MORE < 0:
        exponent = tl.maximum(exponent, 0)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_of_bfloat16(four, shape: tl.constexpr, PLACE: tl.constexpr):
    return tl.broadcast_to(_power(four, PLACE, 62).to(tl.bfloat16)[:, None], shape)


@triton.jit
def scaled(elements, four, DTYPE: tl.constexpr):
    """Elements [ROWS, WIDTH] and the exponents of their quarters, int32 [ROWS] -> the four quarters' numbers in DTYPE, in
    bfloat16 divided by 2^64 (`made_good`): those of scales from 2^-61 to 2^65 are exact."""
    if DTYPE == tl.bfloat16 and not INTERPRETED:  # noqa: SIM300
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            _BFLOAT16, "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [elements, _scale_of_bfloat16(four, elements.shape, 0), _scale_of_bfloat16(four, elements.shape, 1),
             _scale_of_bfloat16(four, elements.shape, 2), _scale_of_bfloat16(four, elements.shape, 3)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)  # fmt: skip
    else:
        MORE: tl.constexpr = 6 - 64 if tl.bfloat16 == DTYPE else 6
        n0, n1, n2, n3 = sixty_fourths(elements)
        WIDE: tl.constexpr = tl.float16 if tl.float16 == DTYPE else tl.float32
        n0 = (n0.to(WIDE) * _power(four, 0, MORE).to(WIDE)[:, None]).to(DTYPE)
        n1 = (n1.to(WIDE) * _power(four, 1, MORE).to(WIDE)[:, None]).to(DTYPE)
        n2 = (n2.to(WIDE) * _power(four, 2, MORE).to(WIDE)[:, None]).to(DTYPE)
        n3 = (n3.to(WIDE) * _power(four, 3, MORE).to(WIDE)[:, None]).to(DTYPE)
    return n0, n1, n2, n3


@triton.jit
def made_good(sums, DTYPE: tl.constexpr):
    """Sums of products with what `scaled` gives."""
    return sums * 18446744073709551616.0 if tl.bfloat16 == DTYPE else sums
