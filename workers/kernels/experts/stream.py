"""The experts of up to 4 tokens, in four bits 2: multiplies and adds in float32 while each pair's matrices stream through
registers.

Two launches, from the router's scores to the sum: gate and up of each pair, of the norm of x, with SwiGLU; then down of a
token's pairs, times their weights and added up, with the residual. Every program finds its experts by itself, which takes less
than to wait for a launch that does; some write down the choice for those who come later. Nothing is sorted, and only the chosen
experts are read, by several tokens now and then twice.

    scores ─ wait ─ up:   choice ─ rows of gate and up ─ act
                   └ down: choice ─ first rows of down ─ wait ─ act ─ the other rows ─ residual

Matrices in fewer bits become numbers in registers (`fewer`), and `down` asks for them before it waits, but holds none.
`up` waits for the scores before it lets `down` start, so that `down` may read them before it waits for `up`.
Imports torch and triton.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.experts.fewer import streamed
from workers.kernels.experts.gating import Clamp, activated
from workers.kernels.experts.route import Choice, Rule, choose_one, in_order, next_best
from workers.kernels.experts.stacked import FOUR_BITS, Operand, Weight, operand
from workers.kernels.launch import enter_last, interpreted
from workers.kernels.products.widen import ONE

FEW_TOKENS, FEW_OF_FOUR_BITS = 4, 2
MOST_COLUMNS = 2048  # that `_up` takes at a time of plain numbers
MOST_HELD = 3  # turns of `_down` whose W is in registers before it waits
MOST_UNROLLED = 8  # turns of `_down`
MOST_BEYOND = 8  # one part in so many of what is read at a time may lie beyond the last column


def most_tokens(*weights: Weight) -> int:
    """Up to which experts stream. In four bits their instructions take longer than memory does, for each token anew."""
    return FEW_OF_FOUR_BITS if any(operand(weight).kind in FOUR_BITS for weight in weights) else FEW_TOKENS


@dataclass(frozen=True, slots=True)
class StreamTiling:
    """How one product is cut: rows that a program takes, of `_up` those of gate and as many of up, of `_down` each of all of a
    token's experts; columns that it takes at a time."""

    rows: int
    columns: int
    warps: int
    stages: int = 1  # in fewer bits; 1: what is read at a time goes to registers, and other programs compute meanwhile


FEWER = {
    ("fp8", True): StreamTiling(4, 1024, 2), ("fp8", False): StreamTiling(4, 512, 4),
    ("int4", True): StreamTiling(4, 1024, 1), ("int4", False): StreamTiling(4, 512, 2, 3),
    ("mxfp4", True): StreamTiling(4, 1024, 1), ("mxfp4", False): StreamTiling(2, 1024, 1),
}  # fmt: skip
"""By kind and whether it is gate and up, the best of a sweep on an H200; of columns as many at most."""


def choose_streaming(k: int, gated: bool, w: Operand) -> StreamTiling:
    """By shape alone. k: the numbers of a row."""
    if w.kind != "plain":
        tiling = FEWER[w.kind, gated]
        sizes = tiling.columns, tiling.columns // 2
        fits = (size for size in sizes if -k % size * MOST_BEYOND <= k)
        return replace(tiling, columns=max(w.span, next(fits, min(sizes[-1], int(triton.next_power_of_2(k))))))
    if gated:
        return StreamTiling(4, min(MOST_COLUMNS, int(triton.next_power_of_2(k))), 4)
    return StreamTiling(4, next((size for size in (256, 128) if k % size == 0), min(256, int(triton.next_power_of_2(k)))), 4)


@triton.jit
def _eights(products, A: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr):
    """[A, B, COLUMNS] -> sums of eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(products, [A, B, COLUMNS // 8, 8]), 3)


@triton.jit
def _numbers(at, there, MASKED: tl.constexpr):
    """Of W, in float32, zero where MASKED and not there."""
    if MASKED:
        return tl.load(at, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return tl.load(at, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _left(scores, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """One token's scores in their order, whole in each warp: [WARPS, BLOCK], and whose they are. Past the L1 cache."""
    at = tl.arange(0, BLOCK)[None, :] + tl.zeros([WARPS, 1], tl.int32)
    score = tl.load(scores + at, mask=at < EXPERTS, other=float("-inf"), cache_modifier=".cg")
    return in_order(score, at, EXPERTS), at


@triton.jit(do_not_specialize=["tokens"])
def _up(x, norm_weight, weight, bias, scores, live, chosen, weights, gates, load, out, scales, zeros, x_stride, scores_stride,
        tokens, eps, alpha, limit, one,
        N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
        PLACES: tl.constexpr, OF_ALL: tl.constexpr, NORMALIZED: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr,
        COLUMNS: tl.constexpr, IN_TURNS: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr,
        GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
        PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of gate and as many of up, of one pair. Each of the first: a token's choice. one: `widen.ONE`."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    WHOLE: tl.constexpr = K <= COLUMNS
    enter_last(PDL)
    if tl.program_id(0) < tokens:
        choose_one(tl.program_id(0), scores, live, chosen, weights, gates, load, scores_stride, EXPERTS, BLOCK, TOP, PLACES,
                   OF_ALL, NORMALIZED, LIVE, SHARED, True)  # fmt: skip
        return
    number = tl.program_id(0) - tokens
    pair = number // BLOCKS
    token = (pair // TOP).to(tl.int64)
    if LIVE:
        real = tl.load(live + token)
        if real == 0:
            return
    column = tl.arange(0, COLUMNS)
    source = x + token * x_stride
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.static_range(0, K, COLUMNS):
        plain = tl.load(source + start + column, mask=start + column < K, other=0.0).to(tl.float32)
        squares += plain * plain
    whole = plain * tl.load(norm_weight + column, mask=column < K, other=0.0).to(tl.float32)

    left, at = _left(scores + token * scores_stride, EXPERTS, BLOCK, WARPS)
    found = tl.zeros([WARPS, 1], tl.int32)
    for _ in range(pair % TOP + 1):
        _, found, left = next_best(left, at, 1, BLOCK)
    expert = tl.max(tl.max(found, 1), 0).to(tl.int64)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)

    half = tl.arange(0, 2)[:, None]
    row = number % BLOCKS * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, N - 1)[None, :]
    rows = 2 * safe + half if IN_TURNS else safe + half * N
    if KIND == "plain":
        tile_at = weight + expert * (2 * N * K) + rows.to(tl.int64)[:, :, None] * K
        sums = tl.zeros([2, ROWS, COLUMNS // 8], tl.float32)
        for start in tl.static_range(0, K, COLUMNS):
            a = whole
            if not WHOLE:
                a = tl.load(source + start + column, mask=start + column < K, other=0.0).to(tl.float32)
                a *= tl.load(norm_weight + start + column, mask=start + column < K, other=0.0).to(tl.float32)
            now = (start + column)[None, None, :]
            tile = _numbers(tile_at + now, now < K, K % COLUMNS != 0)
            sums += _eights(tile * a[None, None, :], 2, ROWS, COLUMNS)
        total = tl.sum(sums, 2) * scale
    else:
        of_all = expert * (2 * N) + rows
        x_at, there = source + tl.zeros([1, 1], tl.int32), tl.full([1, 1], 1, tl.int1)
        sums = tl.zeros([2, ROWS, COLUMNS // (16 if KIND == "fp8" else 32)], tl.float32)
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            sums += streamed(weight, scales, zeros, of_all, x_at, there, norm_weight, start, one, 2, ROWS, K, COLUMNS, True,
                             KIND, GROUP, SPAN)  # fmt: skip
        total = tl.sum(sums, 2) * scale
        if GROUP == 0:
            total *= tl.load(scales + of_all).to(tl.float32)
    if BIAS:
        total += tl.load(bias + expert * (2 * N) + rows).to(tl.float32)
    gate = tl.sum(tl.where(half == 0, total, 0.0), 0)
    up = tl.sum(tl.where(half == 1, total, 0.0), 0)
    act = activated(gate, up, alpha, limit, CLAMPED).to(out.dtype.element_ty)
    tl.store(out + pair.to(tl.int64) * N + row, act, mask=row < N)


@triton.jit
def _turn(x, tile, shares, first_pair, start, K: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """What COLUMNS numbers of each of a token's pairs give, times the pairs' weights: [ROWS, PLACES, COLUMNS / 8]."""
    place, column = tl.arange(0, PLACES)[:, None], start + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(x + (first_pair + place) * K + column, mask=(place < TOP) & (column < K), other=0.0).to(tl.float32)
    return _eights(tile * (a * shares[:, None])[None, :, :], ROWS, PLACES, COLUMNS)


@triton.jit
def _tile(base, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)[None, None, :]
    return _numbers(base + column, column < K, K % COLUMNS != 0)


@triton.jit
def _down(x, weight, bias, scores, chosen, weights, gates, shared, out, scales, zeros, scores_stride, shared_stride, out_stride,
          one,
          N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, PLACES: tl.constexpr,
          COLUMNS: tl.constexpr, HELD: tl.constexpr, UNROLLED: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
          KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
          STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of one token, over all of its experts. What it has of W before it waits depends on the scores
    alone, which `_up` has waited for before this one may start."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, N - 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    left, at = _left(scores + token * scores_stride, EXPERTS, BLOCK, WARPS)
    place = tl.arange(0, PLACES)
    experts = tl.zeros([WARPS, PLACES], tl.int32)
    for number in tl.static_range(TOP):
        _, found, left = next_best(left, at, 1, BLOCK)
        experts = tl.where(place[None, :] == number, found, experts)
    expert = tl.max(experts, 0)
    rows = expert.to(tl.int64)[None, :] * N + safe[:, None]
    base = weight + rows[:, :, None] * K
    if HELD > 0:
        tile0 = _tile(base, 0, K, COLUMNS)
    if HELD > 1:
        tile1 = _tile(base, COLUMNS, K, COLUMNS)
    if HELD > 2:
        tile2 = _tile(base, 2 * COLUMNS, K, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    if tl.load(chosen + token * TOP) < 0:
        return
    shares = tl.load(weights + token * TOP + place, mask=place < TOP, other=0.0)
    if KIND == "plain":
        sums = _turn(x, tile0, shares, token * TOP, 0, K, TOP, ROWS, PLACES, COLUMNS)
        if HELD > 1:
            sums += _turn(x, tile1, shares, token * TOP, COLUMNS, K, TOP, ROWS, PLACES, COLUMNS)
        if HELD > 2:
            sums += _turn(x, tile2, shares, token * TOP, 2 * COLUMNS, K, TOP, ROWS, PLACES, COLUMNS)
        if UNROLLED:
            for start in tl.static_range(HELD * COLUMNS, K, COLUMNS):
                tile = _tile(base, start, K, COLUMNS)
                sums += _turn(x, tile, shares, token * TOP, start, K, TOP, ROWS, PLACES, COLUMNS)
        else:
            for start in tl.range(HELD * COLUMNS, K, COLUMNS, num_stages=4):
                tile = _tile(base, start, K, COLUMNS)
                sums += _turn(x, tile, shares, token * TOP, start, K, TOP, ROWS, PLACES, COLUMNS)
        total = tl.sum(tl.sum(sums, 2), 1)
    else:
        x_at, there = x + (token * TOP + place)[None, :] * K, (place < TOP)[None, :]
        sums = tl.zeros([ROWS, PLACES, COLUMNS // (16 if KIND == "fp8" else 32)], tl.float32)
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            sums += streamed(weight, scales, zeros, rows, x_at, there, shares[None, :], start, one, ROWS, PLACES, K, COLUMNS,
                             False, KIND, GROUP, SPAN)  # fmt: skip
        each = tl.sum(sums, 2)
        if GROUP == 0:
            each *= tl.load(scales + rows).to(tl.float32)
        total = tl.sum(each, 1)
    if BIAS:
        parts = tl.load(bias + rows, mask=(place < TOP)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(parts * shares[None, :], 1)
    if SHARED:
        total += tl.load(gates + token) * tl.load(shared + token * shared_stride + safe).to(tl.float32)
    to = out + token * out_stride + row
    total += tl.load(to, mask=row < N, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=row < N)


def few_up(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, scores: Tensor, load: Tensor, rule: Rule, *,
    live: Tensor | None = None, bias: Tensor | None = None, in_turns: bool = False, clamp: Clamp | None = None,
    pdl: bool = False, tiling: StreamTiling | None = None,
) -> tuple[Tensor, Choice]:  # fmt: skip
    """x [tokens, K], of which the RMSNorm is taken; weight [experts, 2 * N, K], bias [experts, 2 * N]; scores, load,
    rule, live as `choose` takes them -> SwiGLU of each pair, [tokens * per_token, N], of padding undefined, and the choice."""
    n, k = weight.shape[1] // 2, weight.shape[2]
    tokens, experts, top = len(x), len(load), rule.per_token
    out = torch.empty(tokens * top, n, dtype=x.dtype, device=x.device)
    chosen = torch.empty(tokens, top, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=x.device)
    gates = torch.empty(tokens, dtype=torch.float32, device=x.device) if scores.shape[1] > experts else None
    pdl = pdl and not interpreted()
    w = operand(weight)
    tiling = tiling or choose_streaming(k, True, w)
    _up[(tokens + tokens * top * triton.cdiv(n, tiling.rows),)](
        x, norm_weight, w.values, w.values if bias is None else bias, scores, scores if live is None else live, chosen, weights,
        weights if gates is None else gates, load, out, w.scales, w.zeros, x.stride(0), scores.stride(0), tokens, eps,
        clamp.alpha if clamp else 0.0, clamp.limit if clamp else 0.0, ONE, N=n, K=k, EXPERTS=experts,
        BLOCK=triton.next_power_of_2(experts), TOP=top, PLACES=triton.next_power_of_2(top), OF_ALL=rule.of_all,
        NORMALIZED=rule.normalized, LIVE=live is not None, SHARED=gates is not None,
        COLUMNS=tiling.columns, IN_TURNS=in_turns, CLAMPED=clamp is not None, BIAS=bias is not None, KIND=w.kind, GROUP=w.group,
        SPAN=w.span, ROWS=tiling.rows, WARPS=tiling.warps, STAGES=tiling.stages, PDL=pdl, num_warps=tiling.warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return out, Choice(chosen, weights, gates)


def few_down(
    x: Tensor, weight: Weight, choice: Choice, scores: Tensor, residual: Tensor, *, bias: Tensor | None = None,
    shared: Tensor | None = None, pdl: bool = False, tiling: StreamTiling | None = None,
) -> None:  # fmt: skip
    """Adds each token's experts to residual [tokens, N], in float32 and rounded once; padding stays as it was.

    x [tokens * per_token, K] and the choice as `few_up` gives them, of the same scores; weight [experts, N, K], bias
    [experts, N]. shared [tokens, N]: is added times `choice.gates`.
    """
    experts, n, k = weight.shape
    top = choice.per_token
    w = operand(weight)
    tiling = tiling or choose_streaming(k, False, w)
    turns = triton.cdiv(k, tiling.columns)
    pdl = pdl and not interpreted()
    added = residual if shared is None else shared
    _down[(len(residual) * triton.cdiv(n, tiling.rows),)](
        x, w.values, w.values if bias is None else bias, scores, choice.chosen, choice.weights,
        choice.weights if choice.gates is None else choice.gates, added, residual, w.scales, w.zeros, scores.stride(0),
        added.stride(0), residual.stride(0), ONE, N=n, K=k, EXPERTS=experts, BLOCK=triton.next_power_of_2(experts), TOP=top,
        PLACES=triton.next_power_of_2(top), COLUMNS=tiling.columns, HELD=min(MOST_HELD, turns) if w.kind == "plain" else 0,
        UNROLLED=turns <= MOST_UNROLLED, BIAS=bias is not None, SHARED=shared is not None, KIND=w.kind, GROUP=w.group,
        SPAN=w.span, ROWS=tiling.rows, WARPS=tiling.warps, STAGES=tiling.stages, PDL=pdl, num_warps=tiling.warps,
        launch_pdl=pdl,
    )  # fmt: skip
