"""Sums over the ranks of one host, each of which reads the others' memory: one launch, alone or with what follows a product,
the residual's sum and RMSNorm.

    a row:   its own part, into memory that the others read ─ meet ─ all parts, summed in rank order [─ + residual ─ norm]

One program has one row on all ranks, and it waits for its like on the other ranks (`peers`), not for whole kernels.

With TWO_SHOT each rank sums a share of the row and writes it to all: each then reads two rows, not as many as there are ranks,
for a second meeting. Sums are in float32, in rank order, rounded once, the same bits on every rank as `sum_in_rank_order`.

Imports torch and triton. Runs on CUDA, or on memory that processes share under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import warps_for
from workers.kernels.rows.peers import TRIES, Peers, meet

ONE_SHOT_BYTES = 256 << 10
"""Above that, of more than two ranks, a second meeting costs less than every rank reading every other's whole part."""


@triton.jit
def _sum_row(x, out, hidden, weight, parts, sums, words, turns, given_up, x_stride, out_stride, hidden_stride, eps, rank, rows,
             row_numbers, RANKS: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
             SHARE_BLOCK: tl.constexpr, TWO_SHOT: tl.constexpr, NORM: tl.constexpr, TRIES: tl.constexpr):  # fmt: skip
    """One program sums one row over all ranks. row_numbers: how many numbers a place in `parts` or `sums` has."""
    row = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    turn = tl.load(turns + row) + 2
    place = (((turn >> 1) & 1).to(tl.int64) * rows + row) * row_numbers
    flag = given_up.to(tl.pointer_type(tl.int32))
    mine = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    tl.store(tl.load(parts + rank).to(tl.pointer_type(kind)) + place + at, mine, mask=inside)
    meet(words, row, rank, turn, flag, RANKS, TRIES)
    if TWO_SHOT:
        share_at = rank * SHARE + tl.arange(0, SHARE_BLOCK)
        shared = (tl.arange(0, SHARE_BLOCK) < SHARE) & (share_at < WIDTH)
        part = tl.zeros((SHARE_BLOCK,), dtype=tl.float32)
        for peer in tl.static_range(RANKS):
            source = tl.load(parts + peer).to(tl.pointer_type(kind)) + place
            part += tl.load(source + share_at, mask=shared, other=0.0, cache_modifier=".cg").to(tl.float32)
        for peer in tl.static_range(RANKS):
            target = tl.load(sums + peer).to(tl.pointer_type(kind)) + place
            tl.store(target + share_at, part.to(kind), mask=shared)
        meet(words, row, rank, turn + 1, flag, RANKS, TRIES)
        own = tl.load(sums + rank).to(tl.pointer_type(kind)) + place
        total = tl.load(own + at, mask=inside, other=0.0, cache_modifier=".cg")
    else:
        wide = tl.zeros((BLOCK,), dtype=tl.float32)
        for peer in tl.static_range(RANKS):
            source = tl.load(parts + peer).to(tl.pointer_type(kind)) + place
            wide += tl.load(source + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        total = wide.to(kind)
    tl.store(turns + row, turn)
    if NORM:
        value = tl.load(hidden + row * hidden_stride + at, mask=inside, other=0.0).to(tl.float32) + total.to(tl.float32)
        rounded = value.to(kind)
        tl.store(hidden + row * hidden_stride + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        power = tl.sum(value * value, 0) / WIDTH
        total = (value * tl.rsqrt(power + eps) * scale).to(kind)
    tl.store(out + row * out_stride + at, total, mask=inside)


def takes(peers: Peers, x: Tensor) -> bool:
    """Whether x [rows, width] has room in the peers' memory."""
    return x.dim() == 2 and len(x) <= peers.rows and x.shape[1] * x.itemsize <= peers.row_bytes


def sum_all(peers: Peers, x: Tensor) -> None:
    """x, contiguous, of any shape, of every rank -> their sum, in x: by as many launches as it takes."""
    if takes(peers, x):
        sum_rows(peers, x)
        return
    flat, width = x.view(-1), peers.row_bytes // x.itemsize
    whole = len(flat) // width * width
    rows = flat[:whole].view(-1, width)
    for first in range(0, len(rows), peers.rows):
        sum_rows(peers, rows[first : first + peers.rows])
    if whole < len(flat):
        sum_rows(peers, flat[None, whole:])


def sum_rows(peers: Peers, x: Tensor, *, two_shot: bool | None = None) -> Tensor:
    """x [rows, width] of every rank -> their sum, in x. All ranks call it with the same shape, and all alike.

    two_shot: None for what pays.
    """
    return _launch(peers, x, x, x, x, 0.0, two_shot, norm=False)


def sum_add_rms_norm(
    peers: Peers, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, *, two_shot: bool | None = None
) -> Tensor:
    """As `sum_rows`, then as `add_rms_norm`: hidden [rows, width] += the sum, in place -> the norm of that, [rows, width]."""
    return _launch(peers, x, torch.empty_like(hidden), hidden, weight, eps, two_shot, norm=True)


def _launch(
    peers: Peers, x: Tensor, out: Tensor, hidden: Tensor, weight: Tensor, eps: float, two_shot: bool | None, *, norm: bool
) -> Tensor:
    assert takes(peers, x)
    assert x.stride(1) == 1
    rows, width = x.shape
    if two_shot is None:
        two_shot = peers.size > 2 and x.nbytes > ONE_SHOT_BYTES
    if rows:
        share = triton.cdiv(width, peers.size)
        _sum_row[(rows,)](
            x, out, hidden, weight, peers.parts, peers.sums, peers.words, peers.turns, peers.given_up, x.stride(0),
            out.stride(0), hidden.stride(0), eps, peers.rank, peers.rows, peers.row_bytes // x.itemsize, RANKS=peers.size,
            WIDTH=width, SHARE=share, BLOCK=triton.next_power_of_2(width), SHARE_BLOCK=triton.next_power_of_2(share),
            TWO_SHOT=two_shot, NORM=norm, TRIES=TRIES, num_warps=warps_for(width),
        )  # fmt: skip
    return out
