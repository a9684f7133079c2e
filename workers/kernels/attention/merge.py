"""Partial results of a row's pieces become its output, the pieces in order, a head's sink before them. Imports triton."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.attention.spans import first_peak


@triton.jit
def _add(part, logs, top, weight, acc):
    """One piece [ROWS, BLOCK_DIM] of each row, and the logarithm of its weight [ROWS], to those before it."""
    peak = tl.maximum(top, logs)
    share = tl.exp2(logs - peak)
    factor = tl.exp2(top - peak)
    return peak, weight * factor + share, acc * factor[:, None] + part * share[:, None]


@triton.jit
def merged(partial, lse, sinks, group, entry, pieces, first, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
            BLOCK_DIM: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_DIM]: query heads from `first` of `group` on, its pieces from `entry` on merged in order."""
    head = first + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    top, weight = first_peak(sinks, group * GROUP + head, head < GROUP)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        there = (piece < pieces)[:, None] & (head < GROUP)[None, :]
        row = (entry + piece).to(tl.int64)[:, None] * GROUP + head[None, :]
        # another multiprocessor wrote them: what this one's L1 holds may be older
        part = tl.load(partial + row[:, :, None] * DIM + dims[None, None, :],
                       mask=there[:, :, None] & (dims < DIM)[None, None, :], other=0.0, cache_modifier=".cg")  # fmt: skip
        sums = tl.load(lse + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        peak = tl.maximum(top, tl.max(sums, 0))
        share = tl.exp2(sums - peak[None, :])
        factor = tl.exp2(top - peak)
        weight = weight * factor + tl.sum(share, 0)
        acc = acc * factor[:, None] + tl.sum(part * share[:, :, None], 0)
        top = peak
    return acc / tl.where(head < GROUP, weight, 1.0)[:, None]


@triton.jit
def merge_row(row, pieces, entry, partial, lse, sinks, counters, head, dims, out, out_stride, KV_HEADS: tl.constexpr,
              GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    """Merges the pieces of a row, those from `entry` on, if its last piece was this one."""
    if tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel") == pieces - 1:
        tl.store(counters + row * KV_HEADS + head, 0)
        result = merged(partial, lse, sinks, head, entry, pieces, 0, GROUP, ROWS, DIM, BLOCK_DIM, PIECES)
        heads = tl.arange(0, ROWS)
        whole = out + row.to(tl.int64) * out_stride + head * (GROUP * DIM)
        tl.store(whole + heads[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty),
                 mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :])  # fmt: skip


@triton.jit
def merge_members(members, count, partial, lse, sinks, row_pieces, row_entries, counters, head, out, out_stride,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK_DIM: tl.constexpr):  # fmt: skip
    """Merges those of a set's rows whose last piece this one was, side by side; their pieces in order."""
    lane = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    one = tl.load(members + lane, mask=lane < count, other=0)
    counter = counters + one * KV_HEADS + head
    before = tl.atomic_add(counter, 1, mask=lane < count, sem="acq_rel")
    last = (lane < count) & (before == tl.load(row_pieces + one) - 1)
    tl.store(counter, tl.zeros([ROWS], tl.int32), mask=last)
    member = lane // GROUP
    done = tl.sum(tl.where(member[:, None] == lane[None, :], last.to(tl.int32)[None, :], 0), 1) > 0
    row = tl.load(members + member, mask=done, other=0)
    pieces = tl.where(done, tl.load(row_pieces + row), 0)
    entry = tl.load(row_entries + row) + head * pieces
    top, weight = first_peak(sinks, head * GROUP + lane % GROUP, done)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for piece in range(tl.max(pieces, 0)):
        there = piece < pieces
        place = (entry + piece).to(tl.int64) * GROUP + lane % GROUP
        part = tl.load(partial + place[:, None] * DIM + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        sums = tl.load(lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        top, weight, acc = _add(part, sums, top, weight, acc)
    acc = acc / tl.where(done, weight, 1.0)[:, None]
    at = row.to(tl.int64)[:, None] * out_stride + (head * GROUP + lane % GROUP)[:, None] * DIM + dims[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=done[:, None] & (dims < DIM)[None, :])


@triton.jit
def merge(partial, lse, sinks, out, row_pieces, row_entries, out_stride, GROUP: tl.constexpr, DIM: tl.constexpr,
           BLOCK_DIM: tl.constexpr, PIECES: tl.constexpr, DEPENDENT: tl.constexpr):  # fmt: skip
    """One program: one query head of one row, if the row has several pieces."""
    if DEPENDENT:
        gdc_wait()
    row = tl.program_id(0)
    head = tl.program_id(1)
    pieces = tl.load(row_pieces + row)
    if pieces <= 1:
        return
    entry = tl.load(row_entries + row) + head // GROUP * pieces
    if DEPENDENT:
        gdc_launch_dependents()
    result = merged(partial, lse, sinks, head // GROUP, entry, pieces, head % GROUP, GROUP, 1, DIM, BLOCK_DIM, PIECES)
    dims = tl.arange(0, BLOCK_DIM)
    at = out + row.to(tl.int64) * out_stride + head * DIM + tl.arange(0, 1)[:, None] + dims[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(dims < DIM)[None, :])


@triton.jit
def merge_tile(partial, sums, place, pieces, top, weight, APART: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[ROWS, BLOCK_DIM]: the pieces of a chunk's tile merged in order, from `place` on, APART from one another. top, weight:
    where the softmax begins."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for piece in range(pieces):
        own = (place + piece * APART).to(tl.int64) * ROWS + rows
        part = tl.load(partial + own[:, None] * BLOCK_DIM + dims[None, :], cache_modifier=".cg")
        logs = tl.load(sums + own, cache_modifier=".cg")
        top, weight, acc = _add(part, logs, top, weight, acc)
    return acc / weight[:, None]
