"""Products of any number of tokens with a matrix in fewer bits.

    FP8, a scale for each row             x rounded token by token, the library's product (`torch._scaled_mm`)
    FP8, a scale for each 128 x 128       x rounded token by token in groups of 128 columns, the library's product of blocks
    other FP8, four bits, other dtypes    the matrix widened into memory, the library's product

Up to as many tokens as `matvec` takes, it computes what `choose` gives it. Imports torch and the kernels.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.launch import interpreted
from workers.kernels.products.expand import expanded
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS, choose
from workers.kernels.reduced import BLOCK, Reduced, Rounded
from workers.kernels.rows.rounding import rounded

MULTIPLE_OF_LIBRARY = 16
"""Of rows and columns, for the library's products of FP8."""

LEAST_OF_LIBRARY, BLOCKS_OF_LIBRARY = (9, 0), (9, 0)
"""Compute capability: from which on scales of rows are served, and the one that has scales of blocks."""

GROUPS_OF_LIBRARY = 4
"""Blocks' scales of a row, as the library wants them in memory, are a multiple of so many."""


def product(x: Tensor | Rounded, weight: Reduced, bias: Tensor | None = None) -> Tensor:
    """x [tokens, columns] of 16 or 32 bits, or rounded where `rounds` says so -> [tokens, rows]. bias [rows]."""
    if isinstance(x, Rounded):
        return _library(x, weight, bias)
    if len(x) <= MAX_TOKENS and choose(*weight.shape, len(x), x.dtype, False, weight.bits) is not None:
        return matvec(x, weight, bias=bias)  # without counters: K is never split
    if _library_takes(weight, x.dtype):
        return _library(rounded(x, weight.group), weight, bias)
    return F.linear(x, expanded(weight, x.dtype), bias)


def rounds(weight: Reduced, tokens: int, dtype: torch.dtype) -> bool:
    """Whether `product` rounds so many tokens of that dtype, so that they may come rounded, in groups of `weight.group`."""
    return tokens > MAX_TOKENS and _library_takes(weight, dtype)


def _library_takes(weight: Reduced, dtype: torch.dtype) -> bool:
    """Whether it multiplies FP8 with this matrix."""
    if weight.bits != 8 or dtype != torch.bfloat16 or interpreted() or any(size % MULTIPLE_OF_LIBRARY for size in weight.shape):
        return False
    if weight.by_row:
        return torch.cuda.get_device_capability(weight.values.device) >= LEAST_OF_LIBRARY
    fits = weight.blocks is not None and weight.blocks.shape[1] % GROUPS_OF_LIBRARY == 0
    return fits and _library_has_blocks(weight.values.device)


@cache
def _library_has_blocks(device: torch.device) -> bool:
    """Found by trying: which torch has it depends on the CUDA that it was built for, too."""
    if torch.cuda.get_device_capability(device) != BLOCKS_OF_LIBRARY or not hasattr(F, "scaled_mm"):
        return False
    weight = Reduced.empty(BLOCK, GROUPS_OF_LIBRARY * BLOCK, 8, BLOCK, torch.float32, device)
    weight.fill(torch.zeros_like(weight.values), torch.ones_like(weight.scales))
    x = Rounded.empty(BLOCK, weight.shape[1], BLOCK, torch.bfloat16, device)
    try:
        _library(x, weight.filled(), None)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def _library(x: Rounded, weight: Reduced, bias: Tensor | None) -> Tensor:
    if weight.blocks is None:
        out: Tensor = torch._scaled_mm(
            x.values, weight.values.T, scale_a=x.scales.T, scale_b=weight.scales.T, out_dtype=x.dtype, use_fast_accum=True
        )
    else:
        kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        out = F.scaled_mm(x.values, weight.values.T, x.scales.T, kinds[0], weight.blocks.T, kinds[1], output_dtype=x.dtype)
    out = out[: len(x)]
    return out if bias is None else out.add_(bias)
