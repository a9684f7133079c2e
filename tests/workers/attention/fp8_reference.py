"""What a pool in FP8 holds and what attention over it gives, computed from the format's definition alone.

Imports torch and the pool; nothing that writes or reads FP8 for the engine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import blocks_of, dense, to_device
from workers.attention.forms import Form
from workers.step import StepInput

SCALES = (0.37, 0.81)
NAN = 0x7F


def magnitudes() -> Tensor:
    """[127] float64: what the codes 0 to 126 of float8_e4m3fn stand for; 127 is NaN, the eighth bit the sign."""
    codes = torch.arange(NAN)
    exponent, mantissa = codes // 8, (codes % 8).double() / 8
    return torch.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))


def codes_of(numbers: Tensor, scale: float) -> Tensor:
    """uint8: numbers divided by the scale in float32, then the nearest there is, of two the one with an even code."""
    exact = (numbers.float() / torch.tensor(scale, dtype=torch.float32)).double()
    known = magnitudes()
    above = torch.searchsorted(known, exact.abs().contiguous()).clamp(1, NAN - 1)
    low, high = exact.abs() - known[above - 1], known[above] - exact.abs()
    code = torch.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    code = torch.where(exact.isnan(), NAN, code)
    return (code + 128 * torch.signbit(exact)).to(torch.uint8)


def meaning(codes: Tensor, scale: float) -> Tensor:
    """float64 of uint8 codes, none of which is NaN."""
    size = magnitudes()[codes.long() % 128]
    return torch.where(codes < 128, size, -size) * scale


def rounded(numbers: Tensor, scale: float) -> Tensor:
    """float64: the nearest that a pool with that scale can hold."""
    return meaning(codes_of(numbers, scale), scale)


@dataclass(frozen=True, slots=True)
class NarrowProblem:
    """One layer of one step over a pool in FP8. expected: [tokens, heads, head_dim] float64; codes: the pool's bytes once the
    step's keys and values stand there, both on the CPU."""

    step: StepInput
    pool: KVPool
    query: Tensor
    key: Tensor
    value: Tensor
    layer: int
    expected: Tensor
    codes: Tensor


def narrow_problem(
    step: StepInput, layout: BlockLayout, heads: int, dtype: torch.dtype, device: str, scales: tuple[float, float] = SCALES,
    wide: float = 1.0, asked: float = 1.0, form: Form | None = None, sinks: Tensor | None = None,
) -> NarrowProblem:  # fmt: skip
    """Every slot that must not be read holds NaN. wide: how large keys are, and values twice as large; asked: how large queries
    are. form, sinks: of the last layer, the one that is asked for; None: plain."""
    assert layout.dtype == FP8
    layer, form = layout.layers - 1, form or Form(layout.head_dim**-0.5)
    keys, values = ((1.0,) * layer + (scale,) for scale in scales)
    pool = KVPool(layout, blocks_of(step, layout.block_size), device, scales=KVScales(keys, values))
    codes = torch.full(pool.data.shape, NAN, dtype=torch.uint8)
    states, expected = [], []
    for new, context, table in zip(step.host_query_lens, step.host_context_lens, step.host_block_tables, strict=True):
        query = (asked * torch.randn(int(new), heads, layout.head_dim)).to(dtype)
        halves = torch.randn(2, int(context), layout.kv_heads, layout.head_dim)
        kv = (halves * torch.tensor([wide, 2 * wide])[:, None, None, None]).to(dtype)
        position = torch.arange(int(context))
        block, slot = torch.from_numpy(table).long()[position // layout.block_size], position % layout.block_size
        meant = []
        for half, scale in enumerate(scales):
            codes[block, layer, half, slot] = codes_of(kv[half], scale)
            meant.append(meaning(codes[block, layer, half, slot], scale))
        states.append((query, kv[0, -int(new) :], kv[1, -int(new) :]))
        expected.append(dense(query.double(), meant[0], meant[1], form, sinks))
    before = codes.clone()
    owned = step.slots.div(layout.block_size, rounding_mode="floor"), step.slots % layout.block_size
    before[owned[0], layer, :, owned[1]] = NAN
    pool.data.view(torch.uint8).copy_(before)
    query, key, value = (torch.cat(parts).to(device) for parts in zip(*states, strict=True))
    return NarrowProblem(to_device(step, device), pool, query, key, value, layer, torch.cat(expected), codes)
