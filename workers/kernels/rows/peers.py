"""How programs of several ranks meet, by words in memory that all of them read and write: no kernel waits for a whole other.

Every program of a launch has a place of its own on all ranks, and two in turn, so that one meeting is enough: who has come to
turn n + 1 has read what was there at turn n, whose place is used again at n + 2. Turns are counted on the device, so a launch
may stand in a CUDA graph, and by place, so launches of several kinds and sizes may follow one another; all ranks launch the
same ones. A launch is two turns, whether it meets once or twice: a word that a meeting left out did not write would be taken
for a later one when the count has run over.

Imports torch and triton. Runs on CUDA, or on memory that processes share under Triton's interpreter.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

TRIES = 4096
"""Looks at a peer's word between two looks at the host's, which is far away."""


@dataclass(frozen=True, slots=True)
class Peers:
    """What a rank's kernels need to meet the others. Addresses are this process's own, of its device's or its peers' memory.

    parts, sums: [size] int64, of each rank's [2, rows, row_bytes]; words: [size] int64, of each rank's [rows, size] int32,
    zero at first. turns: [rows] int32, zero at first, this rank's. given_up: address of an int32 that the host sets where
    nobody is to be waited for any more; what a sum is then is not known.
    """

    rank: int
    size: int
    rows: int
    row_bytes: int
    parts: Tensor
    sums: Tensor
    words: Tensor
    turns: Tensor
    given_up: int


@triton.jit
def meet(words, row, rank, turn, given_up, RANKS: tl.constexpr, TRIES: tl.constexpr):
    """Says to the row's program on each rank that this one has come to `turn`, and waits until each has said so. What was
    written before is seen by all after it."""
    tl.debug_barrier()  # the stores of the program's other threads come before what one of them says
    place = row * RANKS
    for peer in tl.static_range(RANKS):
        word = tl.load(words + peer).to(tl.pointer_type(tl.int32)) + place + rank
        tl.atomic_xchg(word, turn, sem="release", scope="sys")
    own = tl.load(words + rank).to(tl.pointer_type(tl.int32)) + place
    for peer in tl.static_range(RANKS):
        behind = tl.atomic_add(own + peer, 0, sem="acquire", scope="sys") - turn
        waiting = behind < 0  # a difference, so that turns may run over
        while waiting:
            tries = 0
            while (behind < 0) & (tries < TRIES):
                behind = tl.atomic_add(own + peer, 0, sem="acquire", scope="sys") - turn
                tries += 1
            waiting = (behind < 0) & (tl.load(given_up, volatile=True) == 0)
    tl.debug_barrier()
