"""Activations in FP8: the nearest numbers, with the least scale for each group of a token's columns. Imports torch and triton."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import interpreted, warps_for

PIECE = 2048  # columns of a program, where groups are no longer
LEAST_SCALE = tl.constexpr(1e-30)
LARGEST = tl.constexpr(448.0)


@dataclass(frozen=True, slots=True)
class Rounded:
    """values: float8_e4m3fn [tokens, columns]; scales: float32 [tokens, groups], of columns of one size, by which they are to be
    multiplied. Both contiguous."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, tokens: int, columns: int, group: int, device: torch.device) -> "Rounded":
        scales = torch.empty(tokens, columns // group, dtype=torch.float32, device=device)
        return cls(torch.empty(tokens, columns, dtype=torch.float8_e4m3fn, device=device), scales)

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return self.values.shape[0]


@triton.jit
def store_rounded(wide, values, scales, token, begin, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a token from `begin` on, in float32, zeros beyond K: rounded, into values and scales as `Rounded` has them.

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
        tl.store(scales + token * (K // GROUP) + group, scale, mask=group < K // GROUP)
        near = tl.reshape(parts * (1 / scale)[:, None], [BLOCK])
    near = tl.minimum(tl.maximum(near, -LARGEST), LARGEST)
    at = begin + tl.arange(0, BLOCK)
    tl.store(values + token * K + at, near.to(values.dtype.element_ty), mask=at < K)


@triton.jit
def _round(x, values, scales, x_stride, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
           AHEAD: tl.constexpr):  # fmt: skip
    """One program: BLOCK columns of one token. GATED: x has as many more behind them, and what is rounded is SwiGLU's product."""
    token, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    wide = tl.load(x + token * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + token * x_stride + K + at, mask=at < K, other=0.0).to(tl.float32)
        wide = (wide / (1 + tl.exp(-wide)) * up).to(x.dtype.element_ty).to(tl.float32)
    store_rounded(wide, values, scales, token, begin, K, GROUP, BLOCK)


def rounded(x: Tensor, group: int, *, ahead: bool = False) -> Rounded:
    """x [tokens, columns], rows may lie apart. group: columns that share a scale: all, or a power of two.
    ahead: the next kernel may begin meanwhile, and waits for what is made here.
    """
    return _launch(x, x.shape[1], group, False, ahead)


def silu_mul_rounded(gate_up: Tensor, group: int) -> Rounded:
    """gate_up [tokens, 2 * columns], the gate first: silu(gate) * up, rounded to its dtype and then as `rounded`."""
    return _launch(gate_up, gate_up.shape[1] // 2, group, True, False)


def _launch(x: Tensor, columns: int, group: int, gated: bool, ahead: bool) -> Rounded:
    out = Rounded.empty(len(x), columns, group, x.device)
    if len(x):
        block = int(triton.next_power_of_2(columns))
        if group < columns:
            block = min(block, PIECE)
        _round[(len(x), triton.cdiv(columns, block))](
            x, out.values, out.scales, x.stride(0), K=columns, GROUP=group, BLOCK=block, GATED=gated,
            AHEAD=ahead and not interpreted(), num_warps=warps_for(block),
        )  # fmt: skip
    return out
