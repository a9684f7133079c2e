"""The products of experts that have many tokens each, in 16 bits, as matrix units like them best: tiles of pairs times tiles of
W, which the device's copy engine (TMA) brings, as it brings the pairs of `down`; those of `up` are gathered, row by row.

A program of `down` takes tiles one after another, and there are as many programs as the device runs at once; one of `up` takes
one. Imports torch and triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.experts.gating import Clamp, activated
from workers.kernels.experts.route import WORDS_OF_TILE, Added, Routing
from workers.kernels.launch import ALIGNED_BYTES, copies_tiles, enter, processors

LEAST_PLACES = 128  # of a tile


@dataclass(frozen=True, slots=True)
class DenseTiling:
    """rows: of W that a program takes (with SwiGLU of each half). columns: that it takes at a time. resident: there are as
    many programs as the device has multiprocessors, and each takes many tiles."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: bool = False


UP, DOWN = DenseTiling(128, 64, 8, 4), DenseTiling(256, 64, 8, 4, resident=True)


def takes(x: Tensor, columns: int, routing: Routing) -> bool:
    """Whether there are enough pairs for it, and device and shapes are those of the copy engine. columns: of W."""
    if routing.size < LEAST_PLACES or x.dtype == torch.float32 or columns * x.itemsize % ALIGNED_BYTES:
        return False
    return copies_tiles(x.device)


@triton.jit
def _near(first, places, SIZE: tl.constexpr):
    """Where a tile's pairs are; where it has fewer than SIZE, the last one again."""
    return first + tl.minimum(tl.arange(0, SIZE), places - 1)


@triton.jit
def _dense(x, acts, weight, bias, shares, added, slots, out, pairs, tiles, count, x_stride, alpha, limit, N: tl.constexpr,
           K: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           STAGES: tl.constexpr, GATED: tl.constexpr, IN_TURNS: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr,
           ADDED: tl.constexpr, FLAT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: every so manieth tile's pairs times ROWS rows of its expert's W, with GATED as many of gate and of up. A
    row IN_TURNS, as `weight` describes it, is one of gate and behind it one of up. ADDED: as in `grouped`."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    HALVES: tl.constexpr = 2 if GATED else 1
    HEIGHT: tl.constexpr = N if IN_TURNS else HALVES * N
    UP_ROW: tl.constexpr = 0 if IN_TURNS else N
    UP_COLUMN: tl.constexpr = K if IN_TURNS else 0
    enter(PDL)
    column = tl.arange(0, COLUMNS)
    for number in tl.range(tl.program_id(0), tl.load(count) * BLOCKS, tl.num_programs(0), flatten=FLAT):
        tile = tiles + number // BLOCKS * WORDS_OF_TILE
        expert, first, places = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        begin = number % BLOCKS * ROWS
        if GATED:
            token = tl.load(pairs + _near(first, places, SIZE)) // TOP
            at = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
        sums = tl.zeros([SIZE, ROWS], tl.float32)
        ups = sums
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            if GATED:
                if K % COLUMNS == 0:
                    a = tl.load(at + start)
                else:
                    a = tl.load(at + start, mask=(start + column < K)[None, :], other=0.0)
            else:
                a = acts.load([first, start])
            sums = tl.dot(a, weight.load([expert * HEIGHT + begin, start]).T, sums)
            if GATED:
                ups = tl.dot(a, weight.load([expert * HEIGHT + UP_ROW + begin, UP_COLUMN + start]).T, ups)
        row = begin + tl.arange(0, ROWS)
        safe = tl.minimum(row, N - 1)
        one = 2 * safe if IN_TURNS else safe
        other = one + 1 if IN_TURNS else one + N
        biases = bias + expert.to(tl.int64) * (HALVES * N)
        if ADDED:
            place = _near(first, places, SIZE)
            adapted = (tl.load(slots + tl.load(pairs + place) // TOP) >= 0)[:, None] & (row < N)[None, :]
            more = added + place.to(tl.int64)[:, None] * (HALVES * N) + row[None, :]
            sums += tl.load(more, mask=adapted, other=0.0).to(tl.float32)
            if GATED:
                ups += tl.load(more + N, mask=adapted, other=0.0).to(tl.float32)
        if BIAS:
            sums += tl.load(biases + one).to(tl.float32)[None, :]
        if GATED:
            if BIAS:
                ups += tl.load(biases + other).to(tl.float32)[None, :]
            sums = activated(sums, ups, alpha, limit, CLAMPED)
            to = _near(first, places, SIZE)
        else:  # only now: what a loop of both carries along takes registers
            to = tl.load(pairs + _near(first, places, SIZE))
            sums *= tl.load(shares + to)[:, None]
        mask = (tl.arange(0, SIZE) < places)[:, None] & (row < N)[None, :]
        tl.store(out + to.to(tl.int64)[:, None] * N + row[None, :], sums.to(out.dtype.element_ty), mask=mask)


def dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Added | None, out: Tensor, routing: Routing, gated: bool,
    in_turns: bool, clamp: Clamp | None, pdl: bool, tiling: DenseTiling | None = None,
) -> None:  # fmt: skip
    """As `gate_up` or `down` of `grouped` have it, into out [pairs, N]."""
    tiling = tiling or (UP if gated else DOWN)
    n, k = out.shape[1], weight.shape[2]
    of_weight = TensorDescriptor.from_tensor(weight.view(-1, 2 * k if in_turns else k), [tiling.rows, tiling.columns])
    acts = of_weight if gated else TensorDescriptor.from_tensor(x, [routing.size, tiling.columns])
    programs = len(routing.tiles) * triton.cdiv(n, tiling.rows)
    if tiling.resident:
        programs = min(programs, 1 if x.device.type == "cpu" else processors(x.device))
    alpha, limit = (clamp.alpha, clamp.limit) if clamp else (0.0, 0.0)
    _dense[(programs,)](
        x, acts, of_weight, weight if bias is None else bias, routing.weights, out if added is None else added.numbers,
        routing.pairs if added is None else added.slots, out, routing.pairs, routing.tiles, routing.count, x.stride(0),
        alpha, limit, N=n, K=k, TOP=routing.per_token, SIZE=routing.size, ROWS=tiling.rows, COLUMNS=tiling.columns,
        STAGES=tiling.stages, GATED=gated, IN_TURNS=in_turns, CLAMPED=clamp is not None, BIAS=bias is not None,
        ADDED=added is not None, FLAT=tiling.resident, PDL=pdl, num_warps=tiling.warps, launch_pdl=pdl,
    )  # fmt: skip
