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
from workers.kernels.attention.merge import merge, merge_members, merged
from workers.kernels.attention.plan import COMPARED_UNITS, FIELDS, PLANNED_UNITS, WRITTEN_ITEMS, plan
from workers.kernels.attention.prefixes import SET_FIELDS, PrefixLimits, SharedPrefixes
from workers.kernels.attention.spans import LOG2_E, fold, span_blocks, span_kv
from workers.kernels.fp8 import stored
from workers.kernels.rope import turned_heads
from workers.kernels.turn import HeadTurn

MERGED_NUMBERS = 8192  # of partial results that the merge holds at once
INTERPRETED_PROCESSORS = 4


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


def choose_config(pool: KVPool, rows: int, dtype: torch.dtype) -> DecodeConfig:
    """The best known for the pool's device, a batch of so many rows, and queries of that dtype.

    Few: in whole steps of the 0.6B shape on an H200, us: batch 1 with 300 keys 822 as many rows have it, 751 as few have it;
    batch 4 1,262 and 1,230; batch 32 1,507 and 1,564. Some, us a layer: 32 rows of 1,024 keys 40.7 as many have it, 35.3 as
    some have it; 32 of 128 to 1,779 40.9 and 38.9, 64 of them 67.3 and 63.8; 256 254 and 256.
    """
    if dtype == torch.float32:
        return DecodeConfig(keys=32, stages=2, warps=8)  # a dot in full precision takes its operands into registers
    hopper = pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device)[0] >= 9
    if rows <= FEW_ROWS and hopper:
        return DecodeConfig(stages=4, least=2, atomic=False, dependent=True)
    return DecodeConfig(stages=4, shares=2) if rows <= SOME_ROWS and hopper else DecodeConfig()


@triton.jit
def _own_kv(projected, k_weight, turns, pool, table, base, head, context, dims, eps, key_scale, value_scale,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr,
            KV_BLOCK_ROWS: tl.constexpr):  # fmt: skip
    """Writes the key, turned, and the value that stand in one row of the projection to the place of the row's last token."""
    one = tl.arange(0, 1)
    position = context - 1
    key = projected + (HEADS + head) * DIM
    turned = turned_heads(key + one, k_weight, turns + position.to(tl.int64) * (2 * DIM) + one, dims, one == 0, eps, DIM)
    inside = (dims < DIM)[None, :]
    value = tl.load(key + KV_HEADS * DIM + one[:, None] + dims[None, :], mask=inside, other=0.0)
    block = tl.load(table + position // KV_BLOCK).to(tl.int64)
    at = pool + ((block * KV_BLOCK_ROWS + base + position % KV_BLOCK) * KV_HEADS + head) * DIM + one[:, None] + dims[None, :]
    turned = turned.to(projected.dtype.element_ty)
    if key_scale is not None:
        turned, value = stored(turned, key_scale), stored(value, value_scale)
    tl.store(at, turned, mask=inside)
    tl.store(at + KV_BLOCK * KV_HEADS * DIM, value, mask=inside)


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend(query, q_weight, k_weight, turns, contexts, pool, tables, items, members, row_pieces, row_entries, out, partial,
            lse, counters, layer, scale, key_scale, value_scale, eps, query_stride, table_stride, out_stride,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
            KV_BLOCK: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
            KEYS: tl.constexpr, STAGES: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_PIECES: tl.constexpr,
            ATOMIC: tl.constexpr, DEPENDENT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: one work item, that is one piece of the keys of a row, or of those that the rows of a set share, for all
    query heads that share one KV head.

    With `turns`, query [batch, (heads + 2 * KV_HEADS) * DIM] is the projection as it is: queries are turned here, and the
    program of the row's last piece writes its key and value before it reads them. key_scale, value_scale: of a pool in FP8,
    None for another; `scale` has key_scale in it.
    """
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
    table = tables + row.to(tl.int64) * table_stride
    base = layer * (2 * KV_BLOCK)
    if turns is None:
        q = tl.load(query + owner.to(tl.int64)[:, None] * query_stride + columns, mask=real, other=0.0)
    else:
        position = tl.maximum(tl.load(contexts + owner), 1).to(tl.int64) - 1
        plain = query + owner.to(tl.int64) * query_stride + (head * GROUP + lane) * DIM
        turned = turned_heads(plain, q_weight, turns + position * (2 * DIM), dims, rows < count * GROUP, eps, DIM)
        q = turned.to(query.dtype.element_ty)
        if (count == 1) & (context > 0) & (high * KEYS >= context):
            _own_kv(query + row.to(tl.int64) * query_stride, k_weight, turns, pool, table, base, head, context, dims, eps,
                    key_scale, value_scale, KV_HEADS * GROUP, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK)  # fmt: skip
            tl.debug_barrier()  # what some threads have written others read
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a span without a written key weighs nothing
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    # a span's block is read one span ahead, so that the loop's loads hang on no load of the same turn and all run ahead
    block = span_blocks(table, low, context, KV_BLOCK, KEYS)
    for span in tl.range(low, high, num_stages=STAGES):
        k, v = span_kv(pool, block, span, base, head, context, dims, KV_HEADS, DIM, KV_BLOCK, LAYERS * 2 * KV_BLOCK, KEYS,
                       True)  # fmt: skip
        block = span_blocks(table, tl.minimum(span + 1, high - 1), context, KV_BLOCK, KEYS)
        top, weight, acc = fold(q, k, v, span, context, top, weight, acc, scale, PRECISION)

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
                merge_members(members + first, count, partial, lse, row_pieces, row_entries, counters, head, out, out_stride,
                               KV_HEADS, GROUP, DIM, ROWS, BLOCK_DIM)  # fmt: skip
            elif tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel") == pieces - 1:
                tl.store(counters + row * KV_HEADS + head, 0)
                result = merged(partial, lse, entry - piece, pieces, 0, GROUP, MERGE_ROWS, DIM, BLOCK_DIM, MERGE_PIECES)
                heads = tl.arange(0, MERGE_ROWS)
                whole = out + row.to(tl.int64) * out_stride + head * (GROUP * DIM)
                tl.store(whole + heads[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty),
                         mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :])  # fmt: skip


class DecodeAttention:
    """Attention of rows with one query token each over one rank's pool. Its buffers serve one step at a time.

    heads: query heads of this rank. max_batch: rows of the largest step; `reserve` raises it, outside of graphs. dtype: of
    queries, None: the pool's.
    Safety: block_tables name blocks of the pool for each row's context, and one block even where the context is 0 (whose
    output is zeros). Results do not depend on the order in which programs run: pieces are merged in order.
    Raises ValueError for float64.
    """

    def __init__(
        self, pool: KVPool, heads: int, max_batch: int, config: DecodeConfig | None = None, dtype: torch.dtype | None = None
    ) -> None:
        layout, dtype = pool.layout, dtype or pool.dtype
        if dtype == torch.float64:
            raise ValueError("Triton's kernels serve bfloat16, float16 and float32, not float64; choose one of them")
        self._pool = pool
        self._heads = heads
        self._group = heads // layout.kv_heads
        self._dim = max(16, triton.next_power_of_2(layout.head_dim))
        config = config or choose_config(pool, max_batch, dtype)
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
        self._contexts = nothing

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
        self._contexts = context_lens
        units = batch + self.prefixes.sets(batch)
        plan[(triton.cdiv(units, PLANNED_UNITS),)](
            context_lens, shared.tokens, shared.sets, self._items, self._rows[0], self._rows[1], batch, units, self._shares,
            self._programs(batch), KV_HEADS=self._pool.layout.kv_heads, KEYS=self.config.keys, LEAST=self.config.least,
            UNITS=PLANNED_UNITS, COMPARED=COMPARED_UNITS, ITEMS=WRITTEN_ITEMS,
        )  # fmt: skip

    def run(self, layer: int, query: Tensor, block_tables: Tensor, out: Tensor, turn: HeadTurn | None = None) -> None:
        """Attend over `layer` of the pool, as planned last.

        query, out: [batch, heads, head_dim], rows may lie apart; block_tables: [batch, any width] int32, rows may lie apart.
        The keys and values of this step stand in the pool already; but with `turn`, query is the projection, [batch,
        (heads + 2 * kv_heads) * head_dim]: queries, keys, values. Then they are turned and written here.
        """
        layout, config = self._pool.layout, self.config
        batch = len(query)
        merge_rows = triton.next_power_of_2(self._group)
        shape = {"GROUP": self._group, "DIM": layout.head_dim, "BLOCK_DIM": self._dim}
        launch = {"launch_pdl": True} if config.dependent else {}
        turning = (None, None, None) if turn is None else (turn.q_weight, turn.k_weight, turn.table)
        scales = self._pool.scales(layer)
        scale = layout.head_dim**-0.5 * LOG2_E * (1.0 if scales is None else scales[0])
        _attend[(self._programs(batch),)](
            query, *turning, self._contexts, self._pool.data, block_tables, self._items, self._planned.members, self._rows[0],
            self._rows[1], out, self._partial, self._lse, self._counters, layer, scale, *(scales or (None, None)),
            0.0 if turn is None else turn.eps, query.stride(0), block_tables.stride(0), out.stride(0), **shape,
            KV_HEADS=layout.kv_heads, KV_BLOCK=layout.block_size, LAYERS=layout.layers, ROWS=self._tile, KEYS=config.keys,
            STAGES=config.stages, MERGE_ROWS=merge_rows,
            MERGE_PIECES=max(1, MERGED_NUMBERS // (merge_rows * self._dim)), ATOMIC=config.atomic,
            DEPENDENT=config.dependent, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps, **launch,
        )  # fmt: skip
        if not config.atomic:
            merge[(batch, self._heads)](
                self._partial, self._lse, out, self._rows[0], self._rows[1], out.stride(0), **shape,
                PIECES=MERGED_NUMBERS // self._dim, DEPENDENT=config.dependent, num_warps=4, **launch,
            )  # fmt: skip
