"""The embedding and the first layer's norm: one launch. Imports torch and triton."""

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted, warps_for


@triton.jit
def _embed_norm(tokens, table, weight, hidden_out, normed_out, table_stride, hidden_stride, normed_stride, eps,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: one token."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    enter(PDL)
    token = tl.load(tokens + row).to(tl.int64)
    value = tl.load(table + token * table_stride + at, mask=inside, other=0.0)
    tl.store(hidden_out + row * hidden_stride + at, value, mask=inside)
    value = value.to(tl.float32)
    power = tl.sum(value * value, 0) / WIDTH
    normed = (value * tl.rsqrt(power + eps) * scale).to(normed_out.dtype.element_ty)
    tl.store(normed_out + row * normed_stride + at, normed, mask=inside)


def embed_norm(
    tokens: Tensor, table: Tensor, weight: Tensor, eps: float, hidden_out: Tensor, normed_out: Tensor, *, pdl: bool = False
) -> None:
    """tokens [tokens], rows of `table` [vocab, width] -> hidden_out [tokens, width] and its RMSNorm, normed_out.

    tokens: int32 or int64, all of them rows of the table: nothing checks it.
    """
    if not len(tokens):
        return
    pdl, width = pdl and not interpreted(), table.shape[1]
    _embed_norm[(len(tokens),)](
        tokens, table, weight, hidden_out, normed_out, table.stride(0), hidden_out.stride(0), normed_out.stride(0), eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PDL=pdl, num_warps=warps_for(width), launch_pdl=pdl,
    )  # fmt: skip
