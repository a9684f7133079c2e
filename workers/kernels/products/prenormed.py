"""A norm that a product leaves to the next one: what the residual has become times the norm's weight, and sums of its squares.

An RMSNorm scales a token by one number, which the next product may as well apply to its sums. So the launch that adds to the
residual writes what that product multiplies, and no launch stands between them. Imports torch and triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prenormed:
    """x times an RMSNorm's weight, whose scale is still to come.

    values: [tokens, width], of 16 bits. squares: [parts, tokens] float32, the sum of the squares of so many columns of x each.
    eps: the norm's.
    """

    values: Tensor
    squares: Tensor
    eps: float

    @classmethod
    def empty(cls, x: Tensor, parts: int, eps: float) -> "Prenormed":
        """For x [tokens, width], written in so many parts."""
        squares = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
        return cls(torch.empty(x.shape, dtype=x.dtype, device=x.device), squares, eps)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def parts(self) -> int:
        return len(self.squares)


@triton.jit
def powers_of(squares, token, tokens, there, PARTS: tl.constexpr):
    """[parts, TOKENS]: the sums of squares of each part of these tokens. `scale_of` adds them up when they are wanted, so that
    nothing waits for them before."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))[:, None]
    return tl.load(squares + part * tokens + token[None, :], mask=there & (part < PARTS), other=0.0)


@triton.jit
def scale_of(powers, eps, K: tl.constexpr):
    """The norm's scale of each token: [1, TOKENS]."""
    return tl.rsqrt(tl.sum(powers, 0) / K + eps)[None, :]


@triton.jit
def store_prenormed(x, weights, values, squares, part, rows, token, tokens, N: tl.constexpr):
    """x [ROWS, TOKENS], as the residual has it, and the norm's weights [ROWS]: times each other, and the sum of squares."""
    mask = (token < tokens)[None, :] & (rows < N)[:, None]
    wide = tl.where(mask, x.to(tl.float32), 0.0)
    at = values + token.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, (wide * weights.to(tl.float32)[:, None]).to(values.dtype.element_ty), mask=mask)
    tl.store(squares + part * tokens + token, tl.sum(wide * wide, 0), mask=token < tokens)
