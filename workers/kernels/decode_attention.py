"""Decode attention over blocks, driven by device tensors alone: a plan a step, one launch a layer, capturable in a CUDA graph.

The keys of a step are cut into pieces of about equal length (flash-decoding's split KV, with a work list that the device
makes itself), so that one sequence of 32,768 tokens and 256 of 1,024 fill the multiprocessors alike. The launch geometry
depends on the batch alone, the work on the contexts alone; the width of the block table matters to nothing.

Imports torch, triton and the pool. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kvcache.pool import KVPool

FIELDS = 8  # of a work item: row, KV head, first and last span, context, pieces, piece, entry
PLANNED_ITEMS = 64  # by one program of the plan
PLANNED_ROWS = 64  # that it looks at together
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
    descriptor: bool = False  # spans by the tensor memory accelerator instead of by pointers
    transposed: bool = False  # keys x queries instead of queries x keys: keys fill the matrix unit's rows
    peeled: bool = False  # full spans without masks, the last one apart
    atomic: bool = True  # a row's last piece merges; else a kernel of its own does
    dependent: bool = False  # programmatic dependent launch: the grid may start before its predecessor's end


FEW_ROWS = 8
"""Decodes that leave most of the device idle unless their keys are cut finely, and whose launches are what they cost."""


def choose_config(pool: KVPool, rows: int) -> DecodeConfig:
    """The best known for the pool's dtype and a batch of so many rows.

    Measured in whole steps of the 0.6B shape on an H200, us: batch 1 with 300 keys 822 as many rows have it, 751 as few have
    it; batch 4 1,262 and 1,230; batch 32 1,507 and 1,564; 256 of 150 to 1,500 keys 7,422 and 7,619.
    """
    if pool.dtype == torch.float32:
        return DecodeConfig(keys=32, stages=2, warps=8)  # a dot in full precision takes its operands into registers
    if rows <= FEW_ROWS and pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device)[0] >= 9:
        return DecodeConfig(stages=4, least=2, atomic=False, dependent=True)
    return DecodeConfig()


@triton.jit(do_not_specialize=["batch", "shares"])
def _plan(contexts, items, row_pieces, row_entries, batch, shares, KV_HEADS: tl.constexpr, KEYS: tl.constexpr,
          LEAST: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr):  # fmt: skip
    """Cuts every row's spans into pieces of at most `share` spans. Each program writes ITEMS items; none waits for another.

    Items run over rows, then pieces, then KV heads, so that programs that start together read neighbouring memory. At most
    shares + batch * KV_HEADS items have work, at most 2 * shares of them belong to rows of several pieces: only those have a
    entry for a partial result.
    """
    total = 0
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        context = tl.load(contexts + row, mask=row < batch, other=0)
        total += tl.sum(tl.where(row < batch, tl.maximum(tl.cdiv(context, KEYS), 1), 0), 0)
    share = tl.maximum(tl.cdiv(total * KV_HEADS, shares), LEAST)

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    owner = tl.zeros([ITEMS], tl.int32)
    start = tl.zeros([ITEMS], tl.int32)
    base = tl.zeros([ITEMS], tl.int32)
    planned = 0
    entries = 0
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        context = tl.load(contexts + row, mask=row < batch, other=0)
        spans = tl.where(row < batch, tl.maximum(tl.cdiv(context, KEYS), 1), 0)
        pieces = tl.cdiv(spans, share)
        count = pieces * KV_HEADS
        split = tl.where(pieces > 1, count, 0)
        past = ((planned + tl.cumsum(count, 0))[None, :] <= item[:, None]) & (row < batch)[None, :]
        owner += tl.sum(past.to(tl.int32), 1)
        start += tl.sum(tl.where(past, count[None, :], 0), 1)
        base += tl.sum(tl.where(past, split[None, :], 0), 1)
        if tl.program_id(0) == 0:
            tl.store(row_pieces + row, pieces, mask=row < batch)
            tl.store(row_entries + row, entries + tl.cumsum(split, 0) - split, mask=row < batch)
        planned += tl.sum(count, 0)
        entries += tl.sum(split, 0)

    exists = owner < batch
    context = tl.load(contexts + owner, mask=exists, other=0)
    spans = tl.maximum(tl.cdiv(context, KEYS), 1)
    pieces = tl.cdiv(spans, share)
    head = (item - start) % KV_HEADS
    piece = (item - start) // KV_HEADS
    at = items + item * 8
    tl.store(at, owner)
    tl.store(at + 1, head)
    tl.store(at + 2, tl.where(exists, piece * spans // pieces, 0))
    tl.store(at + 3, tl.where(exists, (piece + 1) * spans // pieces, 0))
    tl.store(at + 4, context)
    tl.store(at + 5, pieces)
    tl.store(at + 6, piece)
    tl.store(at + 7, base + head * pieces + piece)


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
           KV_BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTOR: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys and values [KEYS, BLOCK_DIM] of one span. Values past the context are zeros where MASKED; keys are anything.

    base: the layer's first row in a block, in rows of KV_HEADS * DIM numbers; its values stand KV_BLOCK rows behind its keys.
    """
    ROW: tl.constexpr = KV_HEADS * DIM
    BLOCK_DIM: tl.constexpr = dims.shape[0]
    step = tl.arange(0, KEYS)
    written = span * KEYS + step < context
    if DESCRIPTOR:
        row = block * KV_BLOCK_ROWS + base + span * KEYS % KV_BLOCK
        k = pool.load([row, head * DIM])
        v = pool.load([row + KV_BLOCK, head * DIM])
        if MASKED:
            v = tl.where(written[:, None], v, tl.zeros_like(v))
    else:
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
def _fold(q, k, v, span, context, top, weight, acc, scale, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """One span into the online softmax, in base 2. q is [ROWS, dim] and acc like it, or both transposed."""
    KEYS: tl.constexpr = k.shape[0]
    written = span * KEYS + tl.arange(0, KEYS) < context
    if TRANSPOSED:
        scores = tl.dot(k, q, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(written[:, None], scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp2(scores - peak[None, :])
        factor = tl.exp2(top - peak)
        weight = weight * factor + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * factor[None, :], input_precision=PRECISION)
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
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


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend(query, pool, tables, items, out, partial, lse, counters, layer, scale, query_stride, table_stride,
            out_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr,
            LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr,
            STAGES: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_PIECES: tl.constexpr, DESCRIPTOR: tl.constexpr,
            TRANSPOSED: tl.constexpr, PEELED: tl.constexpr, ATOMIC: tl.constexpr, DEPENDENT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One program: one work item, that is one piece of one row's keys for all query heads that share one KV head."""
    if DEPENDENT:
        gdc_wait()
    at = items + tl.program_id(0) * 8
    low = tl.load(at + 2)
    high = tl.load(at + 3)
    if low >= high:
        return
    row = tl.load(at)
    head = tl.load(at + 1)
    context = tl.load(at + 4)
    pieces = tl.load(at + 5)
    piece = tl.load(at + 6)
    entry = tl.load(at + 7)
    if DEPENDENT:
        gdc_launch_dependents()

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + row.to(tl.int64) * query_stride + (head * GROUP + rows)[:, None] * DIM + dims[None, :],
                mask=real, other=0.0)  # fmt: skip
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a span without a written key weighs nothing
    weight = tl.zeros([ROWS], tl.float32)
    if TRANSPOSED:
        q = tl.trans(q)
        acc = tl.zeros([BLOCK_DIM, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    table = tables + row.to(tl.int64) * table_stride
    base = layer * (2 * KV_BLOCK)
    full = high
    if PEELED:
        full = tl.minimum(high, context // KEYS)
    # a span's block is read one span ahead, so that the loop's loads hang on no load of the same turn and all run ahead
    block = span_blocks(table, low, context, KV_BLOCK, KEYS)
    for span in tl.range(low, full, num_stages=STAGES):
        k, v = span_kv(pool, block, span, base, head, context, dims, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS,
                      DESCRIPTOR, not PEELED)  # fmt: skip
        block = span_blocks(table, tl.minimum(span + 1, high - 1), context, KV_BLOCK, KEYS)
        top, weight, acc = _fold(q, k, v, span, context, top, weight, acc, scale, not PEELED, TRANSPOSED, PRECISION)
    if PEELED and full < high:
        k, v = span_kv(pool, block, full, base, head, context, dims, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS,
                      DESCRIPTOR, True)  # fmt: skip
        top, weight, acc = _fold(q, k, v, full, context, top, weight, acc, scale, True, TRANSPOSED, PRECISION)

    if TRANSPOSED:
        acc = tl.trans(acc)
    some = tl.where(weight > 0, weight, 1.0)
    acc = acc / some[:, None]
    whole = out + row.to(tl.int64) * out_stride + head * (GROUP * DIM)
    if pieces == 1:
        tl.store(whole + rows[:, None] * DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=real)
    else:
        place = entry.to(tl.int64) * GROUP + rows
        tl.store(partial + place[:, None] * DIM + dims[None, :], acc, mask=real)
        tl.store(lse + place, top + tl.log2(some), mask=rows < GROUP)
        if ATOMIC:
            tl.debug_barrier()  # every thread's stores come before the count
            if tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel") == pieces - 1:
                tl.store(counters + row * KV_HEADS + head, 0)
                result = _merged(partial, lse, entry - piece, pieces, 0, GROUP, MERGE_ROWS, DIM, BLOCK_DIM, MERGE_PIECES)
                heads = tl.arange(0, MERGE_ROWS)
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
        processors = INTERPRETED_PROCESSORS
        if pool.device.type == "cuda":
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._shares = processors * config.shares
        self._source: Tensor | TensorDescriptor = pool.data
        if config.descriptor and config.keys <= layout.block_size and self._dim == layout.head_dim:
            rows, row = pool.data.numel() // (layout.kv_heads * layout.head_dim), layout.kv_heads * layout.head_dim
            self._source = TensorDescriptor(pool.data, [rows, row], [row, 1], [config.keys, layout.head_dim])
        entries = 2 * self._shares * self._group
        self._partial = torch.empty((entries, layout.head_dim), dtype=torch.float32, device=pool.device)
        self._lse = torch.empty(entries, dtype=torch.float32, device=pool.device)
        self._kept: list[Tensor] = []
        self._make_rows(max_batch)

    def _make_rows(self, max_batch: int) -> None:
        device, kv_heads = self._pool.device, self._pool.layout.kv_heads
        self.max_batch = max_batch
        items = triton.cdiv(self._shares + max_batch * kv_heads, PLANNED_ITEMS) * PLANNED_ITEMS
        self._items = torch.zeros((items, FIELDS), dtype=torch.int32, device=device)
        self._counters = torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device)
        self._rows = torch.zeros((2, max_batch), dtype=torch.int32, device=device)

    def reserve(self, max_batch: int) -> None:
        """Make the buffers that grow with the batch. Outside of graphs; those captured before go on with the old buffers."""
        self._kept += [self._items, self._counters, self._rows]
        self._make_rows(max_batch)

    @property
    def memory_bytes(self) -> int:
        tensors = [self._partial, self._lse, self._items, self._counters, self._rows, *self._kept]
        return sum(tensor.nbytes for tensor in tensors)

    def _programs(self, batch: int) -> int:
        return self._shares + batch * self._pool.layout.kv_heads

    def plan(self, context_lens: Tensor, batch: int) -> None:
        """Cut the step's work, once for all its layers. context_lens: [>= batch] int32, on the pool's device.

        Raises ValueError for a batch larger than the buffers.
        """
        if batch > self.max_batch:
            raise ValueError(f"{batch} decodes do not fit the buffers made for {self.max_batch}: reserve {batch} first")
        _plan[(triton.cdiv(self._programs(batch), PLANNED_ITEMS),)](
            context_lens, self._items, self._rows[0], self._rows[1], batch, self._shares,
            KV_HEADS=self._pool.layout.kv_heads, KEYS=self.config.keys, LEAST=self.config.least, ROWS=PLANNED_ROWS,
            ITEMS=PLANNED_ITEMS,
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
            query, self._source, block_tables, self._items, out, self._partial, self._lse, self._counters, layer,
            layout.head_dim**-0.5 * LOG2_E, query.stride(0), block_tables.stride(0), out.stride(0), **shape,
            KV_HEADS=layout.kv_heads, KV_BLOCK=layout.block_size, LAYERS=layout.layers, ROWS=max(16, merge_rows),
            KEYS=config.keys, STAGES=config.stages, MERGE_ROWS=merge_rows,
            MERGE_PIECES=max(1, MERGED_NUMBERS // (merge_rows * self._dim)),
            DESCRIPTOR=isinstance(self._source, TensorDescriptor), TRANSPOSED=config.transposed, PEELED=config.peeled,
            ATOMIC=config.atomic, DEPENDENT=config.dependent,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=config.warps, **launch,
        )  # fmt: skip
        if not config.atomic:
            _merge[(batch, self._heads)](
                self._partial, self._lse, out, self._rows[0], self._rows[1], out.stride(0), **shape,
                PIECES=MERGED_NUMBERS // self._dim, DEPENDENT=config.dependent, num_warps=4, **launch,
            )  # fmt: skip
