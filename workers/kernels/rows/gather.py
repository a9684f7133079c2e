"""What each rank of a host has, on every rank, through their joined memory.

    a piece:   to all others ─ from all others, in rank order

Bytes are copied as they are, whatever they stand for. Imports torch and triton. Runs as `reduce` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import warps_for
from workers.kernels.rows.peers import PROGRAMS, TRIES, WORD_BYTES, Peers, end_turn, inbox_of, look, receive, send, turn_of

LEAST_WORDS = 512
"""Of a piece: many small ones keep many multiprocessors at copying, and the wait is the same for all of them."""

ALIGNED = 16
"""Words: so that every piece begins where wide loads and stores may."""


@triton.jit(do_not_specialize=["rank"])
def _gather_piece(x, out, inboxes, turns, given_up, words, each, apart, packets, rank, RANKS: tl.constexpr, BLOCK: tl.constexpr,
                  TRIES: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """One program copies one piece of every rank. words: x; each: a piece; apart: from one rank's to the next one's in an
    inbox, in packets."""
    within = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * each + within
    inside = (within < each) & (at < words)
    turn = turn_of(turns)
    mine = tl.load(x + at, mask=inside, other=0)
    for ahead in tl.static_range(1, RANKS):
        send(inbox_of(inboxes, (rank + ahead) % RANKS, packets, turn) + rank * apart + at, mine, inside, turn)
    own = inbox_of(inboxes, rank, packets, turn) + at
    looks = ()
    for ahead in tl.static_range(1, RANKS):
        looks = looks + (look(own + (rank + ahead) % RANKS * apart, inside),)  # type: ignore[assignment]  # noqa: RUF005
    to = out + at
    tl.store(to + rank.to(tl.int64) * words, mine, mask=inside)
    for ahead in tl.static_range(1, RANKS):
        peer = (rank + ahead) % RANKS
        came = receive(looks[ahead - 1], own + peer * apart, inside, turn, given_up, TRIES)
        tl.store(to + peer.to(tl.int64) * words, came, mask=inside)
    end_turn(turns, turn, PROGRAMS)


def gather(peers: Peers, x: Tensor) -> Tensor:
    """x, contiguous, of every rank, all of one shape and dtype -> [ranks, *x.shape], by as many launches as it takes."""
    out = x.new_empty(peers.size, *x.shape)
    if not x.numel():
        return out
    if x.nbytes % WORD_BYTES or x.data_ptr() % WORD_BYTES:
        padded = torch.zeros(triton.cdiv(x.nbytes, WORD_BYTES) * WORD_BYTES, dtype=torch.uint8, device=x.device)
        padded[: x.nbytes] = x.view(-1).view(torch.uint8)
        out.view(peers.size, -1).view(torch.uint8)[:] = gather(peers, padded)[:, : x.nbytes]
        return out
    flat, gathered = x.view(-1).view(torch.int32), out.view(peers.size, -1).view(torch.int32)
    most = peers.packets // peers.size // ALIGNED * ALIGNED
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
    each = max(_aligned(triton.cdiv(len(flat), PROGRAMS)), LEAST_WORDS)
    block = triton.next_power_of_2(each)
    _gather_piece[(triton.cdiv(len(flat), each),)](
        flat, out, peers.inboxes, peers.turns, peers.given_up, len(flat), each, _aligned(len(flat)),
        peers.packets, peers.rank, RANKS=peers.size, BLOCK=block, TRIES=TRIES, PROGRAMS=PROGRAMS, num_warps=warps_for(block),
    )  # fmt: skip


def _aligned(words: int) -> int:
    return int(triton.cdiv(words, ALIGNED)) * ALIGNED
