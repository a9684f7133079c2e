"""Activations in FP8: the nearest numbers, with the least scale for each group of a token's columns.

Imports torch and triton.
"""

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted, warps_for
from workers.kernels.reduced import LARGEST_FP8, Rounded

PIECE = 2048  # columns of a program, where groups are no longer
LEAST_SCALE = tl.constexpr(1e-30)
LARGEST = tl.constexpr(LARGEST_FP8)


@triton.jit
def store_rounded(wide, values, scales, token, padded, begin, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a token from `begin` on, in float32, zeros beyond K: rounded, to where `Rounded` has them. NaN stays
    NaN, and makes the token's products so.

    GROUP: K itself, where BLOCK has all of them, or a power of two that divides BLOCK.
    """
    if GROUP == K:
        scale = tl.maximum(tl.max(tl.abs(wide), 0) / LARGEST, LEAST_SCALE)
        tl.store(scales + token, scale)
        near = wide * (1 / scale)
    else:
        groups: tl.constexpr = BLOCK // GROUP
        parts = tl.reshape(wide, [groups, GROUP])
        scale = tl.maximum(tl.max(tl.abs(parts), 1) / LARGEST, LEAST_SCALE)
        group = begin // GROUP + tl.arange(0, groups)
        tl.store(scales + group.to(tl.int64) * padded + token, scale, mask=group < K // GROUP)
        near = tl.reshape(parts * (1 / scale)[:, None], [BLOCK])
    near = tl.clamp(near, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    at = begin + tl.arange(0, BLOCK)
    tl.store(values + token * K + at, near.to(values.dtype.element_ty), mask=at < K)


@triton.jit(do_not_specialize=["padded"])
def _round(x, values, scales, x_stride, padded, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
           GATED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: BLOCK columns of one token. GATED: x has K more behind its own, and what is rounded is SwiGLU's product."""
    token, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    enter(PDL)
    wide = tl.load(x + token * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + token * x_stride + K + at, mask=at < K, other=0.0).to(tl.float32)
        wide = (wide / (1 + tl.exp(-wide)) * up).to(x.dtype.element_ty).to(tl.float32)
    store_rounded(wide, values, scales, token, padded, begin, K, GROUP, BLOCK)


def rounded(x: Tensor, group: int, *, pdl: bool = False) -> Rounded:
    """x [tokens, columns], rows may lie apart. group: columns that share a scale: all, or a power of two."""
    return _launch(x, x.shape[1], group, False, pdl)


def silu_mul_rounded(gate_up: Tensor, group: int, *, pdl: bool = False) -> Rounded:
    """gate_up [tokens, 2 * columns], the gate first: silu(gate) * up, rounded to its dtype and then as `rounded`."""
    return _launch(gate_up, gate_up.shape[1] // 2, group, True, pdl)


def _launch(x: Tensor, columns: int, group: int, gated: bool, pdl: bool) -> Rounded:
    out = Rounded.empty(len(x), columns, group, x.dtype, x.device)
    if len(x):
        pdl = pdl and not interpreted()
        block = int(triton.next_power_of_2(columns))
        if group < columns:
            block = min(block, PIECE)
        _round[(len(x), triton.cdiv(columns, block))](
            x, out.values, out.scales, x.stride(0), len(out.values), K=columns, GROUP=group, BLOCK=block, GATED=gated,
            PDL=pdl, num_warps=warps_for(block), launch_pdl=pdl,
        )  # fmt: skip
    return out
