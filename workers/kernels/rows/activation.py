"""SwiGLU's product: one launch. Imports torch and triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted

BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, row_stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    enter(PDL)
    gate = tl.load(gate_up + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """gate_up [tokens, 2 * width], the gate first -> silu(gate) * up, [tokens, width], rounded once; in `out` if given."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        pdl = pdl and not interpreted()
        _silu_mul[(tokens, triton.cdiv(width, BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl
        )
    return out
