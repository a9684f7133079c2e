"""What a KV pool in FP8 makes of a number, within the kernels that write one, and what those that read one make of its bytes.

Imports triton.
"""

import triton
import triton.language as tl

from workers.kernels.launch import interpreted

LARGEST_HALF = tl.constexpr(65504.0)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def stored(states, scale):
    """Keys or values as the pool has them, by the rule of `workers.attention.write.stored`: divided by their scale, the nearest
    number of float8_e4m3fn, its largest beyond that. The model's dtype has rounded them already."""
    exact = tl.div_rn(states.to(tl.float32), scale)
    return tl.clamp(exact, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def query_for_fp8(q):
    """Queries for products with what float16 holds exactly, as it does every number of float8_e4m3fn: in float16 those of
    bfloat16, which lose nothing but what is beyond its largest number or far below any that matters; others as they are."""
    if q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    return q


@triton.jit
def widened(pairs):
    """Pairs of numbers of float8_e4m3fn as uint16 of any shape -> the first of each, in its low byte, and the second, float16.

    Bytes of two pairs change places so that one conversion finds both first ones beside each other, another the second ones: 3
    instructions for 4 numbers, where shifts and masks become three times as many. bfloat16 would cost a slow
    conversion more for each number.
    """
    if INTERPRETED:
        first = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b16 low, high;
            prmt.b32 both, $2, 0, 0x3120;
            mov.b32 {low, high}, both;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""", "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    return first, second
