"""Low-rank products of pairs, a token and one of its experts, by the token's adapter: what the products of experts get added.

    low[pair] = A[slot of token, expert] x[pair]         split along x where a tile has few pairs, in float32
    added[pair] = B[slot of token, expert] low[pair]     in the order of the pairs

A program takes a tile of `route`'s, whose pairs are of one expert, and their adapters one after another: pairs of others are
zeros in its products, those without one are in none. As in the experts' own products, rows of A and B are the matrix unit's
first dimension, and pairs its second. Driven by device tensors alone. Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.experts.route import WORDS_OF_TILE, Added, Routing
from workers.kernels.lora.weights import LoraWeights

NOBODY = tl.constexpr((1 << 31) - 1)
FEW_PAIRS = 16
"""Of a tile: up to so many, x is split among programs, and so are adapters."""

LONGEST_SHARE, MOST_SHARES, MOST_TURNS = 512, 8, 4
WIDEST, COLUMNS, WIDTH = 64, 128, 64
"""Of a program: rows of A, numbers of x at a time, rows of B."""


@triton.jit
def _tile(slots, pairs, tile, TOP: tl.constexpr, SIZE: tl.constexpr):
    """Its expert among those held, its pairs' tokens and places among all pairs, and their tokens' slots, which are negative
    also where it has fewer than SIZE."""
    expert = tl.load(tile).to(tl.int64)
    place = tl.arange(0, SIZE)
    there = place < tl.load(tile + 2)
    place += tl.load(tile + 1)
    token = tl.load(pairs + place, mask=there, other=0) // TOP
    return expert, token.to(tl.int64), place.to(tl.int64), tl.load(slots + token, mask=there, other=-1)


@triton.jit
def _following(slot, last):
    """The lowest above `last`; NOBODY behind the highest."""
    return tl.min(tl.where(slot > last, slot, NOBODY), 0)


@triton.jit(do_not_specialize=["total"])
def _shrink(x, a, low, slots, pairs, tiles, count, total, x_stride, K: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr,
            EXPERTS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr,
            TURNS: tl.constexpr, BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program: WIDTH rows of A of every so manieth adapter of a tile, and a share of x."""
    if tl.program_id(0) >= tl.load(count):
        return
    expert, token, place, slot = _tile(slots, pairs, tiles + tl.program_id(0) * WORDS_OF_TILE, TOP, SIZE)
    source = (token if BY_TOKEN else place) * x_stride
    n = tl.program_id(1) // TURNS * WIDTH + tl.arange(0, WIDTH)
    share = tl.program_id(2)
    each: tl.constexpr = ((K + COLUMNS - 1) // COLUMNS + SHARES - 1) // SHARES * COLUMNS
    own, number = _following(slot, -1), 0
    while own < NOBODY:
        if number % TURNS == tl.program_id(1) % TURNS:
            mine = slot == own
            rows = a + ((own.to(tl.int64) * EXPERTS + expert) * N + n)[:, None] * K
            sums = tl.zeros([WIDTH, SIZE], tl.float32)
            for start in range(share * each, tl.minimum(share * each + each, K), COLUMNS):
                k = start + tl.arange(0, COLUMNS)
                part = tl.load(x + source[None, :] + k[:, None], mask=mine[None, :] & (k < K)[:, None], other=0.0)
                weight = tl.load(rows + k[None, :], mask=(k < K)[None, :], other=0.0)
                sums = tl.dot(weight, part, sums, input_precision=PRECISION)
            tl.store(low + (share.to(tl.int64) * total + place)[None, :] * N + n[:, None], sums, mask=mine[None, :])
        own = _following(slot, own)
        number += 1


@triton.jit(do_not_specialize=["total"])
def _expand(low, b, added, slots, pairs, tiles, count, total, OUT: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr,
            RANK: tl.constexpr, IN_TURNS: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr,
            WIDTH: tl.constexpr, SHARES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program: WIDTH numbers of one part of the product, of which each has OUT, for all adapters of a tile. N: of `low`; with
    IN_TURNS both parts have the same."""
    if tl.program_id(0) >= tl.load(count):
        return
    expert, _, place, slot = _tile(slots, pairs, tiles + tl.program_id(0) * WORDS_OF_TILE, TOP, SIZE)
    blocks: tl.constexpr = (OUT + WIDTH - 1) // WIDTH
    part, inside = tl.program_id(1) // blocks, tl.program_id(1) % blocks * WIDTH + tl.arange(0, WIDTH)
    row, r = 2 * inside + part if IN_TURNS else part * OUT + inside, tl.arange(0, RANK)
    column = r if IN_TURNS else part * RANK + r
    sums = tl.zeros([WIDTH, SIZE], tl.float32)
    own = _following(slot, -1)
    while own < NOBODY:
        mine = (slot == own)[None, :]
        of_part = tl.zeros([RANK, SIZE], tl.float32)
        for share in range(SHARES):
            at = low + (tl.full([1], share, tl.int64) * total + place)[None, :] * N + column[:, None]
            of_part += tl.load(at, mask=mine, other=0.0)
        at = b + ((own.to(tl.int64) * EXPERTS + expert) * (PARTS * OUT) + row)[:, None] * RANK + r[None, :]
        weight = tl.load(at, mask=(inside < OUT)[:, None], other=0.0)
        sums = tl.dot(weight, of_part.to(weight.dtype), sums, input_precision=PRECISION)
        own = _following(slot, own)
    mask = (slot >= 0)[None, :] & (inside < OUT)[:, None]
    to = added + place[None, :] * (PARTS * OUT) + (part * OUT + inside)[:, None]
    tl.store(to, sums.to(added.dtype.element_ty), mask=mask)


def low_rank(
    x: Tensor, weights: LoraWeights, routing: Routing, slots: Tensor, *, by_token: bool, in_turns: bool = False
) -> Added:  # fmt: skip
    """What each pair's product gets from its token's adapter. x: [tokens, in], or without by_token [pairs, in] in the order of
    `routing.pairs`. weights: of the experts that are held; in_turns: its rows are gate, up, gate, ..., of one part. slots
    [tokens] int32, each token's; negative: it has no adapter. No wait on the host."""
    pairs, size, (count, experts, low_width, width) = len(routing.pairs), routing.size, weights.a.shape
    parts = 2 if in_turns else len(weights.rows)
    out = sum(weights.rows) // parts
    few = size <= FEW_PAIRS
    shares, turns = (min(MOST_SHARES, max(1, width // LONGEST_SHARE)), min(MOST_TURNS, count)) if few else (1, 1)
    low = torch.empty(shares, pairs, low_width, dtype=torch.float32, device=x.device)
    added = torch.empty(pairs, parts * out, dtype=x.dtype, device=x.device)
    rows, tiles = min(WIDEST, low_width), len(routing.tiles)
    flags = {"TOP": routing.per_token, "EXPERTS": experts, "SIZE": size, "SHARES": shares,
             "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}  # fmt: skip
    if pairs:
        _shrink[(tiles, low_width // rows * turns, shares)](
            x, weights.a, low, slots, routing.pairs, routing.tiles, routing.count, pairs, x.stride(0), K=width, N=low_width,
            COLUMNS=COLUMNS if few else COLUMNS // 2, WIDTH=rows, TURNS=turns, BY_TOKEN=by_token, **flags,
        )  # fmt: skip
        _expand[(tiles, parts * triton.cdiv(out, WIDTH))](
            low, weights.b, added, slots, routing.pairs, routing.tiles, routing.count, pairs, OUT=out, PARTS=parts,
            N=low_width, RANK=weights.rank, IN_TURNS=in_turns, WIDTH=WIDTH, **flags,
        )  # fmt: skip
    return Added(added, slots)
