"""SwiGLU's product: one launch. Imports torch and triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted
from workers.kernels.lora.up import RANKS, columns_of, operands, raised, rank_of, slot_of
from workers.kernels.lora.weights import Awaited

BLOCK, ADAPTED_BLOCK = 1024, 256
"""Numbers of a program: alone, and with B's beside them."""


@triton.jit
def _silu_mul(gate_up, out, low, b, slots, row_stride, out_stride, low_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: BLOCK numbers of one row. RANK: of the adapters whose part gate and up await; 0: they are whole."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    if RANK > 0:
        slot, there = slot_of(slots, row)
        own, wanted = b + slot * (2 * WIDTH * RANK), inside & there
        of_gate = columns_of(own, at, wanted, 0, RANK, RANKS, 1)
        of_up = columns_of(own, WIDTH + at, wanted, 0, RANK, RANKS, 1)
    enter(PDL)
    gate = tl.load(gate_up + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        mine = low + row * low_stride + slot * (2 * RANK)
        gate += raised(of_gate, own, mine, at, wanted, there, RANK, RANKS, 1)
        up += raised(of_up, own, mine + RANK, WIDTH + at, wanted, there, RANK, RANKS, 1)
    tl.store(out + row * out_stride + at, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(
    gate_up: Tensor, out: Tensor | None = None, *, awaited: Awaited | None = None, pdl: bool = False
) -> Tensor:  # fmt: skip
    """gate_up [tokens, 2 * width], the gate first -> silu(gate) * up, [tokens, width], rounded once; in `out` if given.
    awaited: what adapters add to gate_up yet, of two parts."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        pdl = pdl and not interpreted()
        block = BLOCK if awaited is None else ADAPTED_BLOCK
        low, b, slots, low_stride = operands(awaited)
        _silu_mul[(tokens, triton.cdiv(width, block))](
            gate_up, out, low, b, slots, gate_up.stride(0), out.stride(0), low_stride, WIDTH=width, BLOCK=block,
            RANK=rank_of(awaited), RANKS=RANKS, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
    return out
