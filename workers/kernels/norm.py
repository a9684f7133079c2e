"""RMSNorm, alone and behind the residual's sum: one launch each.

Sums are in float32, and what a norm gives is rounded once. Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted, warps_for


@triton.jit
def _rms_norm(x, delta, weight, out, x_stride, delta_stride, out_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              ADD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program norms one row, after adding `delta` to it where ADD."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    enter(PDL)
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row * x_stride + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    power = tl.sum(value * value, 0) / WIDTH
    tl.store(out + row * out_stride + at, (value * tl.rsqrt(power + eps) * scale).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """x [tokens, width], rows may lie apart -> `x / sqrt(mean(x²) + eps) * weight`, [tokens, width], in `out` if given."""
    return _launch(x, None, weight, eps, out, pdl)


def add_rms_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """hidden [tokens, width] += delta, in place and rounded to its dtype -> the norm of that sum, [tokens, width]."""
    return _launch(hidden, delta, weight, eps, out, pdl)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, pdl: bool) -> Tensor:
    tokens, width = x.shape
    if out is None:
        out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        pdl = pdl and not interpreted()
        added = x if delta is None else delta
        _rms_norm[(tokens,)](
            x, added, weight, out, x.stride(0), added.stride(0), out.stride(0), eps, WIDTH=width,
            BLOCK=triton.next_power_of_2(width), ADD=delta is not None, PDL=pdl, num_warps=warps_for(width),
            launch_pdl=pdl,
        )  # fmt: skip
    return out
