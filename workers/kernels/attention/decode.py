"""Decode attention over blocks, driven by device tensors alone: a plan a step, one launch a layer, capturable in a CUDA graph.

The keys of a step are cut into pieces of about equal length (flash-decoding's split KV, with a work list that the device
makes itself, `plan`), so that one sequence of 32,768 tokens and 256 of 1,024 fill the multiprocessors alike; the longest pieces
begin first. Rows whose tables begin with the same blocks have these read once for several of them (cascade attention, after
Hydragen, arXiv 2402.05099): query rows which a tile of the matrix unit has room for anyway. The launch geometry depends on the
batch alone, the work on contexts and shared prefixes alone; the width of the block table matters to nothing.

Imports torch, triton and the pool. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvcache.pool import KVPool
from workers.kernels.attention.plan import COMPARED_UNITS, FIELDS, PLANNED_UNITS, WRITTEN_ITEMS, plan
from workers.kernels.attention.prefixes import SET_FIELDS, PrefixLimits, SharedPrefixes

MERGED_NUMBERS = 8192  # of partial results that the merge holds at once
INTERPRETED_PROCESSORS = 4
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a decode is cut and computed; no field changes what is computed beyond rounding."""

    keys: int = 64  # of a span
    stages: int = 3  # spans in flight
    warps: int = 4
    shares: int = 1  # pieces wanted for each multiprocessor
    least: int = 4  # spans of a piece, at least
    tile: int = 16  # query rows of a program, at least: heads of a KV head, times rows that share a prefix
    atomic: bool = True  # a row's last piece merges; else a kernel of its own does
    dependent: bool = False  # programmatic dependent launch: the grid may start before its predecessor's end


FEW_ROWS = 8
"""Decodes that leave most of the device idle unless their keys are cut finely, and whose launches are what they cost."""
SOME_ROWS = 64
"""Decodes too few for many programs on each multiprocessor: more of each one's spans are in flight instead."""


def choose_config(pool: KVPool, rows: int) -> DecodeConfig:
    """The best known for the pool's dtype and a batch of so many rows.

    Few: in whole steps of the 0.6B shape on an H200, us: batch 1 with 300 keys 822 as many rows have it, 751 as few have it;
    batch 4 1,262 and 1,230; batch 32 1,507 and 1,564. Some, us a layer: 32 rows of 1,024 keys 40.7 as many have it, 35.3 as
    some have it; 32 of 128 to 1,779 40.9 and 38.9, 64 of them 67.3 and 63.8; 256 254 and 256.
    """
    if pool.dtype == torch.float32:
        return DecodeConfig(keys=32, stages=2, warps=8)  # a dot in full precision takes its operands into registers
    hopper = pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device)[0] >= 9
    if rows <= FEW_ROWS and hopper:
        return DecodeConfig(stages=4, least=2, atomic=False, dependent=True)
    return DecodeConfig(stages=4, shares=2) if rows <= SOME_ROWS and hopper else DecodeConfig()


@triton.jit
def span_blocks(table, span, context, KV_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The span's block id, or [KEYS] block ids where a span is longer than a block; 0 past the context."""
    if KEYS <= KV_BLOCK:
        blocks = tl.load(table + span * KEYS // KV_BLOCK)
    else:
        position = span * KEYS + tl.arange(0, KEYS)
        blocks = tl.load(table + position // KV_BLOCK, mask=position < context, other=0)
    return blocks


@triton.jit
def span_kv(pool, block, span, base, head, context, dims, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr,
           KV_BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys and values [KEYS, BLOCK_DIM] of one span. Values past the context are zeros where MASKED; keys are anything.

    base: the layer's first row in a block, in rows of KV_HEADS * DIM numbers; its values stand KV_BLOCK rows behind its keys.
    """
    ROW: tl.constexpr = KV_HEADS * DIM
    BLOCK_DIM: tl.constexpr = dims.shape[0]
    step = tl.arange(0, KEYS)
    written = span * KEYS + step < context
    if KEYS <= KV_BLOCK:
        start = pool + (block.to(tl.int64) * KV_BLOCK_ROWS + base + span * KEYS % KV_BLOCK) * ROW + head * DIM
        at = start + (step * ROW)[:, None] + dims[None, :]
    else:
        place = block.to(tl.int64) * KV_BLOCK_ROWS + base + (span * KEYS + step) % KV_BLOCK
        at = pool + (place * ROW)[:, None] + (head * DIM + dims)[None, :]
    inside = (dims < DIM)[None, :]
    if DIM != BLOCK_DIM:
        k = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + KV_BLOCK * ROW, mask=written[:, None] & inside, other=0.0)
    elif MASKED:
        k = tl.load(at)
        v = tl.load(at + KV_BLOCK * ROW, mask=written[:, None], other=0.0)
    else:
        k = tl.load(at)
        v = tl.load(at + KV_BLOCK * ROW)
    return k, v


@triton.jit
def _fold(q, k, v, span, context, top, weight, acc, scale, PRECISION: tl.constexpr):
    """One span into the online softmax, in base 2."""
    KEYS: tl.constexpr = k.shape[0]
    written = span * KEYS + tl.arange(0, KEYS) < context
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(written[None, :], scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - peak[:, None])
    factor = tl.exp2(top - peak)
    weight = weight * factor + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return peak, weight, acc


@triton.jit
def _merged(partial, lse, entry, pieces, first, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
            BLOCK_DIM: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_DIM]: query heads from `first` of a group on, its pieces from `entry` on merged in order."""
    head = first + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
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
def _merge_members(members, count, partial, lse, row_pieces, row_entries, counters, head, out, out_stride,
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
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for piece in range(tl.max(pieces, 0)):
        there = piece < pieces
        place = (entry + piece).to(tl.int64) * GROUP + lane % GROUP
        part = tl.load(partial + place[:, None] * DIM + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        sums = tl.load(lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        peak = tl.maximum(top, sums)
        share = tl.exp2(sums - peak)
        factor = tl.exp2(top - peak)
        weight = weight * factor + share
        acc = acc * factor[:, None] + part * share[:, None]
        top = peak
    acc = acc / tl.where(done, weight, 1.0)[:, None]
    at = row.to(tl.int64)[:, None] * out_stride + (head * GROUP + lane % GROUP)[:, None] * DIM + dims[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=done[:, None] & (dims < DIM)[None, :])


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend(query, pool, tables, items, members, row_pieces, row_entries, out, partial, lse, counters, layer, scale,
            query_stride, table_stride, out_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
            KV_BLOCK: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
            KEYS: tl.constexpr, STAGES: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_PIECES: tl.constexpr,
            ATOMIC: tl.constexpr, DEPENDENT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: one work item, that is one piece of the keys of a row, or of those that the rows of a set share, for all
    query heads that share one KV head."""
    if DEPENDENT:
        gdc_wait()
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
    if DEPENDENT:
        gdc_launch_dependents()

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
    q = tl.load(query + owner.to(tl.int64)[:, None] * query_stride + columns, mask=real, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a span without a written key weighs nothing
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    table = tables + row.to(tl.int64) * table_stride
    base = layer * (2 * KV_BLOCK)
    # a span's block is read one span ahead, so that the loop's loads hang on no load of the same turn and all run ahead
    block = span_blocks(table, low, context, KV_BLOCK, KEYS)
    for span in tl.range(low, high, num_stages=STAGES):
        k, v = span_kv(pool, block, span, base, head, context, dims, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS,
                       True)  # fmt: skip
        block = span_blocks(table, tl.minimum(span + 1, high - 1), context, KV_BLOCK, KEYS)
        top, weight, acc = _fold(q, k, v, span, context, top, weight, acc, scale, PRECISION)

    some = tl.where(weight > 0, weight, 1.0)
    acc = acc / some[:, None]
    if pieces == 1:
        tl.store(out + row.to(tl.int64) * out_stride + columns, acc.to(out.dtype.element_ty), mask=real)
    else:
        place = entries.to(tl.int64) * GROUP + lane
        tl.store(partial + place[:, None] * DIM + dims[None, :], acc, mask=real)
        tl.store(lse + place, top + tl.log2(some), mask=rows < count * GROUP)
        if ATOMIC:
            tl.debug_barrier()  # every thread's stores come before the count
            if count > 1:
                _merge_members(members + first, count, partial, lse, row_pieces, row_entries, counters, head, out, out_stride,
                               KV_HEADS, GROUP, DIM, ROWS, BLOCK_DIM)  # fmt: skip
            elif tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel") == pieces - 1:
                tl.store(counters + row * KV_HEADS + head, 0)
                result = _merged(partial, lse, entry - piece, pieces, 0, GROUP, MERGE_ROWS, DIM, BLOCK_DIM, MERGE_PIECES)
                heads = tl.arange(0, MERGE_ROWS)
                whole = out + row.to(tl.int64) * out_stride + head * (GROUP * DIM)
                tl.store(whole + heads[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty),
                         mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :])  # fmt: skip


@triton.jit
def _merge(partial, lse, out, row_pieces, row_entries, out_stride, GROUP: tl.constexpr, DIM: tl.constexpr,
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
    result = _merged(partial, lse, entry, pieces, head % GROUP, GROUP, 1, DIM, BLOCK_DIM, PIECES)
    dims = tl.arange(0, BLOCK_DIM)
    at = out + row.to(tl.int64) * out_stride + head * DIM + tl.arange(0, 1)[:, None] + dims[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(dims < DIM)[None, :])


class DecodeAttention:
    """Attention of rows with one query token each over one rank's pool. Its buffers serve one step at a time.

    heads: query heads of this rank. max_batch: rows of the largest step; `reserve` raises it, outside of graphs.
    Safety: block_tables name blocks of the pool for each row's context, and one block even where the context is 0 (whose
    output is zeros). Results do not depend on the order in which programs run: pieces are merged in order.
    Raises ValueError for float64.
    """

    def __init__(self, pool: KVPool, heads: int, max_batch: int, config: DecodeConfig | None = None) -> None:
        layout = pool.layout
        if pool.dtype == torch.float64:
            raise ValueError("Triton's kernels serve bfloat16, float16 and float32, not float64; choose one of them")
        self._pool = pool
        self._heads = heads
        self._group = heads // layout.kv_heads
        self._dim = max(16, triton.next_power_of_2(layout.head_dim))
        config = config or choose_config(pool, max_batch)
        self.config = config
        self._tile = max(config.tile, triton.next_power_of_2(self._group))
        self.prefixes = PrefixLimits(self._tile // self._group, max(config.keys, layout.block_size))
        processors = INTERPRETED_PROCESSORS
        if pool.device.type == "cuda":
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._shares = processors * config.shares
        self._kept: list[Tensor] = []
        self._make_rows(max_batch)

    def _make_rows(self, max_batch: int) -> None:
        device, kv_heads = self._pool.device, self._pool.layout.kv_heads
        self.max_batch = max_batch
        entries = 2 * self._shares  # of rows that are cut: their pieces are at least half as long as those wanted
        if self.prefixes.rows > 1:  # of rows with a set: a piece of their own, and the set's for each of its members
            entries += max_batch * kv_heads + self.prefixes.rows * (self._shares + self.prefixes.sets(max_batch) * kv_heads)
        self._partial = torch.empty(entries * self._group, self._pool.layout.head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(entries * self._group, dtype=torch.float32, device=device)
        self._items = torch.zeros((self._programs(max_batch), FIELDS), dtype=torch.int32, device=device)
        self._counters = torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device)
        self._rows = torch.zeros((2, max_batch), dtype=torch.int32, device=device)
        nothing = torch.zeros(max(max_batch, SET_FIELDS * self.prefixes.sets(max_batch)), dtype=torch.int32, device=device)
        self._alone = SharedPrefixes(nothing, nothing, nothing)
        self._planned = self._alone

    def reserve(self, max_batch: int) -> None:
        """Make the buffers that grow with the batch. Outside of graphs; those captured before go on with the old buffers."""
        self._kept += self._buffers()
        self._make_rows(max_batch)

    def _buffers(self) -> list[Tensor]:
        return [self._partial, self._lse, self._items, self._counters, self._rows, self._alone.tokens]

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self._buffers(), *self._kept])

    def _programs(self, batch: int) -> int:
        return self._shares + (batch + self.prefixes.sets(batch)) * self._pool.layout.kv_heads

    def plan(self, context_lens: Tensor, batch: int, shared: SharedPrefixes | None = None) -> None:
        """Cut the step's work, once for all its layers. context_lens: [>= batch] int32, on the pool's device.

        Raises ValueError for a batch larger than the buffers.
        """
        if batch > self.max_batch:
            raise ValueError(f"{batch} decodes do not fit the buffers made for {self.max_batch}: reserve {batch} first")
        self._planned = shared = shared or self._alone
        units = batch + self.prefixes.sets(batch)
        plan[(triton.cdiv(units, PLANNED_UNITS),)](
            context_lens, shared.tokens, shared.sets, self._items, self._rows[0], self._rows[1], batch, units, self._shares,
            self._programs(batch), KV_HEADS=self._pool.layout.kv_heads, KEYS=self.config.keys, LEAST=self.config.least,
            UNITS=PLANNED_UNITS, COMPARED=COMPARED_UNITS, ITEMS=WRITTEN_ITEMS,
        )  # fmt: skip

    def run(self, layer: int, query: Tensor, block_tables: Tensor, out: Tensor) -> None:
        """Attend over `layer` of the pool, whose keys and values of this step stand there already, as planned last.

        query, out: [batch, heads, head_dim], rows may lie apart; block_tables: [batch, any width] int32, rows may lie apart.
        """
        layout, config = self._pool.layout, self.config
        batch = len(query)
        merge_rows = triton.next_power_of_2(self._group)
        shape = {"GROUP": self._group, "DIM": layout.head_dim, "BLOCK_DIM": self._dim}
        launch = {"launch_pdl": True} if config.dependent else {}
        _attend[(self._programs(batch),)](
            query, self._pool.data, block_tables, self._items, self._planned.members, self._rows[0], self._rows[1], out,
            self._partial, self._lse, self._counters, layer, layout.head_dim**-0.5 * LOG2_E, query.stride(0),
            block_tables.stride(0), out.stride(0), **shape, KV_HEADS=layout.kv_heads, KV_BLOCK=layout.block_size,
            LAYERS=layout.layers, ROWS=self._tile, KEYS=config.keys, STAGES=config.stages, MERGE_ROWS=merge_rows,
            MERGE_PIECES=max(1, MERGED_NUMBERS // (merge_rows * self._dim)), ATOMIC=config.atomic,
            DEPENDENT=config.dependent, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps, **launch,
        )  # fmt: skip
        if not config.atomic:
            _merge[(batch, self._heads)](
                self._partial, self._lse, out, self._rows[0], self._rows[1], out.stride(0), **shape,
                PIECES=MERGED_NUMBERS // self._dim, DEPENDENT=config.dependent, num_warps=4, **launch,
            )  # fmt: skip
