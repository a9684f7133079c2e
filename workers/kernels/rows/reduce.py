"""Sums over the ranks of one host, each of which writes to the others' memory: one launch, alone or with what follows a
product, the residual's sum and RMSNorm.

    a row:   to all others ─ from all others, summed in rank order [─ + residual ─ norm]

One program has one row on all ranks, and it waits for its like on the other ranks (`peers`), not for whole kernels.

With TWO_SHOT each rank gets a share of the row, sums that and sends the sum to all: twice the wait, but each rank sends two
rows, not one to each. Sums are in float32, in rank order, rounded once, the same bits on every rank as `sum_in_rank_order`.

Imports torch and triton. Runs on CUDA, or on memory that processes share under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.launch import interpreted, warps_for
from workers.kernels.rows.peers import (
    PROGRAMS,
    TRIES,
    WORD_BYTES,
    Peers,
    end_turn,
    inbox_of,
    look,
    numbers_of,
    receive,
    send,
    turn_of,
    words_of,
)

ONE_SHOT_BYTES = 256 << 10
"""Above that, of more than two ranks, a second wait costs less than every rank sending a whole row to every other."""

ALIGNED = 4
"""Words: what a row and a share are rounded up to in an inbox, so that packets are written and read two at a time."""

ROW_BYTES = 16 << 10
"""Of the rows that a large sum is cut into."""


@triton.jit(do_not_specialize=["rank", "rows"])
def _sum_row(x, out, hidden, weight, inboxes, turns, given_up, x_stride, out_stride, hidden_stride, eps, rank, rows,
             packets, RANKS: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, SHARE: tl.constexpr,
             BLOCK: tl.constexpr, SHARE_BLOCK: tl.constexpr, TWO_SHOT: tl.constexpr, NORM: tl.constexpr, TRIES: tl.constexpr,
             PROGRAMS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program sums one row over all ranks. ROW, SHARE: words that a row, or a rank's share of it, has in an inbox. BLOCK,
    SHARE_BLOCK: numbers. The next kernel may start when all has come, not before: it could take the place of a program that
    another rank on this device waits for."""
    row = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    if NORM:
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    turn = turn_of(turns)
    if TWO_SHOT:
        total = _two_shot(x + row * x_stride, row, inboxes, rows, packets, turn, given_up, rank, RANKS, WIDTH, SHARE, BLOCK,
                          SHARE_BLOCK, TRIES)  # fmt: skip
    else:
        mine = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
        total = _one_shot(mine, row, inboxes, rows, packets, turn, given_up, rank, RANKS, WIDTH, ROW, BLOCK, TRIES)
    if PDL:
        gdc_launch_dependents()
    end_turn(turns, turn, PROGRAMS)
    if NORM:
        value = tl.load(hidden + row * hidden_stride + at, mask=inside, other=0.0).to(tl.float32) + total.to(tl.float32)
        rounded = value.to(kind)
        tl.store(hidden + row * hidden_stride + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
        power = tl.sum(value * value, 0) / WIDTH
        total = (value * tl.rsqrt(power + eps) * scale).to(kind)
    tl.store(out + row * out_stride + at, total, mask=inside)


@triton.jit
def _one_shot(mine, row, inboxes, rows, packets, turn, given_up, rank, RANKS: tl.constexpr, WIDTH: tl.constexpr,
              ROW: tl.constexpr, BLOCK: tl.constexpr, TRIES: tl.constexpr):  # fmt: skip
    """An inbox: [rank it is from, rows, ROW]."""
    each: tl.constexpr = 32 // mine.dtype.primitive_bitwidth  # numbers of a word
    at = tl.arange(0, BLOCK // each)
    inside = at < (WIDTH + each - 1) // each
    words = words_of(mine, BLOCK)
    places = row * ROW + at
    for ahead in tl.static_range(1, RANKS):  # each rank begins with another
        target = inbox_of(inboxes, (rank + ahead) % RANKS, packets, turn)
        send(target + rank * rows * ROW + places, words, inside, turn)
    own = inbox_of(inboxes, rank, packets, turn)
    return _sum_ranks(words, own, rows * ROW, places, inside, turn, given_up, rank, RANKS, mine.dtype, BLOCK, TRIES)


@triton.jit
def _two_shot(x, row, inboxes, rows, packets, turn, given_up, rank, RANKS: tl.constexpr, WIDTH: tl.constexpr,
              SHARE: tl.constexpr, BLOCK: tl.constexpr, SHARE_BLOCK: tl.constexpr, TRIES: tl.constexpr):  # fmt: skip
    """An inbox: parts [rank they are from, rows, SHARE], then sums [rows, rank they are from, SHARE]. x: of the row."""
    kind: tl.constexpr = x.dtype.element_ty
    each: tl.constexpr = 32 // kind.primitive_bitwidth  # numbers of a word
    numbers: tl.constexpr = SHARE * each
    width: tl.constexpr = (WIDTH + each - 1) // each  # words
    at = tl.arange(0, SHARE_BLOCK)
    words_at = tl.arange(0, SHARE_BLOCK // each)
    places = row * SHARE + words_at
    for ahead in tl.static_range(1, RANKS):  # each rank begins with another
        peer = (rank + ahead) % RANKS
        shared = (at < numbers) & (peer * numbers + at < WIDTH)
        theirs = tl.load(x + peer * numbers + at, mask=shared, other=0.0)
        words_shared = (words_at < SHARE) & (peer * SHARE + words_at < width)
        target = inbox_of(inboxes, peer, packets, turn)
        send(target + rank * rows * SHARE + places, words_of(theirs, SHARE_BLOCK), words_shared, turn)
    own = inbox_of(inboxes, rank, packets, turn)
    mine = tl.load(x + rank * numbers + at, mask=(at < numbers) & (rank * numbers + at < WIDTH), other=0.0)
    words_mine = (words_at < SHARE) & (rank * SHARE + words_at < width)
    part = _sum_ranks(words_of(mine, SHARE_BLOCK), own, rows * SHARE, places, words_mine, turn, given_up, rank, RANKS, kind,
                      SHARE_BLOCK, TRIES)  # fmt: skip
    sums = (RANKS * rows + row * RANKS) * SHARE
    for ahead in tl.static_range(1, RANKS + 1):  # and to itself
        target = inbox_of(inboxes, (rank + ahead) % RANKS, packets, turn)
        send(target + sums + rank * SHARE + words_at, words_of(part, SHARE_BLOCK), words_mine, turn)
    row_at = tl.arange(0, BLOCK // each)
    inside = row_at < width
    came = receive(look(own + sums + row_at, inside), own + sums + row_at, inside, turn, given_up, TRIES)
    return numbers_of(came, kind, BLOCK)


@triton.jit
def _sum_ranks(mine, inbox, apart, places, inside, turn, given_up, rank, RANKS: tl.constexpr, kind: tl.constexpr,
               NUMBERS: tl.constexpr, TRIES: tl.constexpr):  # fmt: skip
    """mine: words. apart: packets from one rank's to the next one's in the inbox. All are looked at first, since a look takes
    most of a microsecond, and then again those that had not come."""
    looks = ()
    for peer in tl.static_range(RANKS):
        theirs = inside & (tl.full(inside.shape, peer, tl.int32) != rank)
        looks = looks + (look(inbox + peer * apart + places, theirs),)  # type: ignore[assignment]  # noqa: RUF005
    total = tl.zeros((NUMBERS,), dtype=tl.float32)
    for peer in tl.static_range(RANKS):
        theirs = inside & (tl.full(inside.shape, peer, tl.int32) != rank)
        came = receive(looks[peer], inbox + peer * apart + places, theirs, turn, given_up, TRIES)
        total += numbers_of(tl.where(theirs, came, mine), kind, NUMBERS).to(tl.float32)
    return total.to(kind)


def takes(peers: Peers, x: Tensor) -> bool:
    """Whether one launch sums x [rows, width]."""
    return x.dim() == 2 and x.dtype.itemsize in (2, 4) and len(x) <= _most_rows(peers, *_form(peers, x))


def sum_all(peers: Peers, x: Tensor) -> None:
    """x, contiguous, of any shape, of 2 or 4 bytes, of every rank -> their sum, in x: by as many launches as it takes."""
    if takes(peers, x):
        sum_rows(peers, x)
        return
    row = min(ROW_BYTES // WORD_BYTES, peers.packets // peers.size // ALIGNED * ALIGNED)
    flat, width = x.view(-1), row * WORD_BYTES // x.itemsize
    whole = len(flat) // width * width
    rows = flat[:whole].view(-1, width)
    at_once = _most_rows(peers, *_form(peers, rows))
    for first in range(0, len(rows), at_once):
        sum_rows(peers, rows[first : first + at_once])
    if whole < len(flat):
        sum_rows(peers, flat[None, whole:])


def sum_rows(peers: Peers, x: Tensor, *, two_shot: bool | None = None, pdl: bool = False) -> Tensor:
    """x [rows, width] of every rank -> their sum, in x. All ranks call it with the same shape, and all alike.

    two_shot: None for what pays.
    """
    return _launch(peers, x, x, x, x, 0.0, two_shot, pdl, norm=False)


def sum_add_rms_norm(
    peers: Peers, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, *, two_shot: bool | None = None, pdl: bool = False
) -> Tensor:  # fmt: skip
    """As `sum_rows`, then as `add_rms_norm`: hidden [rows, width] += the sum, in place -> the norm of that, [rows, width]."""
    return _launch(peers, x, torch.empty_like(hidden), hidden, weight, eps, two_shot, pdl, norm=True)


def _form(peers: Peers, x: Tensor, two_shot: bool | None = None) -> tuple[int, int, bool]:
    """Words that a row has in an inbox, and a share of it, and whether in two shots."""
    words = _aligned(triton.cdiv(x.shape[1] * x.itemsize, WORD_BYTES))
    if two_shot is None:
        two_shot = peers.size > 2 and x.nbytes > ONE_SHOT_BYTES
    enough = words >= ALIGNED * peers.size * peers.size  # no rank's share is empty, so each has something from every other
    return words, _aligned(triton.cdiv(words, peers.size)), two_shot and enough


def _aligned(words: int) -> int:
    return int(triton.cdiv(words, ALIGNED)) * ALIGNED


def _most_rows(peers: Peers, row: int, share: int, two_shot: bool) -> int:
    """Of one launch."""
    packets = 2 * peers.size * share if two_shot else peers.size * row
    return min(PROGRAMS, peers.packets // packets)


def _launch(
    peers: Peers, x: Tensor, out: Tensor, hidden: Tensor, weight: Tensor, eps: float, two_shot: bool | None, pdl: bool, *,
    norm: bool,
) -> Tensor:  # fmt: skip
    pdl = pdl and not interpreted()
    rows, width = x.shape
    assert x.stride(1) == 1
    row, share, two_shot = _form(peers, x, two_shot)
    assert rows <= _most_rows(peers, row, share, two_shot)
    if rows:
        _sum_row[(rows,)](
            x, out, hidden, weight, peers.inboxes, peers.turns, peers.given_up, x.stride(0), out.stride(0), hidden.stride(0),
            eps, peers.rank, rows, peers.packets, RANKS=peers.size, WIDTH=width, ROW=row, SHARE=share,
            BLOCK=max(2, triton.next_power_of_2(width)),
            SHARE_BLOCK=triton.next_power_of_2(share * WORD_BYTES // x.itemsize), TWO_SHOT=two_shot, NORM=norm, TRIES=TRIES,
            PROGRAMS=PROGRAMS, PDL=pdl, num_warps=warps_for(width), launch_pdl=pdl,
        )  # fmt: skip
    return out
