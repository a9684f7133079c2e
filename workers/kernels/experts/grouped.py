"""The products of all experts with their tokens, one launch each: gate and up with SwiGLU, down with the token's weight for the
expert; and the sum over a token's experts, in the order of their scores.

A program takes a tile of pairs (`route`) and some rows of its expert's matrix, so only experts that have tokens are read. Rows
of W are the matrix unit's first dimension and tokens its second, of which 8 are enough. No sum is made by atomics: within one
tiling a token's bits do not depend on which other tokens there are. Imports torch and triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.experts.dense import DenseTiling, dense_product, takes
from workers.kernels.experts.fewer import four_bit_sums
from workers.kernels.experts.gating import Clamp, activated
from workers.kernels.experts.route import WORDS_OF_TILE, Added, Choice, Routing
from workers.kernels.experts.stacked import FOUR_BITS, Operand, Stacked, Weight, operand
from workers.kernels.launch import enter, interpreted
from workers.kernels.products.expand import expanded
from workers.kernels.products.four_bits import in_fours
from workers.kernels.products.widen import of_fp8

SUM_BLOCK = 1024
LEAST_TO_EXPAND = {"fp8": 200, "int4": 72, "mxfp4": 96}
"""Pairs of an expert, on average, from which on its matrix is widened before the product: where the two took as long on an
H200, of MXFP4 as is likely."""

MOST_TO_SCALE_SUMS = tl.constexpr(32)  # pairs of a tile, up to which they have fewer sums than W has numbers by far
MOST_EXPANDED_BYTES = 5 << 28
NEIGHBOURS = tl.constexpr(8)  # tiles whose programs for the same rows run together: W is in the L2 cache for an expert's others


@dataclass(frozen=True, slots=True)
class GroupedTiling:
    """How one product is cut: rows of W that a program takes (with SwiGLU of each half), columns that it takes at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_size(tokens: int, per_token: int, experts: int) -> int:
    """Pairs of a tile. No expert has more than `tokens`; where these are many, twice as many as an expert has on average, so
    that most experts are read once."""
    mean = tokens * per_token // experts
    for size in (8, 16, 32, 64):
        if tokens <= size or (size > 8 and 2 * mean <= size):
            return size
    return 128


def choose_tiling(size: int, dtype: torch.dtype, gated: bool, w: Operand | None = None) -> GroupedTiling:
    """By shape alone; never more than 96 KiB of shared memory. w: in fewer bits."""
    if w is not None:
        return _tiling_of_fewer(size, dtype, gated, w)
    if dtype == torch.float32:
        return GroupedTiling(32, 32, 4, 2)
    if size > 64:
        return GroupedTiling(64 if gated else 128, 64, 8, 3)
    if size > 32:
        return GroupedTiling(64, 64, 4, 4)
    if not gated:
        return GroupedTiling(64, 128, 4, 3)
    return GroupedTiling(64, 64, 4, 3) if size > 16 else GroupedTiling(32, 128, 4, 3)


def _tiling_of_fewer(size: int, dtype: torch.dtype, gated: bool, w: Operand) -> GroupedTiling:
    """Columns that are read at a time share a scale, of four bits those of each quarter. Sums that scales are applied to take
    registers, as do numbers of FP8, which are widened all at once."""
    most = 256 if w.kind == "int4" and size <= 16 else 128
    columns = min(most, w.span if w.kind in FOUR_BITS else w.group or most)
    if dtype == torch.float32:
        return GroupedTiling(32, min(128, columns), 4, 2)
    if size <= 16:
        return _of_few(size, gated, w.kind, columns)
    if gated and size > 32 and (w.kind == "int4" or (w.kind == "fp8" and size > 64)):
        columns = min(64, columns)
    if size > 64:
        return GroupedTiling(64 if w.kind == "int4" else 128, columns, 8, 2 if gated and w.kind == "mxfp4" else 3)
    return GroupedTiling(128 if size < 64 and not gated and w.kind in FOUR_BITS else 64, columns, 4, 3)


def _of_few(size: int, gated: bool, kind: str, columns: int) -> GroupedTiling:
    """The best of a sweep on an H200: small programs, of which there are more."""
    if kind == "int4":
        return GroupedTiling(32, columns, 2, 3) if gated and size == 8 else GroupedTiling(64, columns, 4, 3)
    if kind == "fp8":
        return GroupedTiling(32 if gated else 64, columns, 2, 3)
    return GroupedTiling(64, columns, 2 if size == 8 and not gated else 4, 3)


@triton.jit
def _weights(weight, scales, rows, start, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
             GROUP: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """COLUMNS of W's rows from `start` on, zero beyond K, as numbers of DTYPE; FP8 is scaled by GROUP, if that is not 0."""
    columns = start + tl.arange(0, COLUMNS)
    at = weight + rows[:, None] * K + columns[None, :]
    tile = tl.load(at) if K % COLUMNS == 0 else tl.load(at, mask=(columns < K)[None, :], other=0.0)
    return of_fp8(tile, scales, rows, start, GROUP, K, ROWS, COLUMNS).to(DTYPE) if KIND == "fp8" else tile


@triton.jit
def _added(sums, numbers, a, scales, rows, start, K: tl.constexpr, GROUP: tl.constexpr, LATER: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """sums and the product of what `_weights` has given; LATER: times the scale that its columns share."""
    if LATER:
        scale = tl.load(scales + rows * (K // GROUP) + start // GROUP).to(tl.float32)
        sums += tl.dot(numbers, a, input_precision=PRECISION) * scale[:, None]
    else:
        sums = tl.dot(numbers, a, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _product(x, weight, bias, shares, added, slots, out, pairs, tiles, count, scales, zeros, x_stride, alpha, limit,
             N: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             STAGES: tl.constexpr, GATED: tl.constexpr, IN_TURNS: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr,
             ADDED: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, FOURS: tl.constexpr,
             PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: a tile's pairs times ROWS rows of its expert's W, with GATED as many of gate and of up. N: of the output.
    weight, scales, zeros, KIND, GROUP, SPAN: as `Operand` has them; FOURS, and with it scales and zeros: as `in_fours` does.
    ADDED, and with it added, slots: as `Added` has them."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    within = tl.program_id(0) % (BLOCKS * NEIGHBOURS)
    tile = tl.program_id(0) // (BLOCKS * NEIGHBOURS) * NEIGHBOURS + within % NEIGHBOURS
    enter(PDL)
    if tile >= tl.load(count):
        return
    expert = tl.load(tiles + tile * WORDS_OF_TILE).to(tl.int64)
    first = tl.load(tiles + tile * WORDS_OF_TILE + 1)
    place = tl.arange(0, SIZE)
    there = place < tl.load(tiles + tile * WORDS_OF_TILE + 2)
    place += first
    pair = tl.load(pairs + place, mask=there, other=0)
    row = within // NEIGHBOURS * ROWS + tl.arange(0, ROWS)
    safe = row if N % ROWS == 0 else tl.minimum(row, N - 1)
    HALVES: tl.constexpr = 2 if GATED else 1
    one = 2 * safe if IN_TURNS else safe
    other = one + 1 if IN_TURNS else one + N
    rows, others = expert * (HALVES * N) + one, expert * (HALVES * N) + other  # among those of all experts
    source = (pair // TOP if GATED else place).to(tl.int64)

    if KIND == "int4" or KIND == "mxfp4":
        sums, ups = four_bit_sums(x, weight, scales, zeros, rows, others, source, there, x_stride, K, ROWS, SIZE, COLUMNS,
                                  STAGES, GATED, KIND, GROUP, SPAN, FOURS, PRECISION)  # fmt: skip
    else:
        DTYPE: tl.constexpr = x.dtype.element_ty
        LATER: tl.constexpr = KIND == "fp8" and GROUP >= COLUMNS and SIZE <= MOST_TO_SCALE_SUMS
        NOW: tl.constexpr = 0 if LATER else GROUP
        column = tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, SIZE], tl.float32)
        ups = sums
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            now = start + column
            mask = there[None, :] if K % COLUMNS == 0 else there[None, :] & (now < K)[:, None]
            a = tl.load(x + source[None, :] * x_stride + now[:, None], mask=mask, other=0.0)
            mine = _weights(weight, scales, rows, start, K, ROWS, COLUMNS, KIND, NOW, DTYPE)
            sums = _added(sums, mine, a, scales, rows, start, K, GROUP, LATER, PRECISION)
            if GATED:
                beside = _weights(weight, scales, others, start, K, ROWS, COLUMNS, KIND, NOW, DTYPE)
                ups = _added(ups, beside, a, scales, others, start, K, GROUP, LATER, PRECISION)

    if ADDED:
        adapted = (tl.load(slots + pair // TOP, mask=there, other=-1) >= 0)[None, :] & (row < N)[:, None]
        more = added + place.to(tl.int64)[None, :] * (HALVES * N) + row[:, None]
    total = sums
    if KIND == "fp8" and GROUP == 0:
        total *= tl.load(scales + rows).to(tl.float32)[:, None]
    if ADDED:
        total += tl.load(more, mask=adapted, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + rows).to(tl.float32)[:, None]
    if GATED:
        up = ups
        if KIND == "fp8" and GROUP == 0:
            up *= tl.load(scales + others).to(tl.float32)[:, None]
        if ADDED:
            up += tl.load(more + N, mask=adapted, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias + others).to(tl.float32)[:, None]
        total = activated(total, up, alpha, limit, CLAMPED)
        to = place.to(tl.int64)
    else:
        total *= tl.load(shares + pair, mask=there, other=0.0)[None, :]
        to = pair.to(tl.int64)
    mask = there[None, :] & (row < N)[:, None]
    tl.store(out + to[None, :] * N + row[:, None], total.to(out.dtype.element_ty), mask=mask)


def gate_up(
    x: Tensor, weight: Weight, routing: Routing, *, bias: Tensor | None = None, in_turns: bool = False,
    clamp: Clamp | None = None, added: Added | None = None, pdl: bool = False,
    tiling: GroupedTiling | DenseTiling | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, K], weight [held, 2 * N, K], bias [held, 2 * N] -> SwiGLU of each pair of a held expert,
    [pairs, N] in the order of `routing.pairs`; what lies behind is undefined. in_turns: W's rows are gate, up, gate, ..."""
    out = torch.empty(len(routing.pairs), weight.shape[1] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, added, out, routing, True, in_turns, clamp, pdl, tiling)
    return out


def down(
    x: Tensor, weight: Weight, routing: Routing, *, bias: Tensor | None = None, added: Added | None = None, pdl: bool = False,
    tiling: GroupedTiling | DenseTiling | None = None,
) -> Tensor:  # fmt: skip
    """x [pairs, K] as `gate_up` gives it, weight [held, N, K], bias [held, N] -> each pair's product times the
    token's weight for the expert, [tokens * per_token, N] by pair; what is of no held expert is undefined."""
    out = torch.empty(len(routing.pairs), weight.shape[1], dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, added, out, routing, False, False, None, pdl, tiling)
    return out


def _pays_to_expand(x: Tensor, weight: Stacked, routing: Routing) -> bool:
    """Whether the experts have so many pairs that it takes less to write their numbers into memory, where the copy engine finds
    them, than to widen them in each tile anew. The numbers are there for this product alone."""
    experts, rows, columns = weight.shape
    if not takes(x, columns, routing) or experts * rows * columns * x.itemsize > MOST_EXPANDED_BYTES:
        return False
    return len(routing.pairs) >= LEAST_TO_EXPAND[weight.matrix.kind] * experts


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, added: Added | None, out: Tensor, routing: Routing, gated: bool,
    in_turns: bool, clamp: Clamp | None, pdl: bool, tiling: GroupedTiling | DenseTiling | None,
) -> None:  # fmt: skip
    if not len(out):
        return
    pdl = pdl and not interpreted()
    if tiling is None and isinstance(weight, Stacked) and _pays_to_expand(x, weight, routing):
        weight = expanded(weight.matrix, x.dtype).view(weight.shape)
    if isinstance(weight, Tensor) and (
        isinstance(tiling, DenseTiling) or (tiling is None and takes(x, weight.shape[2], routing))
    ):
        dense_product(x, weight, bias, added, out, routing, gated, in_turns, clamp, pdl, tiling)
        return
    assert not isinstance(tiling, DenseTiling), "of plain numbers"
    w = operand(weight)
    tiling = tiling or choose_tiling(routing.size, x.dtype, gated, None if isinstance(weight, Tensor) else w)
    scales, zeros, fours = in_fours(w.scales, w.zeros, w.group, w.span) if w.kind == "int4" else (w.scales, w.zeros, 0)
    n = out.shape[1]
    tiles = triton.cdiv(len(routing.tiles), NEIGHBOURS.value) * NEIGHBOURS.value
    _product[(tiles * triton.cdiv(n, tiling.rows),)](
        x, w.values, w.values if bias is None else bias, routing.weights, out if added is None else added.numbers,
        routing.pairs if added is None else added.slots, out, routing.pairs, routing.tiles, routing.count, scales, zeros,
        x.stride(0), clamp.alpha if clamp else 0.0, clamp.limit if clamp else 0.0, N=n, K=x.shape[1],
        TOP=routing.per_token, SIZE=routing.size, ROWS=tiling.rows, COLUMNS=tiling.columns, STAGES=tiling.stages, GATED=gated,
        IN_TURNS=in_turns, CLAMPED=clamp is not None, BIAS=bias is not None, ADDED=added is not None, KIND=w.kind,
        GROUP=w.group, SPAN=w.span, FOURS=fours, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=tiling.warps, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_held"])
def _sum(parts, chosen, gates, shared, out, first_held, shared_stride, out_stride, WIDTH: tl.constexpr, TOP: tl.constexpr,
         HELD: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: BLOCK numbers of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    enter(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(TOP):
        pair = token * TOP + number
        held = tl.load(chosen + pair) - first_held
        mine = tl.where((held >= 0) & (held < HELD), WIDTH, 0)
        total += tl.load(parts + pair * WIDTH + at, mask=at < mine, other=0.0).to(tl.float32)
    if SHARED:
        whole = tl.load(shared + token * shared_stride + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(gates + token) * whole
    if RESIDUAL:
        total += tl.load(out + token * out_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + at, total.to(out.dtype.element_ty), mask=inside)


def add_up(
    parts: Tensor, routing: Choice, *, held: int, first_held: int = 0, shared: Tensor | None = None,
    residual: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """parts as `down` gives them -> [tokens, width]: the sum over each token's held experts, in float32 and rounded once.

    shared [tokens, width]: is added times `routing.gates`. residual [tokens, width]: the sum is added to it, in place.
    """
    tokens, width = len(routing.chosen), parts.shape[1]
    out = residual if residual is not None else torch.empty(tokens, width, dtype=parts.dtype, device=parts.device)
    if tokens:
        pdl = pdl and not interpreted()
        of_all = parts if shared is None else shared
        _sum[(tokens, triton.cdiv(width, SUM_BLOCK))](
            parts, routing.chosen, routing.weights if routing.gates is None else routing.gates, of_all, out, first_held,
            of_all.stride(0), out.stride(0), WIDTH=width, TOP=routing.per_token, HELD=held, BLOCK=SUM_BLOCK,
            SHARED=shared is not None, RESIDUAL=residual is not None, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
    return out
