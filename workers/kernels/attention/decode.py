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
from torch import Tensor

from kvcache.pool import KVPool
from workers.kernels.attention.decode_config import DecodeConfig, choose_config
from workers.kernels.attention.form import Form, Reach, plain_forms
from workers.kernels.attention.merge import merge
from workers.kernels.attention.piece import attend_piece
from workers.kernels.attention.plan import COMPARED_UNITS, FIELDS, PLANNED_UNITS, WRITTEN_ITEMS, plan
from workers.kernels.attention.prefixes import NOT_SHARED, SET_FIELDS, PrefixLimits, SharedPrefixes
from workers.kernels.attention.spans import LOG2_E
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.launch import processors

MERGED_NUMBERS = 8192  # of partial results that the merge holds at once


@dataclass(frozen=True, slots=True)
class WorkList:
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
        self._shares = processors(pool.device) * config.shares
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
        self._work: dict[Reach, WorkList] = {}
        for reach in {form.reach for form in self._forms}:
            items = torch.zeros((self._programs(max_batch), FIELDS), dtype=torch.int32, device=device)
            self._work[reach] = WorkList(items, *torch.zeros((2, max_batch), dtype=torch.int32, device=device))

    def reserve(self, max_batch: int) -> None:
        """Make the buffers that grow with the batch. Outside of graphs; those captured before go on with the old buffers."""
        self._kept += self._buffers()
        self._make_rows(max_batch)

    def _buffers(self) -> list[Tensor]:
        lists = [tensor for work in self._work.values() for tensor in (work.items, work.pieces, work.entries)]
        return [self._partial, self._lse, self._counters, self._alone.tokens, *lists]

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
        for reach, work in self._work.items():
            common = self._shared(reach)
            plan[(triton.cdiv(units, PLANNED_UNITS),)](
                context_lens, common.tokens, common.sets, work.items, work.pieces, work.entries, batch, units, self._shares,
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
        work, members = self._work[form.reach], self._shared(form.reach).members
        batch = len(query)
        merge_rows = triton.next_power_of_2(self._group)
        shape = {"GROUP": self._group, "DIM": self._head_dim, "BLOCK_DIM": self._dim}
        launch = {"launch_pdl": True} if config.dependent else {}
        assert turn is None or self._kv_heads * self._head_dim == layout.kv_heads * layout.head_dim, "it writes whole rows"
        turning = (None, None, None) if turn is None else (turn.q_weight, turn.k_weight, turn.table)
        scales = self._pool.scales(layer)
        scale = form.scale * LOG2_E * (1.0 if scales is None else scales[0])
        attend_piece[(self._programs(batch),)](
            query, *turning, self._contexts, self._pool.data, block_tables, work.items, members, work.pieces, work.entries,
            sinks, out, self._partial, self._lse, self._counters, layer, scale, *(scales or (None, None)),
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
                self._partial, self._lse, sinks, out, work.pieces, work.entries, out.stride(0), **shape,
                PIECES=MERGED_NUMBERS // self._dim, DEPENDENT=config.dependent, num_warps=4, **launch,
            )  # fmt: skip
