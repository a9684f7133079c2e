"""RMSNorm, alone and behind the residual's sum, in the dtype or in FP8: one launch each.

Sums are in float32, and what a norm gives is rounded once. Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted, warps_for
from workers.kernels.lora.up import RANKS, columns_of, operands, raised, rank_of, slot_of
from workers.kernels.lora.weights import Awaited
from workers.kernels.reduced import Rounded
from workers.kernels.rows.rounding import store_rounded

MOST_OF_B = 65536
"""Numbers that a program holds at a time."""


@triton.jit(do_not_specialize=["padded"])
def _rms_norm(x, delta, weight, out, scales, low, b, slots, x_stride, delta_stride, out_stride, low_stride, padded, eps,
              WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, RANK: tl.constexpr,
              RANKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program norms one row, after adding `delta` to it where ADD. GROUP: columns that share a scale of FP8; 0: plain.
    RANK: of the adapters whose part `delta` awaits, RANKS at a time; 0: it is whole."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        slot, there = slot_of(slots, row)
        own, wanted = b + slot * (WIDTH * RANK), inside & there
        columns = columns_of(own, at, wanted, 0, RANK, RANKS, 1)
    enter(PDL)
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + at, mask=inside, other=0.0).to(tl.float32)
        if RANK > 0:
            value += raised(columns, own, low + row * low_stride + slot * RANK, at, wanted, there, RANK, RANKS, 1)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row * x_stride + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    power = tl.sum(value * value, 0) / WIDTH
    normed = value * tl.rsqrt(power + eps) * scale
    if GROUP > 0:
        store_rounded(normed, out, scales, row, padded, 0, WIDTH, GROUP, BLOCK)
    else:
        tl.store(out + row * out_stride + at, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """x [tokens, width], rows may lie apart -> `x / sqrt(mean(x²) + eps) * weight`, [tokens, width], in `out` if given."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, None, weight, eps, out, pdl)
    return out


def add_rms_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, awaited: Awaited | None = None,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """hidden [tokens, width] += delta, in place and rounded to its dtype -> the norm of that sum, [tokens, width].
    awaited: what adapters add to delta yet, of one part."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
    _launch(hidden, delta, weight, eps, out, pdl, awaited)
    return out


def rounded_norm(
    x: Tensor, weight: Tensor, eps: float, group: int, delta: Tensor | None = None, *, pdl: bool = False
) -> Rounded:
    """The same in FP8, rounded but once, with a scale for `group` columns: all, or a power of two. delta is added to x."""
    out = Rounded.empty(len(x), x.shape[1], group, x.dtype, x.device)
    _launch(x, delta, weight, eps, out, pdl)
    return out


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | Rounded, pdl: bool,
    awaited: Awaited | None = None,
) -> None:  # fmt: skip
    tokens, width = x.shape
    if not tokens:
        return
    pdl = pdl and not interpreted()
    added = x if delta is None else delta
    values, scales, group = (out.values, out.scales, out.group) if isinstance(out, Rounded) else (out, out, 0)
    block, rank = int(triton.next_power_of_2(width)), rank_of(awaited)
    low, b, slots, low_stride = operands(awaited)
    ranks = max(1, min(RANKS, MOST_OF_B // block))
    _rms_norm[(tokens,)](
        x, added, weight, values, scales, low, b, slots, x.stride(0), added.stride(0), values.stride(0), low_stride,
        len(values), eps, WIDTH=width, BLOCK=block, GROUP=group, ADD=delta is not None, RANK=rank, RANKS=ranks, PDL=pdl,
        num_warps=warps_for(width * ranks if rank else width), launch_pdl=pdl,
    )  # fmt: skip
