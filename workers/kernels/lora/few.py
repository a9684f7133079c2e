"""Low-rank products of a step of few tokens, as a part of the product that they are added to: two launches, the second that
product itself (`products.tiles`).

    low[token]  = A[slot of token] x[token]     `shrink`: A of every adapter that is there, as rows of one matrix
    sums[token] += B[slot of token] low[token]  `raise_by`, at the end of the product: B side by side, as further columns of its
                                                weight; the numbers that they meet are zero where the token is another's

Tensor cores multiply each adapter's weights by all tokens, which costs nothing beside the bytes. Zeros hide what is finite
alone: whoever fills the weights sees to that. With programmatic dependent launch `shrink` starts while what comes before ends,
the product begins once `shrink` has, and waits for its end only before it reads `low`: `shrink` lets it start when all before
both has ended, so that its x is there.

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

WIDEST, LEAST_RANK = 64, 16
TOGETHER = 128
"""Columns of B that are multiplied at a time, of several adapters where ranks are low."""

NOBODYS = tl.constexpr(-2)


class FewRows(NamedTuple):
    """slots: [rows] int32, each row's; negative: none. listed: [slots or more] int32, those that have rows, then NOBODYS.
    present: [1] int32, how many those are."""

    slots: Tensor
    listed: Tensor
    present: Tensor


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
    each with an A of its own. tiling: replaces the fixed one.
    """

    a: Tensor
    b: Tensor
    parts: tuple[int, ...]
    rows: FewRows
    tiling: ShrinkTiling | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[2]

    @property
    def together(self) -> int:
        """Adapters whose B are multiplied at a time."""
        return min(int(triton.next_power_of_2(len(self.b))), max(1, TOGETHER // self.rank))


@triton.jit(do_not_specialize=["rows"])
def _list(slots, listed, present, rows, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """One program. PADDED: slots, or more; ROWS: rows, or more."""
    row, slot = tl.arange(0, ROWS), tl.arange(0, PADDED)
    own = tl.load(slots + row, mask=row < rows, other=-1)
    there = tl.max((own[None, :] == slot[:, None]).to(tl.int32), 1)
    before, found = tl.cumsum(there, 0) - there, tl.sum(there, 0)
    tl.store(listed + tl.where(there > 0, before, found + slot - before), tl.where(there > 0, slot, NOBODYS))
    tl.store(present, found)


def list_slots(slots: Tensor, count: int) -> FewRows:
    """slots: [rows] int32 of few rows; negative: it has no adapter. count: of slots that there are. No wait on the host."""
    padded = max(TOGETHER // LEAST_RANK, int(triton.next_power_of_2(count)))
    listed, found = (torch.empty(size, dtype=torch.int32, device=slots.device) for size in (padded, 1))
    _list[(1,)](slots, listed, found, len(slots), PADDED=padded, ROWS=triton.next_power_of_2(max(1, len(slots))))
    return FewRows(slots, listed, found)


@triton.jit(do_not_specialize=["tokens"])
def _shrink(x, norm_weight, a, low, slots, listed, tokens, x_stride, K: tl.constexpr, LOW: tl.constexpr,
            TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr,
            NORM: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One program: WIDTH rows of one adapter's A times all tokens, over a share of x."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    tiles: tl.constexpr = LOW // WIDTH
    place = tl.program_id(0) // tiles
    slot = tl.load(listed + place)
    if slot < 0:
        return
    tile = tl.program_id(0) % tiles
    n = tile * WIDTH + tl.arange(0, WIDTH)
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
    tl.store(low + (tl.program_id(1) * LOW + n)[:, None] * TOKENS + token[None, :], sums, mask=_own(slots, slot, token, there))


@triton.jit
def _own(slots, slot, token, there):
    return (there & (tl.load(slots + token, mask=there, other=-1) == slot))[None, :]


def shrink(
    x: Tensor, low_rank: LowRank, norm_weight: Tensor | None = None, *, padded: int, overlap: bool = False
) -> Tensor:  # fmt: skip
    """x [tokens, in] -> [shares, parts * rank, padded] float32, whose sum over the shares is A x of each token's adapter; of
    tokens without one, anything. norm_weight [in]: x is first multiplied by it. padded: tokens, or more. overlap: it starts
    before what came before has ended, and the next launch may begin meanwhile."""
    (tokens, k), (slots, width) = x.shape, low_rank.a.shape[:2]
    tiling = low_rank.tiling or shrink_tiling(k, low_rank.rank)
    low = torch.empty(tiling.shares, width, padded, dtype=torch.float32, device=x.device)
    _shrink[(min(slots, tokens) * (width // tiling.width), tiling.shares)](
        x, x if norm_weight is None else norm_weight, low_rank.a, low, *low_rank.rows[:2], tokens, x.stride(0), K=k, LOW=width,
        TOKENS=padded, WIDTH=tiling.width, COLUMNS=tiling.columns, SHARES=tiling.shares, STAGES=tiling.stages,
        NORM=norm_weight is not None, OVERLAP=overlap, num_warps=tiling.warps, launch_pdl=overlap,
    )  # fmt: skip
    return low


def shrink_tiling(k: int, rank: int) -> ShrinkTiling:
    """By shape alone, for k that `products.tiles` can take too."""
    columns = next(size for size in (128, 64, 32, 16) if k % size == 0)
    splits = (count for count in (MOST_SHARES, 2) if k >= count * LEAST_SHARE and k % (count * columns) == 0)
    return ShrinkTiling(min(rank, WIDEST), columns, next(splits, 1))


@triton.jit
def of_tokens(slots, listed, token, tokens, PER: tl.constexpr):
    """The slot of each token, and the first PER that are listed; past the L1 cache, since its caller has not waited."""
    own = tl.load(slots + token, mask=token < tokens, other=-1, cache_modifier=".cg")
    return own, tl.load(listed + tl.arange(0, PER), cache_modifier=".cg")


@triton.jit
def side(b, slot, rows, OUT: tl.constexpr, RANK: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS] of the B of the PER slots, one beside the other; zeros for slots that are none."""
    at = slot.to(tl.int64)[None, :, None] * (OUT * RANK) + rows.to(tl.int64)[:, None, None] * RANK
    weight = tl.load(b + at + tl.arange(0, RANK)[None, None, :], mask=(slot >= 0)[None, :, None], other=0.0)
    return tl.reshape(weight, [ROWS, PER * RANK])


@triton.jit
def narrowed(low, part, LOW: tl.constexpr, RANK: tl.constexpr, SHARES: tl.constexpr, TOKENS: tl.constexpr):
    """What `shrink` has left of one part: [RANK, TOKENS] in float32."""
    n = tl.arange(0, SHARES)[:, None] * LOW + (part * RANK + tl.arange(0, RANK))[None, :]
    return tl.sum(tl.load(low + n[:, :, None] * TOKENS + tl.arange(0, TOKENS)[None, None, :], cache_modifier=".cg"), 0)


@triton.jit
def raise_by(sums, weight, narrow, slot, own, RANK: tl.constexpr, PER: tl.constexpr, TOKENS: tl.constexpr):
    """Adds weight [ROWS, PER * RANK] times what each token has of its own slot to sums [ROWS, TOKENS]."""
    narrow = narrow.to(weight.dtype)
    mine = tl.where(slot[:, None, None] == own[None, None, :], narrow[None, :, :], tl.zeros_like(narrow)[None, :, :])
    return tl.dot(weight, tl.reshape(mine, [PER * RANK, TOKENS]), sums)
