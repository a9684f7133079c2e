"""Low-rank products of a step of few tokens, as a part of the product that they are added to: two launches, the second that
product itself (`products.tiles`).

    low[token]  = A[slot of token] x[token]     `shrink`: A of every adapter that is there, as rows of one matrix
    sums[token] += B[slot of token] low[token]  `raised`, at the end of the product: B side by side, as further columns of its
                                                weight; the numbers that they meet are zero where the token is another's

Tensor cores multiply each adapter's weights by all tokens, which costs nothing beside the bytes. Zeros hide what is finite
alone: whoever fills the weights sees to that. With programmatic dependent launch the product begins once `shrink` has, and
waits for its end only before it reads `low`: `shrink` lets it start when all before both has ended, so that its x is there.

Triton; on the CPU under its interpreter.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_SHARES, LEAST_SHARE = 4, 1024
"""Of x, among the programs of `shrink`."""

WIDEST = 64
TOGETHER = 128
"""Columns of B that are multiplied at a time, of several adapters where ranks are low."""

NOBODYS = tl.constexpr(-2)
LINE_BYTES = tl.constexpr(128)


class FewRows(NamedTuple):
    """slots: [rows] int32, each row's; negative: none. listed: [1 + count] int32: how many slots have rows, then which."""

    slots: Tensor
    listed: Tensor


@dataclass(frozen=True, slots=True)
class ShrinkTiling:
    """width: rows of A that a program takes, of which as many make the rank. columns: of x in a step. shares: of x."""

    width: int
    columns: int
    shares: int
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True, slots=True)
class LowRank:
    """What the adapters of few rows add to a product.

    a: [slots, parts * rank, in], b: [slots, out, rank], finite; rank: a power of two from 16 on. parts: of `out`, up to three,
    each with an A of its own. tiling: replaces the fixed one. ahead: B is asked for when the product begins.
    """

    a: Tensor
    b: Tensor
    parts: tuple[int, ...]
    rows: FewRows
    tiling: ShrinkTiling | None = None
    ahead: bool = True

    @property
    def rank(self) -> int:
        return self.b.shape[2]

    @property
    def together(self) -> int:
        """Adapters whose B are multiplied at a time."""
        return min(int(triton.next_power_of_2(len(self.b))), max(1, TOGETHER // self.rank))


@triton.jit(do_not_specialize=["rows"])
def _list(slots, listed, rows, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """One program. PADDED: slots, or more; ROWS: rows, or more."""
    row, slot = tl.arange(0, ROWS), tl.arange(0, PADDED)
    own = tl.load(slots + row, mask=row < rows, other=-1)
    there = tl.max((own[None, :] == slot[:, None]).to(tl.int32), 1)
    tl.store(listed + tl.cumsum(there, 0), slot, mask=there > 0)
    tl.store(listed, tl.sum(there, 0))


def list_slots(slots: Tensor, count: int) -> FewRows:
    """slots: [rows] int32 of few rows; negative: it has no adapter. count: of slots that there are. No wait on the host."""
    listed = torch.empty(count + 1, dtype=torch.int32, device=slots.device)
    _list[(1,)](
        slots, listed, len(slots), PADDED=triton.next_power_of_2(count), ROWS=triton.next_power_of_2(max(1, len(slots)))
    )
    return FewRows(slots, listed)


@triton.jit(do_not_specialize=["tokens"])
def _shrink(x, norm_weight, a, low, slots, listed, tokens, x_stride, K: tl.constexpr, LOW: tl.constexpr, TOKENS: tl.constexpr,
            WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
            OVERLAP: tl.constexpr):  # fmt: skip
    """One program: WIDTH rows of one adapter's A times all tokens, over a share of x. Writes its own tokens' alone."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    tiles: tl.constexpr = LOW // WIDTH
    place = tl.program_id(0) // tiles
    if place >= tl.load(listed):
        return
    slot = tl.load(listed + 1 + place)
    n = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    begin = tl.program_id(1) * (K // SHARES)
    column = begin + tl.arange(0, COLUMNS)
    a_at = (slot.to(tl.int64) * LOW + n)[:, None] * K + column[None, :]
    x_at = token.to(tl.int64)[None, :] * x_stride + column[:, None]
    sums = tl.zeros([WIDTH, TOKENS], tl.float32)
    for start in tl.range(0, K // SHARES, COLUMNS, num_stages=STAGES):
        weight = tl.load(a + start + a_at, eviction_policy="evict_first")
        part = tl.load(x + start + x_at, mask=there[None, :], other=0.0)
        if NORM:
            part = (part.to(tl.float32) * tl.load(norm_weight + start + column[:, None]).to(tl.float32)).to(part.dtype)
        sums = tl.dot(weight, part, sums)
    own = there & (tl.load(slots + token, mask=there, other=-1) == slot)
    at = low + (tl.program_id(1) * tokens + token).to(tl.int64)[None, :] * LOW + n[:, None]
    tl.store(at, sums, mask=own[None, :])


def shrink(
    x: Tensor, low_rank: LowRank, norm_weight: Tensor | None = None, *, padded: int, overlap: bool = False
) -> Tensor:  # fmt: skip
    """x [tokens, in] -> [shares, tokens, parts * rank] float32, whose sum over the shares is A x of each token's adapter; of
    tokens without one, anything. norm_weight [in]: x is first multiplied by it. padded: tokens, or more. overlap: the next
    launch may begin meanwhile."""
    (tokens, k), (slots, width) = x.shape, low_rank.a.shape[:2]
    tiling = low_rank.tiling or shrink_tiling(k, low_rank.rank)
    low = torch.empty(tiling.shares, tokens, width, dtype=torch.float32, device=x.device)
    _shrink[(min(slots, tokens) * (width // tiling.width), tiling.shares)](
        x, x if norm_weight is None else norm_weight, low_rank.a, low, *low_rank.rows, tokens, x.stride(0), K=k, LOW=width,
        TOKENS=padded, WIDTH=tiling.width, COLUMNS=tiling.columns, SHARES=tiling.shares, STAGES=tiling.stages,
        NORM=norm_weight is not None, OVERLAP=overlap, num_warps=tiling.warps,
    )  # fmt: skip
    return low


def shrink_tiling(k: int, rank: int) -> ShrinkTiling:
    """By shape alone, for k that `products.tiles` can take too."""
    columns = next(size for size in (128, 64, 32, 16) if k % size == 0)
    splits = (count for count in (MOST_SHARES, 2) if k >= count * LEAST_SHARE and k % (count * columns) == 0)
    return ShrinkTiling(min(rank, WIDEST), columns, next(splits, 1))


@triton.jit
def fetch_raising(b, listed, first_row, OUT: tl.constexpr, RANK: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr):
    """Asks for ROWS rows from first_row on of every listed adapter's B to be brought into the L2 cache."""
    size: tl.constexpr = LINE_BYTES * 8 // b.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = (ROWS * RANK + size - 1) // size
    inside = tl.minimum(first_row * RANK + tl.arange(0, lines) * size, OUT * RANK - 1)
    count = tl.load(listed)
    for first in tl.range(0, count, PER, num_stages=1):
        slot = tl.load(listed + 1 + tl.minimum(first + tl.arange(0, PER), count - 1))
        at = b + slot.to(tl.int64)[:, None] * (OUT * RANK) + inside[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // dummy $0", "=r,l", [at.to(tl.int64)], dtype=tl.int32,
                                  is_pure=False, pack=1)  # fmt: skip


@triton.jit
def raised(low, b, slots, listed, token, tokens, rows, part, OUT: tl.constexpr, LOW: tl.constexpr, RANK: tl.constexpr,
           PER: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """B low of each token's adapter, of rows [ROWS] of `out`, which are of one part: [ROWS, TOKENS] in float32."""
    there = token < tokens
    r = tl.arange(0, RANK)
    at = low + token.to(tl.int64)[None, :] * LOW + (part * RANK + r)[:, None]
    narrow = tl.zeros([RANK, TOKENS], tl.float32)
    for share in tl.static_range(SHARES):
        narrow += tl.load(at + share * tokens * LOW, mask=there[None, :], other=0.0, cache_modifier=".cg")
    narrow = narrow.to(b.dtype.element_ty)
    nought = tl.zeros([RANK, TOKENS], b.dtype.element_ty)
    own = tl.load(slots + token, mask=there, other=-1)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    count = tl.load(listed)
    for first in tl.range(0, count, PER, num_stages=1):
        index = first + tl.arange(0, PER)
        slot = tl.load(listed + 1 + index, mask=index < count, other=NOBODYS)
        b_at = slot.to(tl.int64)[None, :, None] * (OUT * RANK) + rows.to(tl.int64)[:, None, None] * RANK + r[None, None, :]
        weight = tl.load(b + b_at, mask=(slot >= 0)[None, :, None], other=0.0)
        mine = tl.where(slot[:, None, None] == own[None, None, :], narrow[None, :, :], nought[None, :, :])
        sums = tl.dot(tl.reshape(weight, [ROWS, PER * RANK]), tl.reshape(mine, [PER * RANK, TOKENS]), sums)
    return sums
