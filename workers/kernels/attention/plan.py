"""The work list of a step's decodes, made on the device: pieces of about equal length, the longest first.

    unit     a row with the keys that it reads for itself, or a set of rows with the prefix that is read for all of them
    item     one piece of a unit's keys, for one KV head: what one program of the attention does
    entry    where the partial result of a piece of a row goes, if the row has several

Imports triton. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

import triton
import triton.language as tl

from workers.kernels.attention.spans import lowest_seen

FIELDS = 8  # of an item: member, members and KV head, first and last span, keys, pieces, piece, entry
PLANNED_UNITS = 16  # by one program
COMPARED_UNITS = 256  # that it puts them in order with at a time
WRITTEN_ITEMS = 32  # of each unit at a time


@triton.jit
def _skipped(contexts, shared, unit, batch, KEYS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Of units of work, the spans that a row does not read: its set does that for it, or none of them is seen. Where rows see
    a part there are no sets."""
    skipped = tl.load(shared + unit, mask=unit < batch, other=0) // KEYS
    if WINDOW > 0 or CHUNK > 0:
        context = tl.load(contexts + unit, mask=unit < batch, other=0)
        skipped += lowest_seen(tl.maximum(context, 1) - 1, WINDOW, CHUNK) // KEYS
    return skipped


@triton.jit
def _spans(contexts, shared, sets, unit, batch, units, KEYS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Of units of work: rows, without what they skip (at least 1: a row without a context gets zeros), then sets; 0 past the
    last."""
    is_row = unit < batch
    context = tl.load(contexts + unit, mask=is_row, other=0)
    skipped = _skipped(contexts, shared, unit, batch, KEYS, WINDOW, CHUNK)
    tokens = tl.load(sets + (unit - batch) * 3 + 2, mask=(unit >= batch) & (unit < units), other=0)
    return tl.where(is_row, tl.maximum(tl.cdiv(context, KEYS) - skipped, 1), tokens // KEYS)


@triton.jit(do_not_specialize=["batch", "units", "shares", "programs"])
def plan(contexts, shared, sets, items, row_pieces, row_entries, batch, units, shares, programs, KV_HEADS: tl.constexpr,
         KEYS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, UNITS: tl.constexpr,
         COMPARED: tl.constexpr, ITEMS: tl.constexpr):  # fmt: skip
    """Cuts every unit's spans into pieces of at most `share` spans. Each program plans UNITS units; none waits for another.

    Items run from the units with the longest pieces to those with the shortest, then over pieces, then KV heads, so that
    programs that start together read neighbouring memory. At most shares + units * KV_HEADS items have work. A row of
    several pieces, those of its set counted first, has an entry for the partial result of each.
    """
    total = 0
    for begin in range(0, units, COMPARED):
        total += tl.sum(_spans(contexts, shared, sets, begin + tl.arange(0, COMPARED), batch, units, KEYS, WINDOW,
                               CHUNK), 0)  # fmt: skip
    share = tl.maximum(tl.cdiv(total * KV_HEADS, shares), LEAST)

    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    spans = _spans(contexts, shared, sets, unit, batch, units, KEYS, WINDOW, CHUNK)
    pieces = tl.cdiv(spans, share)
    length = tl.cdiv(spans, tl.maximum(pieces, 1))
    start = tl.zeros([UNITS], tl.int32)
    entry = tl.zeros([UNITS], tl.int32)
    planned = 0
    for begin in range(0, units, COMPARED):
        rival = begin + tl.arange(0, COMPARED)
        its_spans = _spans(contexts, shared, sets, rival, batch, units, KEYS, WINDOW, CHUNK)
        its_pieces = tl.cdiv(its_spans, share)
        its_length = tl.cdiv(its_spans, tl.maximum(its_pieces, 1))
        longer = its_length[None, :] > length[:, None]
        ahead = longer | ((its_length[None, :] == length[:, None]) & (rival[None, :] < unit[:, None]))
        start += tl.sum(tl.where(ahead, its_pieces[None, :] * KV_HEADS, 0), 1)
        its_of_row = its_pieces + tl.cdiv(tl.load(shared + rival, mask=rival < batch, other=0) // KEYS, share)
        split = tl.where((rival < batch) & (its_of_row > 1), its_of_row * KV_HEADS, 0)
        entry += tl.sum(tl.where(rival[None, :] < unit[:, None], split[None, :], 0), 1)
        planned += tl.sum(its_pieces, 0) * KV_HEADS

    is_row, is_set = unit < batch, (unit >= batch) & (unit < units)
    first = _skipped(contexts, shared, unit, batch, KEYS, WINDOW, CHUNK)
    done = tl.cdiv(tl.load(shared + unit, mask=is_row, other=0) // KEYS, share)
    tl.store(row_pieces + unit, done + pieces, mask=is_row)
    tl.store(row_entries + unit, entry, mask=is_row)
    at_set = sets + (unit - batch) * 3
    member = tl.where(is_row, unit, tl.load(at_set, mask=is_set, other=0))
    members = tl.load(at_set + 1, mask=is_set, other=1)
    keys = tl.load(contexts + unit, mask=is_row, other=0) + tl.load(at_set + 2, mask=is_set, other=0)
    of_unit = tl.where(is_set, 2, done + pieces)  # a member of a set has a piece of its own besides
    for begin in range(0, tl.max(pieces, 0) * KV_HEADS, ITEMS):
        number = begin + tl.arange(0, ITEMS)[None, :]
        exists = number < (pieces * KV_HEADS)[:, None]
        head = number % KV_HEADS
        piece = number // KV_HEADS
        at = items + (start[:, None] + number) * 8
        low = first[:, None] + piece * spans[:, None] // tl.maximum(pieces, 1)[:, None]
        high = first[:, None] + (piece + 1) * spans[:, None] // tl.maximum(pieces, 1)[:, None]
        piece += done[:, None]
        nothing = tl.zeros([UNITS, ITEMS], tl.int32)
        tl.store(at, nothing + member[:, None], mask=exists)
        tl.store(at + 1, members[:, None] * KV_HEADS + head, mask=exists)
        tl.store(at + 2, low, mask=exists)
        tl.store(at + 3, high, mask=exists)
        tl.store(at + 4, nothing + keys[:, None], mask=exists)
        tl.store(at + 5, nothing + of_unit[:, None], mask=exists)
        tl.store(at + 6, nothing + piece, mask=exists)
        tl.store(at + 7, entry[:, None] + head * of_unit[:, None] + piece, mask=exists)
    for begin in range(planned + tl.program_id(0) * COMPARED, programs, tl.num_programs(0) * COMPARED):
        item = begin + tl.arange(0, COMPARED)
        empty = tl.zeros([COMPARED], tl.int32)
        tl.store(items + item * 8 + 2, empty, mask=item < programs)
        tl.store(items + item * 8 + 3, empty, mask=item < programs)
