"""What each rank of a host has, on every rank, through their joined memory.

    a piece:   into memory that the others read ─ meet ─ the piece of each rank, in rank order

Bytes are copied as they are, whatever they stand for. Imports torch and triton. Runs as `reduce` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import warps_for
from workers.kernels.rows.peers import TRIES, Peers, meet

LEAST_BYTES = 2048
"""Of a piece: many small ones keep many multiprocessors at reading, and a meeting is the same for all of them."""

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""What bytes are copied as: the widest that fits the part's size and place."""


@triton.jit
def _gather_piece(x, out, parts, words, turns, given_up, rank, rows, row_numbers, numbers, each, RANKS: tl.constexpr,
                  BLOCK: tl.constexpr, TRIES: tl.constexpr):  # fmt: skip
    """One program copies one piece of every rank. row_numbers: how many a place in `parts` has; numbers: x; each: a piece."""
    piece = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = (at < each) & (piece * each + at < numbers)
    turn = tl.load(turns + piece) + 2
    place = (((turn >> 1) & 1).to(tl.int64) * rows + piece) * row_numbers
    mine = tl.load(x + piece * each + at, mask=inside, other=0)
    tl.store(tl.load(parts + rank).to(tl.pointer_type(kind)) + place + at, mine, mask=inside)
    meet(words, piece, rank, turn, given_up.to(tl.pointer_type(tl.int32)), RANKS, TRIES)
    for peer in tl.static_range(RANKS):
        source = tl.load(parts + peer).to(tl.pointer_type(kind)) + place
        theirs = tl.load(source + at, mask=inside, other=0, cache_modifier=".cg")
        tl.store(out + peer * numbers + piece * each + at, theirs, mask=inside)
    tl.store(turns + piece, turn)


def gather(peers: Peers, x: Tensor) -> Tensor:
    """x, contiguous, of every rank, all of one shape and dtype -> [ranks, *x.shape], by as many launches as it takes."""
    out = x.new_empty(peers.size, *x.shape)
    if not x.numel():
        return out
    at = x.storage_offset() * x.itemsize
    word = next(word for word in WORDS if x.nbytes % word.itemsize == 0 and at % word.itemsize == 0)
    flat, gathered = x.view(-1).view(word), out.view(peers.size, -1).view(word)
    most = peers.rows * peers.row_bytes // word.itemsize
    if len(flat) <= most:
        _launch(peers, flat, gathered)
        return out
    for begin in range(0, len(flat), most):
        part = flat[begin : begin + most]
        of_all = part.new_empty(peers.size, len(part))
        _launch(peers, part, of_all)
        gathered[:, begin : begin + most] = of_all
    return out


def _launch(peers: Peers, flat: Tensor, out: Tensor) -> None:
    row_numbers = peers.row_bytes // flat.itemsize
    each = max(triton.cdiv(len(flat), peers.rows), LEAST_BYTES // flat.itemsize)
    each = min(triton.cdiv(each, 16) * 16, row_numbers)  # so that every piece begins where a wide load may
    block = triton.next_power_of_2(each)
    _gather_piece[(triton.cdiv(len(flat), each),)](
        flat, out, peers.parts, peers.words, peers.turns, peers.given_up, peers.rank, peers.rows,
        row_numbers, len(flat), each, RANKS=peers.size, BLOCK=block, TRIES=TRIES, num_warps=warps_for(block),
    )  # fmt: skip
