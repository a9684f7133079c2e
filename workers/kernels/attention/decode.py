"""Decode attention over blocks, driven by device tensors alone: a plan a step, one launch a layer, capturable in a CUDA graph.

The keys of a step are cut into pieces of about equal length (flash-decoding's split KV, with a work list that the device
makes itself, `plan`), so that one sequence of 32,768 tokens and 256 of 1,024 fill the multiprocessors alike; the longest pieces
begin first. Rows whose tables begin with the same blocks have these read once for several of them (cascade attention, after
Hydragen, arXiv 2402.05099): query rows which a tile of the matrix unit has room for anyway. The launch geometry depends on the
batch alone, the work on contexts and shared prefixes alone; the width of the block table matters to nothing.

Imports torch, triton and the pool. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvcache.pool import KVPool
from workers.kernels.attention.decode_config import DecodeConfig, choose_config
from workers.kernels.attention.form import Form, Reach, plain_forms
from workers.kernels.attention.merge import merge, merge_members, merged
from workers.kernels.attention.pairs import attend_pairs
from workers.kernels.attention.plan import COMPARED_UNITS, FIELDS, PLANNED_UNITS, WRITTEN_ITEMS, plan
from workers.kernels.attention.prefixes import NOT_SHARED, SET_FIELDS, PrefixLimits, SharedPrefixes
from workers.kernels.attention.spans import LOG2_E, first_peak, fold, lowest_seen, span_blocks, span_kv
from workers.kernels.heads.fp8 import stored
from workers.kernels.heads.rope import turned_heads
from workers.kernels.heads.turn import HeadTurn

MERGED_NUMBERS = 8192  # of partial results that the merge holds at once
INTERPRETED_PROCESSORS = 4


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
def _attend(query, q_weight, k_weight, turns, contexts, pool, tables, items, members, row_pieces, row_entries, sinks, out,
            partial, lse, counters, layer, scale, key_scale, value_scale, eps, query_stride, table_stride, out_stride,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr,
            CHUNK: tl.constexpr,
            SOFTCAP: tl.constexpr,
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
        acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
        # a span's block is read one span ahead, so that the loop's loads hang on no load of the same turn and all run ahead
        block = span_blocks(table, low, lowest, context, KV_BLOCK, KEYS)
        for span in tl.range(low, high, num_stages=STAGES):
            k, v = span_kv(pool, block, span, base, head, lowest, context, dims, DIM, ROW, KV_BLOCK, LAYERS * 2 * KV_BLOCK,
                           KEYS, True)  # fmt: skip
            block = span_blocks(table, tl.minimum(span + 1, high - 1), lowest, context, KV_BLOCK, KEYS)
            top, weight, acc = fold(q, k, v, span, lowest, context, top, weight, acc, scale, SOFTCAP, PRECISION)

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
            elif tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel") == pieces - 1:
                tl.store(counters + row * KV_HEADS + head, 0)
                result = merged(partial, lse, sinks, head, entry - piece, pieces, 0, GROUP, MERGE_ROWS, DIM, BLOCK_DIM,
                                MERGE_PIECES)  # fmt: skip
                heads = tl.arange(0, MERGE_ROWS)
                whole = out + row.to(tl.int64) * out_stride + head * (GROUP * DIM)
                tl.store(whole + heads[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty),
                         mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cut:
    """A step's work for the layers of one reach. items: [programs, FIELDS]; pieces, entries: [max_batch] of each row."""

    items: Tensor
    pieces: Tensor
    entries: Tensor


class DecodeAttention:
    """Attention of rows with one query token each over one rank's pool. Its buffers serve one step at a time.

    heads: query heads of this rank. max_batch: rows of the largest step; `reserve` raises it, outside of graphs. forms: of
    each layer, None: plain. Layers of one reach are planned together, and rows share prefixes in those that see all. kv_heads,
    head_dim: of the layers that it is asked for, None: the pool's, whose rows may be wider. dtype: of queries, None: the
    pool's.
    Safety: block_tables name blocks of the pool for what each row sees of its context, and one block even where the context is
    0 (whose output is zeros). Results do not depend on the order in which programs run: pieces are merged in order.
    Raises ValueError for float64.
    """

    def __init__(
        self, pool: KVPool, heads: int, max_batch: int, config: DecodeConfig | None = None,
        forms: Sequence[Form] | None = None, kv_heads: int | None = None, head_dim: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        layout, dtype = pool.layout, dtype or pool.dtype
        if dtype == torch.float64:
            raise ValueError("Triton's kernels serve bfloat16, float16 and float32, not float64; choose one of them")
        self._pool = pool
        self._forms = forms or plain_forms(layout.layers, layout.head_dim)
        self._heads = heads
        self._kv_heads, self._head_dim = kv_heads or layout.kv_heads, head_dim or layout.head_dim
        self._group = heads // self._kv_heads
        self._dim = max(32 if layout.scaled else 16, triton.next_power_of_2(self._head_dim))
        config = config or choose_config(pool, max_batch, dtype, self._head_dim)
        self.config = config
        self._tile = max(config.tile, triton.next_power_of_2(self._group))
        shares = any(form.reach == Reach() for form in self._forms)
        limits = PrefixLimits(self._tile // self._group, max(config.keys, layout.block_size))
        self.prefixes = limits if shares else NOT_SHARED
        processors = INTERPRETED_PROCESSORS
        if pool.device.type == "cuda":
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._shares = processors * config.shares
        self._kept: list[Tensor] = []
        self._make_rows(max_batch)

    def _make_rows(self, max_batch: int) -> None:
        device, kv_heads = self._pool.device, self._kv_heads
        self.max_batch = max_batch
        entries = 2 * self._shares  # of rows that are cut: their pieces are at least half as long as those wanted
        if self.prefixes.rows > 1:  # of rows with a set: a piece of their own, and the set's for each of its members
            entries += max_batch * kv_heads + self.prefixes.rows * (self._shares + self.prefixes.sets(max_batch) * kv_heads)
        self._partial = torch.empty(entries * self._group, self._head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(entries * self._group, dtype=torch.float32, device=device)
        self._counters = torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device)
        nothing = torch.zeros(max(max_batch, SET_FIELDS * self.prefixes.sets(max_batch)), dtype=torch.int32, device=device)
        self._alone = SharedPrefixes(nothing, nothing, nothing)
        self._planned = self._alone
        self._contexts = nothing
        self._cuts: dict[Reach, Cut] = {}
        for reach in {form.reach for form in self._forms}:
            items = torch.zeros((self._programs(max_batch), FIELDS), dtype=torch.int32, device=device)
            self._cuts[reach] = Cut(items, *torch.zeros((2, max_batch), dtype=torch.int32, device=device))

    def reserve(self, max_batch: int) -> None:
        """Make the buffers that grow with the batch. Outside of graphs; those captured before go on with the old buffers."""
        self._kept += self._buffers()
        self._make_rows(max_batch)

    def _buffers(self) -> list[Tensor]:
        cuts = [tensor for cut in self._cuts.values() for tensor in (cut.items, cut.pieces, cut.entries)]
        return [self._partial, self._lse, self._counters, self._alone.tokens, *cuts]

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self._buffers(), *self._kept])

    def _programs(self, batch: int) -> int:
        return self._shares + (batch + self.prefixes.sets(batch)) * self._kv_heads

    def plan(self, context_lens: Tensor, batch: int, shared: SharedPrefixes | None = None) -> None:
        """Cut the step's work, once for all its layers of one reach. context_lens: [>= batch] int32, on the pool's device.

        Raises ValueError for a batch larger than the buffers.
        """
        if batch > self.max_batch:
            raise ValueError(f"{batch} decodes do not fit the buffers made for {self.max_batch}: reserve {batch} first")
        self._planned = shared or self._alone
        self._contexts = context_lens
        units = batch + self.prefixes.sets(batch)
        for reach, cut in self._cuts.items():
            common = self._shared(reach)
            plan[(triton.cdiv(units, PLANNED_UNITS),)](
                context_lens, common.tokens, common.sets, cut.items, cut.pieces, cut.entries, batch, units, self._shares,
                self._programs(batch), KV_HEADS=self._kv_heads, KEYS=self.config.keys, LEAST=self.config.least,
                WINDOW=reach.window, CHUNK=reach.chunk, UNITS=PLANNED_UNITS, COMPARED=COMPARED_UNITS, ITEMS=WRITTEN_ITEMS,
            )  # fmt: skip

    def _shared(self, reach: Reach) -> SharedPrefixes:
        """A row that sees a part has little in common with others, or nothing."""
        return self._planned if reach == Reach() else self._alone

    def run(
        self, layer: int, query: Tensor, block_tables: Tensor, out: Tensor, turn: HeadTurn | None = None,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attend over `layer` of the pool, as planned last.

        query, out: [batch, heads, head_dim], rows may lie apart; block_tables: [batch, any width] int32, rows may lie apart;
        sinks: [heads], where the layer's form has them. The keys and values of this step stand in the pool already; but with
        `turn`, query is the projection, [batch, (heads + 2 * kv_heads) * head_dim]: queries, keys, values. Then they are turned
        and written here.
        """
        layout, config, form = self._pool.layout, self.config, self._forms[layer]
        assert form.sinks == (sinks is not None), "sinks come with the layers that have them"
        cut, members = self._cuts[form.reach], self._shared(form.reach).members
        batch = len(query)
        merge_rows = triton.next_power_of_2(self._group)
        shape = {"GROUP": self._group, "DIM": self._head_dim, "BLOCK_DIM": self._dim}
        launch = {"launch_pdl": True} if config.dependent else {}
        assert turn is None or self._kv_heads * self._head_dim == layout.kv_heads * layout.head_dim, "it writes whole rows"
        turning = (None, None, None) if turn is None else (turn.q_weight, turn.k_weight, turn.table)
        scales = self._pool.scales(layer)
        scale = form.scale * LOG2_E * (1.0 if scales is None else scales[0])
        _attend[(self._programs(batch),)](
            query, *turning, self._contexts, self._pool.data, block_tables, cut.items, members, cut.pieces, cut.entries, sinks,
            out, self._partial, self._lse, self._counters, layer, scale, *(scales or (None, None)),
            0.0 if turn is None else turn.eps, query.stride(0), block_tables.stride(0), out.stride(0), **shape,
            WINDOW=form.reach.window, CHUNK=form.reach.chunk, SOFTCAP=form.softcap or 0.0,
            KV_HEADS=self._kv_heads, ROW=layout.kv_heads * layout.head_dim, KV_BLOCK=layout.block_size, LAYERS=layout.layers,
            ROWS=self._tile, KEYS=config.keys, STAGES=config.stages, MERGE_ROWS=merge_rows,
            MERGE_PIECES=max(1, MERGED_NUMBERS // (merge_rows * self._dim)), ATOMIC=config.atomic,
            DEPENDENT=config.dependent, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps, **launch,
        )  # fmt: skip
        if not config.atomic:
            merge[(batch, self._heads)](
                self._partial, self._lse, sinks, out, cut.pieces, cut.entries, out.stride(0), **shape,
                PIECES=MERGED_NUMBERS // self._dim, DEPENDENT=config.dependent, num_warps=4, **launch,
            )  # fmt: skip
