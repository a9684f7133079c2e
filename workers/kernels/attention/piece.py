"""What one program of decode attention does: a piece of the keys of one row, or of those that the rows of a set share.

Imports triton.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.attention.merge import merge_members, merge_row
from workers.kernels.attention.pairs import attend_pairs
from workers.kernels.attention.spans import attend_spans, first_peak, lowest_seen
from workers.kernels.heads.finite import finite
from workers.kernels.heads.fp8 import stored
from workers.kernels.heads.rope import turned_heads


@triton.jit
def _own_kv(projected, k_weight, turns, pool, table, base, head, context, dims, eps, key_scale, value_scale,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr,
            KV_BLOCK_ROWS: tl.constexpr):  # fmt: skip
    """Writes the key, turned, and the value that stand in one row of the projection to the place of the row's last token."""
    one = tl.arange(0, 1)
    position = context - 1
    key = projected + (HEADS + head) * DIM
    turned = turned_heads(key + one, k_weight, turns + position.to(tl.int64) * (2 * DIM) + one, dims, one == 0, eps, DIM, False)
    inside = (dims < DIM)[None, :]
    value = tl.load(key + KV_HEADS * DIM + one[:, None] + dims[None, :], mask=inside, other=0.0)
    block = tl.load(table + position // KV_BLOCK).to(tl.int64)
    at = pool + ((block * KV_BLOCK_ROWS + base + position % KV_BLOCK) * KV_HEADS + head) * DIM + one[:, None] + dims[None, :]
    turned = turned.to(projected.dtype.element_ty)
    if key_scale is not None:
        turned, value = stored(turned, key_scale), stored(value, value_scale)
    else:
        value = finite(value)
    tl.store(at, turned, mask=inside)
    tl.store(at + KV_BLOCK * KV_HEADS * DIM, value, mask=inside)


@triton.jit(do_not_specialize=["layer", "table_stride"])
def attend_piece(query, q_weight, k_weight, turns, contexts, pool, tables, items, members, row_pieces, row_entries, sinks, out,
                 partial, lse, counters, layer, scale, key_scale, value_scale, eps, query_stride, table_stride, out_stride,
                 KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr,
                 CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, KV_BLOCK: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, MERGE_ROWS: tl.constexpr,
                 MERGE_PIECES: tl.constexpr, ATOMIC: tl.constexpr, DEPENDENT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One program: one work item, that is one piece of the keys of a row, or of those that the rows of a set share, for all
    query heads that share one KV head.

    With `turns`, query [batch, (heads + 2 * KV_HEADS) * DIM] is the projection as it is: queries are turned here, and the
    program of the row's last piece writes its key and value before it reads them. key_scale, value_scale: of a pool in FP8,
    None for another; `scale` has key_scale in it. DEPENDENT: what is read before the wait was written before the first launch
    of the step that may start early.
    """
    at = items + tl.program_id(0) * 8
    low = tl.load(at + 2)
    high = tl.load(at + 3)
    if low >= high:
        return
    first = tl.load(at)
    head = tl.load(at + 1) % KV_HEADS
    count = tl.load(at + 1) // KV_HEADS
    context = tl.load(at + 4)
    pieces = tl.load(at + 5)
    piece = tl.load(at + 6)
    entry = tl.load(at + 7)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    lane = rows % GROUP
    row = first
    owner = tl.zeros([ROWS], tl.int32) + row
    entries = tl.zeros([ROWS], tl.int32) + entry
    if count > 1:
        row = tl.load(members + first)
        owner = tl.load(members + first + rows // GROUP, mask=rows // GROUP < count, other=0)
        entries = tl.load(row_entries + owner) + head * tl.load(row_pieces + owner) + piece
    real = (rows < count * GROUP)[:, None] & (dims < DIM)[None, :]
    columns = (head * GROUP + lane)[:, None] * DIM + dims[None, :]
    table = tables + row.to(tl.int64) * table_stride
    base = layer * (2 * KV_BLOCK)
    if turns is None:
        if DEPENDENT:
            gdc_wait()
        q = tl.load(query + owner.to(tl.int64)[:, None] * query_stride + columns, mask=real, other=0.0)
    else:
        position = tl.maximum(tl.load(contexts + owner), 1).to(tl.int64) - 1
        plain = query + owner.to(tl.int64) * query_stride + (head * GROUP + lane) * DIM
        turned = turned_heads(plain, q_weight, turns + position * (2 * DIM), dims, rows < count * GROUP, eps, DIM, DEPENDENT)
        q = turned.to(query.dtype.element_ty)
        if (count == 1) & (context > 0) & (high * KEYS >= context):
            _own_kv(query + row.to(tl.int64) * query_stride, k_weight, turns, pool, table, base, head, context, dims, eps,
                    key_scale, value_scale, KV_HEADS * GROUP, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK)  # fmt: skip
            tl.debug_barrier()  # what some threads have written others read
    if DEPENDENT and not ATOMIC:
        gdc_launch_dependents()
    top, weight = first_peak(None, lane, rows < count * GROUP)
    if sinks is not None:  # noqa: SIM102 (known to the compiler, the other to the program)
        if pieces == 1:  # else the merge begins with them
            top, weight = first_peak(sinks, head * GROUP + lane, rows < count * GROUP)
    lowest = None
    if WINDOW > 0 or CHUNK > 0:
        lowest = lowest_seen(context - 1, WINDOW, CHUNK)
    if key_scale is not None and q.dtype != tl.float32:
        top, weight, acc = attend_pairs(q, pool, table, low, high, base, head, lowest, context, top, weight, scale, DIM, ROW,
                                        SOFTCAP, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS, STAGES)  # fmt: skip
    else:
        top, weight, acc = attend_spans(q, pool, table, low, high, base, head, lowest, context, top, weight, scale, DIM, ROW,
                                        SOFTCAP, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS, STAGES, PRECISION)  # fmt: skip

    if DEPENDENT and ATOMIC:
        gdc_launch_dependents()
    some = tl.where(weight > 0, weight, 1.0)
    acc = acc / some[:, None]
    if value_scale is not None:
        acc *= value_scale
    if pieces == 1:
        tl.store(out + row.to(tl.int64) * out_stride + columns, acc.to(out.dtype.element_ty), mask=real)
    else:
        place = entries.to(tl.int64) * GROUP + lane
        tl.store(partial + place[:, None] * DIM + dims[None, :], acc, mask=real)
        tl.store(lse + place, top + tl.log2(some), mask=rows < count * GROUP)
        if ATOMIC:
            tl.debug_barrier()  # every thread's stores come before the count
            if count > 1:
                merge_members(members + first, count, partial, lse, sinks, row_pieces, row_entries, counters, head, out,
                               out_stride, KV_HEADS, GROUP, DIM, ROWS, BLOCK_DIM)  # fmt: skip
            else:
                merge_row(row, pieces, entry - piece, partial, lse, sinks, counters, head, dims, out, out_stride, KV_HEADS,
                          GROUP, DIM, BLOCK_DIM, MERGE_ROWS, MERGE_PIECES)  # fmt: skip
