"""Which experts each token goes through, and the tokens in the order of their experts: a launch each, and no wait of the host.

A *pair* is a token and one of its experts: pair = token * per_token + place among the token's experts, the best first. Pairs
are sorted by expert, and cut into *tiles* of one expert each, which are what the products' programs take. How many tiles there
are the device alone knows: grids are made for as many as there might be. Among equal scores the first expert is chosen.

Imports torch and triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import enter, interpreted, warps_for

WORDS_OF_TILE = tl.constexpr(3)
LEAST = tl.constexpr(-(1 << 31))
PAIRS_AT_ONCE = 128, 1024, 4096, 16384  # that a program which sorts looks at


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one layer's step, on the device. chosen [tokens, per_token] int32: experts, -1 where the token is padding. weights: of
    that shape, float32. gates [tokens] float32: of the shared expert; None without one."""

    chosen: Tensor
    weights: Tensor
    gates: Tensor | None

    @property
    def per_token(self) -> int:
        return self.chosen.shape[1]


@dataclass(frozen=True, slots=True)
class Routing(Choice):
    """And its pairs. pairs [tokens * per_token] int32: those of this rank's experts, sorted by expert. tiles [most, 3] int32:
    expert among those held, first place in `pairs`, how many places. count [1] int32: tiles that there are. size: places of a
    tile at most."""

    pairs: Tensor
    tiles: Tensor
    count: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class Added:
    """What a product of `grouped` or `dense` gets added before anything else is done with it. numbers [pairs, rows of W]: in
    the order of `Routing.pairs`, what belongs to gates before what belongs to ups, also where W's rows are in turns. slots
    [tokens] int32: where that is negative nothing is added to the token's pairs, and what stands in `numbers` is undefined."""

    numbers: Tensor
    slots: Tensor


@triton.jit
def in_order(score, at, EXPERTS: tl.constexpr):
    """Scores as integers that are ordered as the numbers are; LEAST, as no expert's is, beyond the last."""
    bits = score.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(at < EXPERTS, tl.maximum(order, LEAST + 1), LEAST)


@triton.jit
def next_best(left, at, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """left: of `in_order`, BLOCK along AXIS -> the best along it, whose it is, the first of equals, and what is left then. In
    32 bits: a warp that has all of them compares them by one instruction."""
    largest = tl.max(left, AXIS, keep_dims=True)
    found = tl.min(tl.where(left == largest, at, BLOCK), AXIS, keep_dims=True)
    return largest, found, tl.where(at == found, LEAST, left)


@triton.jit
def choose_one(token, scores, live, chosen, weights, gates, load, scores_stride, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
               TOP: tl.constexpr, PLACES: tl.constexpr, OF_ALL: tl.constexpr, NORMALIZED: tl.constexpr, LIVE: tl.constexpr,
               SHARED: tl.constexpr, COUNTED: tl.constexpr):  # fmt: skip
    """Writes one token's choice. COUNTED: its experts are added to `load`."""
    at = tl.arange(0, BLOCK)
    place = tl.arange(0, PLACES)
    row = scores + token.to(tl.int64) * scores_stride
    score = tl.load(row + at, mask=at < EXPERTS, other=float("-inf"))
    left = in_order(score, at, EXPERTS)
    order = tl.full([PLACES], LEAST, tl.int32)
    expert = tl.zeros([PLACES], tl.int32)
    for number in tl.static_range(TOP):
        largest, found, left = next_best(left, at, 0, BLOCK)
        order = tl.where(place == number, largest, order)
        expert = tl.where(place == number, found, expert)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    best = tl.where(place < TOP, bits.to(tl.float32, bitcast=True), float("-inf"))
    top = tl.max(best, 0)
    share = tl.where(place < TOP, tl.exp(best - top), 0.0)
    if OF_ALL:
        share /= tl.sum(tl.exp(score - top), 0)
        if NORMALIZED:
            share /= tl.sum(share, 0)
    else:
        share /= tl.sum(share, 0)
    if LIVE:
        expert = tl.where(tl.load(live + token) != 0, expert, -1)
    to = token.to(tl.int64) * TOP + place
    tl.store(chosen + to, expert, mask=place < TOP)
    tl.store(weights + to, share, mask=place < TOP)
    if COUNTED:
        tl.atomic_add(load + expert, tl.full([PLACES], 1, tl.int64), mask=(place < TOP) & (expert >= 0), sem="relaxed")
    if SHARED:
        gate = tl.load(row + EXPERTS)
        tl.store(gates + token, 1 / (1 + tl.exp(-gate)))


@triton.jit
def _choose(scores, live, chosen, weights, gates, count, load, scores_stride, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
            TOP: tl.constexpr, PLACES: tl.constexpr, OF_ALL: tl.constexpr, NORMALIZED: tl.constexpr, LIVE: tl.constexpr,
            SHARED: tl.constexpr, SORTED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program is one token. SORTED: `_sort` follows, which counts; it finds no tiles yet."""
    token = tl.program_id(0)
    enter(PDL)
    if SORTED:
        tl.store(count, 0, mask=token == 0)
    choose_one(token, scores, live, chosen, weights, gates, load, scores_stride, EXPERTS, BLOCK, TOP, PLACES, OF_ALL,
               NORMALIZED, LIVE, SHARED, not SORTED)  # fmt: skip


@triton.jit(do_not_specialize=["total", "first_held"])
def _sort(chosen, pairs, tiles, count, load, total, first_held, HELD: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """One program is one expert of the model. Tiles lie in whatever order experts come in, which no result depends on."""
    expert = tl.program_id(0)
    enter(PDL)
    befores = tl.zeros([BLOCK], tl.int32)
    mines = befores
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        whose = tl.load(chosen + at, mask=at < total, other=-1)
        befores += ((whose >= first_held) & (whose < expert)).to(tl.int32)
        mines += (whose == expert).to(tl.int32)
    before, mine = tl.sum(befores, 0), tl.sum(mines, 0)
    tl.store(load + expert, tl.load(load + expert) + mine)
    held = expert - first_held
    if (mine > 0) & (held >= 0) & (held < HELD):
        tile = tiles + tl.atomic_add(count, tl.cdiv(mine, SIZE), sem="relaxed") * WORDS_OF_TILE
        for done in range(0, mine, SIZE):
            tl.store(tile, held)
            tl.store(tile + 1, before + done)
            tl.store(tile + 2, tl.minimum(mine - done, SIZE))
            tile += WORDS_OF_TILE
        for start in range(0, total, BLOCK):
            at = start + tl.arange(0, BLOCK)
            hit = (tl.load(chosen + at, mask=at < total, other=-1) == expert).to(tl.int32)
            tl.store(pairs + before + tl.cumsum(hit, 0) - 1, at, mask=hit != 0)
            before += tl.sum(hit, 0)


def most_tiles(pairs: int, experts: int, size: int) -> int:
    """Tiles that so many pairs may make at most: each expert that has any leaves one partly filled."""
    return min(pairs, (pairs + min(pairs, experts) * (size - 1)) // size)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a family chooses. of_all: the softmax is over all experts, before the best are chosen, and `normalized` makes what is
    left of it add up to one; else it is over the chosen."""

    per_token: int
    of_all: bool
    normalized: bool


def choose(scores: Tensor, load: Tensor, rule: Rule, *, live: Tensor | None = None, pdl: bool = False) -> Choice:
    """scores [tokens, experts] float32, or a column more: the shared expert's, through a sigmoid.

    load [experts] int64: gets each expert's tokens added. live [tokens] bool: those that are no padding; None: all.
    """
    return _launch_choose(scores, load, rule, None, live, pdl)


def route(
    scores: Tensor,
    load: Tensor,
    rule: Rule,
    *,
    held: int,
    first_held: int = 0,
    size: int,
    live: Tensor | None = None,
    pdl: bool = False,
) -> Routing:
    """As `choose`, and sorted. held, first_held: experts of this rank. size: places of a tile."""
    tokens, experts, device = scores.shape[0], len(load), scores.device
    total = tokens * rule.per_token
    pairs = torch.empty(total, dtype=torch.int32, device=device)
    tiles = torch.empty(most_tiles(total, held, size), WORDS_OF_TILE.value, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    choice = _launch_choose(scores, load, rule, count, live, pdl)
    if tokens:
        pdl = pdl and not interpreted()
        at_once = next((size for size in PAIRS_AT_ONCE if total <= size), PAIRS_AT_ONCE[-1])
        _sort[(experts,)](
            choice.chosen, pairs, tiles, count, load, total, first_held, HELD=held, SIZE=size, BLOCK=at_once, PDL=pdl,
            num_warps=warps_for(at_once), launch_pdl=pdl,
        )  # fmt: skip
    return Routing(choice.chosen, choice.weights, choice.gates, pairs, tiles, count, size)


def _launch_choose(
    scores: Tensor, load: Tensor, rule: Rule, count: Tensor | None, live: Tensor | None, pdl: bool
) -> Choice:  # fmt: skip
    """count: of the tiles that `_sort` will make; None: it does not follow."""
    tokens, experts, device = scores.shape[0], len(load), scores.device
    chosen = torch.empty(tokens, rule.per_token, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, rule.per_token, dtype=torch.float32, device=device)
    gates = torch.empty(tokens, dtype=torch.float32, device=device) if scores.shape[1] > experts else None
    if tokens:
        pdl = pdl and not interpreted()
        block = triton.next_power_of_2(experts)
        _choose[(tokens,)](
            scores, scores if live is None else live, chosen, weights, weights if gates is None else gates,
            chosen if count is None else count, load, scores.stride(0), EXPERTS=experts, BLOCK=block, TOP=rule.per_token,
            PLACES=triton.next_power_of_2(rule.per_token), OF_ALL=rule.of_all, NORMALIZED=rule.normalized,
            LIVE=live is not None, SHARED=gates is not None, SORTED=count is not None, PDL=pdl, num_warps=warps_for(block),
            launch_pdl=pdl,
        )  # fmt: skip
    return Choice(chosen, weights, gates)
