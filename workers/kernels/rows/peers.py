"""How programs of several ranks send one another numbers, through memory that all of them read and write.

    packet:  4 bytes of numbers │ 4 bytes, the turn       one store of 8 bytes, which a reader sees whole or not at all

A rank writes its packets into the others' inboxes, and a reader looks at its own until each packet has this turn's number. So
there is no word that says that something has come, no fence before it, and no second trip after it. It costs twice the bytes.

An inbox has two halves, taken in turn: who has had a packet of turn n + 1 from a rank knows that this one has done with all of
turn n, whose half is written again at n + 2. So in every launch each rank has something from each other one. Turns are counted
on the device, so a launch may stand in a CUDA graph; all ranks launch the same ones. Turns run over after 2**32, some hours; a
packet's place that was written just then and not since would be taken for a new one.

Imports torch and triton. Runs on CUDA, or on memory that processes share under Triton's interpreter.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Of a launch, at most. All are to be on the device at once where ranks share it: each waits for its like on the others."""

WORD_BYTES, PACKET_BYTES = 4, 8

TRIES = 4096
"""Looks at packets between two looks at the host's word. That is for when nothing comes: a look at the host takes half a
microsecond for each warp of the whole device, one after another (measured, one H200)."""


@dataclass(frozen=True, slots=True)
class Peers:
    """What a rank's kernels need to reach the others. Addresses are this process's own, of its device's or its peers' memory.

    inboxes: [size] int64, of each rank's [2, packets] of 8 bytes, zero at first. turns: [PROGRAMS] int32, zero at first, this
    rank's. given_up: address of an int32 that the host sets where nobody is to be waited for any more; what is received then is
    not known.
    """

    rank: int
    size: int
    packets: int
    inboxes: Tensor
    turns: Tensor
    given_up: int


@triton.jit
def turn_of(turns):
    """This launch's number. `end_turn` has to follow, when all has been received."""
    return tl.load(turns + tl.program_id(0)) + 1


@triton.jit
def end_turn(turns, turn, PROGRAMS: tl.constexpr):
    """Also for programs that this launch has not, but another one may have."""
    each = tl.program_id(0) + tl.arange(0, PROGRAMS) * tl.num_programs(0)
    tl.store(turns + each, turn + tl.zeros((PROGRAMS,), dtype=tl.int32), mask=each < PROGRAMS)


@triton.jit
def inbox_of(inboxes, rank, packets, turn):
    """The half for this turn."""
    whole = tl.load(inboxes + rank).to(tl.pointer_type(tl.int64))
    return tl.multiple_of(whole + (turn & 1).to(tl.int64) * packets, 16)


@triton.jit
def words_of(numbers, NUMBERS: tl.constexpr):
    """[NUMBERS] of 4 bytes, or of 2, whose words have two -> int32 words."""
    if numbers.dtype.primitive_bitwidth == 32:
        words = numbers.to(tl.int32, bitcast=True)
    else:
        first, second = tl.split(tl.reshape(numbers.to(tl.int16, bitcast=True), (NUMBERS // 2, 2)))
        words = (first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)
    return words


@triton.jit
def numbers_of(words, kind: tl.constexpr, NUMBERS: tl.constexpr):
    """The reverse."""
    if kind.primitive_bitwidth == 32:
        numbers = words.to(kind, bitcast=True)
    else:
        both = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        numbers = tl.reshape(both, (NUMBERS,)).to(kind, bitcast=True)
    return numbers


@triton.jit
def send(places, words, inside, turn):
    """places: of packets, in another rank's inbox."""
    tl.store(places, (turn.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF), mask=inside)


@triton.jit
def look(places, inside):
    """Packets in the own inbox, come or not."""
    return tl.load(places, mask=inside, other=0, volatile=True)


@triton.jit
def _missing(packets, inside, turn):
    return tl.max((inside & ((packets >> 32).to(tl.int32) != turn)).to(tl.int32), 0) != 0


@triton.jit
def receive(packets, places, inside, turn, given_up, TRIES: tl.constexpr):
    """packets: as `look` saw them. Looks until all have come -> their words."""
    waiting = _missing(packets, inside, turn)
    while waiting:
        tries = 0
        while waiting & (tries < TRIES):
            packets = look(places, inside)
            waiting = _missing(packets, inside, turn)
            tries += 1
        if waiting:
            waiting = tl.load(given_up.to(tl.pointer_type(tl.int32)), volatile=True) == 0
    return packets.to(tl.int32)
