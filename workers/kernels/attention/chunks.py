"""Causal attention of prefill chunks over blocks: all chunks of a step, however long, in one launch a layer.

FlashAttention's tiles: so many query rows (tokens x the query heads that share a KV head) against spans of keys, of which
only those at the diagonal, at the end and at the edge of a window carry masks; those before it are not read. Of few tiles the
keys are cut into pieces, whose results the last one merges. The device makes the table of tiles or pieces itself (`tiles`);
the launch geometry depends on the counts of tokens and sequences alone.

Imports torch, triton and the pool. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvcache.pool import KVPool
from workers.kernels.attention.form import Form, Reach, plain_forms
from workers.kernels.attention.merge import merge_tile
from workers.kernels.attention.spans import (
    LOG2_E,
    capped,
    first_peak,
    fitting_keys,
    lowest_seen,
    span_blocks,
    span_bytes,
    span_kv,
)
from workers.kernels.attention.tiles import MOST_CUT_TILES, Tiles, cut_tiles, find_tiles
from workers.kernels.heads.fp8 import query_for_fp8
from workers.kernels.launch import copies_tiles, fitting_stages, has_warpgroups, processors

if TYPE_CHECKING:
    from workers.kernels.attention.specialized import SpecializedChunks

DESCRIBED_DIM = 128  # of heads whose spans are copied faster by descriptors, by 5 to 10%; those of 64 are not


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How chunks are tiled; no field changes what is computed beyond rounding."""

    rows: int = 64  # of a tile: tokens x query heads of a KV head
    keys: int = 64  # of a span
    stages: int = 3  # spans in flight
    warps: int = 4
    described: bool = False  # whole spans are copied by a tensor descriptor of the pool, where they lie within a block
    specialized: bool = False  # by `specialized`, which has 128 rows and two groups of four warps
    shares: int = 1  # pieces wanted for each multiprocessor, where there are fewer programs than those
    least: int = 8  # spans of a piece, at least


SPECIALIZED = ChunkConfig(rows=128, keys=128, stages=2, warps=8, specialized=True)  # the best of three measured


def may_specialize(pool: KVPool, dtype: torch.dtype, head_dim: int, group: int, forms: Sequence[Form]) -> bool:
    """Whether `specialized` takes such heads, of so many queries a KV head, over the pool, and is known to be faster: plain
    layers on Hopper, heads of 128 numbers; with heads of 64 it is slower."""
    return (
        head_dim == DESCRIBED_DIM
        and pool.dtype == dtype
        and dtype.itemsize == 2
        and pool.layout.block_size % SPECIALIZED.keys == 0
        and SPECIALIZED.rows // 2 % group == 0
        and all(form == Form(form.scale) for form in forms)
        and has_warpgroups(pool.device)
    )


def choose_config(pool: KVPool, dtype: torch.dtype, head_dim: int) -> ChunkConfig:
    """The best known for queries of that dtype; heads of more than 128 numbers are as yet unmeasured."""
    config = _measured(dtype, head_dim)
    stages = fitting_stages(
        config.stages, span_bytes(pool, config.keys, head_dim), pool.device, config.rows * head_dim * dtype.itemsize
    )
    described = head_dim == DESCRIBED_DIM and dtype == pool.dtype and dtype.itemsize == 2 and copies_tiles(pool.device)
    return replace(config, stages=stages, described=described)


def _measured(dtype: torch.dtype, head_dim: int) -> ChunkConfig:
    """On an H200."""
    if dtype == torch.float32:  # a dot in full precision takes its operands into registers
        return ChunkConfig(rows=32, keys=16, stages=2)
    keys = fitting_keys(ChunkConfig().keys, head_dim)
    return ChunkConfig(rows=64 if head_dim <= 256 else 32, keys=keys, warps=8 if head_dim > 128 else 4)


@triton.jit
def _fold(q, k, v, lowest, seen, position, top, weight, acc, scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """One span into the online softmax, in base 2. lowest, seen: each row sees the keys from the one up to the other; lowest is
    None where rows see all that came before. k, v: as in a decode."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP > 0:
        scores = capped(scores * scale, SOFTCAP)
        scale = 1.0
    if MASKED:
        within = position[None, :] < seen[:, None]
        if lowest is not None:
            within = within & (position[None, :] >= lowest[:, None])
        scores = tl.where(within, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - peak[:, None])
    factor = tl.exp2(top - peak)
    weight = weight * factor + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return peak, weight, acc


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend(query, pool, spans_at, tables, tiles, contexts, sinks, out, partial, sums, counters, layer, scale, value_scale,
            query_stride, table_stride, out_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
            ROW: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, KV_BLOCK: tl.constexpr,
            LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One program: one tile of query rows x one KV head, or one of its pieces, where there is `partial`. value_scale: of a pool
    in FP8, None for another. spans_at: a descriptor of the pool, None where spans are read by pointers."""
    at = tiles + tl.program_id(0) // KV_HEADS * (4 if partial is None else 8)
    head = tl.program_id(0) % KV_HEADS
    seq = tl.load(at)
    if seq < 0:
        return
    first = tl.load(at + 1)
    index = tl.load(at + 2)
    before = tl.load(at + 3)
    context = tl.load(contexts + seq)
    TOKENS: tl.constexpr = ROWS // GROUP
    KV_BLOCK_ROWS: tl.constexpr = LAYERS * 2 * KV_BLOCK

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    token = rows // GROUP
    last = tl.minimum(TOKENS, context - before - first)  # tokens of the tile
    real = (token < last)[:, None] & (dims < DIM)[None, :]
    columns = (head * GROUP + rows % GROUP) * DIM
    q = tl.load(query + (index + token).to(tl.int64)[:, None] * query_stride + columns[:, None] + dims[None, :],
                mask=real, other=0.0)  # fmt: skip
    if value_scale is not None:
        q = query_for_fp8(q)
    seen = before + first + token + 1
    heads = head * GROUP + rows % GROUP
    top, weight = first_peak(sinks, heads, rows < TOKENS * GROUP)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    table = tables + seq.to(tl.int64) * table_stride
    base = layer * (2 * KV_BLOCK)
    full = (before + first + 1) // KEYS  # spans that every row sees wholly, but for what lies before its window
    spans = tl.cdiv(before + first + last, KEYS)
    begin, lowest, least = 0, None, None
    if WINDOW > 0 or CHUNK > 0:
        lowest = lowest_seen(before + first + token, WINDOW, CHUNK)
        least = lowest_seen(before + first, WINDOW, CHUNK)  # of the tile
        begin = least // KEYS
    if partial is not None:
        piece = tl.load(at + 4)
        pieces = tl.load(at + 5)
        place = tl.load(at + 6) * KV_HEADS + head  # of the tile's first piece
        if pieces > 1:  # the merge begins with the sinks
            top, weight = first_peak(None, heads, rows < TOKENS * GROUP)
        cut = spans - begin
        spans = begin + (piece + 1) * cut // pieces
        begin += piece * cut // pieces
        full = tl.minimum(full, spans)
    # a span's block is read one span ahead, as in a decode; of a piece in which nothing is, none past the table
    block = span_blocks(table, tl.maximum(tl.minimum(begin, spans - 1), 0), least, context, KV_BLOCK, KEYS)
    if WINDOW > 0 or CHUNK > 0:
        edge = tl.minimum(tl.cdiv(lowest_seen(before + first + last - 1, WINDOW, CHUNK), KEYS), full)
        for span in tl.range(begin, edge, num_stages=1):
            k, v = span_kv(pool, block, span, base, head, least, context, dims, DIM, ROW, KV_BLOCK, KV_BLOCK_ROWS, KEYS, True)
            block = span_blocks(table, tl.minimum(span + 1, spans - 1), least, context, KV_BLOCK, KEYS)
            position = span * KEYS + tl.arange(0, KEYS)
            top, weight, acc = _fold(q, k, v, lowest, seen, position, top, weight, acc, scale, True, SOFTCAP, PRECISION)
        begin = tl.maximum(begin, edge)
    for span in tl.range(begin, full, num_stages=STAGES):
        if spans_at is None:
            k, v = span_kv(pool, block, span, base, head, None, context, dims, DIM, ROW, KV_BLOCK, KV_BLOCK_ROWS, KEYS, False)
        else:
            row = block * KV_BLOCK_ROWS + base + span * KEYS % KV_BLOCK
            k = spans_at.load([row, head * DIM])
            v = spans_at.load([row + KV_BLOCK, head * DIM])
        block = span_blocks(table, tl.minimum(span + 1, spans - 1), least, context, KV_BLOCK, KEYS)
        top, weight, acc = _fold(q, k, v, None, seen, seen, top, weight, acc, scale, False, SOFTCAP, PRECISION)
    for span in tl.range(tl.maximum(begin, full), spans, num_stages=1):
        k, v = span_kv(pool, block, span, base, head, least, context, dims, DIM, ROW, KV_BLOCK, KV_BLOCK_ROWS, KEYS, True)
        block = span_blocks(table, tl.minimum(span + 1, spans - 1), least, context, KV_BLOCK, KEYS)
        position = span * KEYS + tl.arange(0, KEYS)
        top, weight, acc = _fold(q, k, v, lowest, seen, position, top, weight, acc, scale, True, SOFTCAP, PRECISION)
    if partial is None:
        acc = acc / weight[:, None]
    else:  # a row may see nothing of a piece
        some = tl.where(weight > 0, weight, 1.0)
        acc = acc / some[:, None]
    if value_scale is not None:
        acc *= value_scale
    if partial is not None:
        whole = pieces == 1
        if pieces > 1:
            own = (place + piece * KV_HEADS).to(tl.int64) * ROWS + rows
            tl.store(partial + own[:, None] * BLOCK_DIM + dims[None, :], acc)
            tl.store(sums + own, top + tl.log2(some))
            tl.debug_barrier()  # every thread's stores come before the count
            whole = tl.atomic_add(counters + place, 1, sem="acq_rel") == pieces - 1
            if whole:
                tl.store(counters + place, 0)
                top, weight = first_peak(sinks, heads, rows < TOKENS * GROUP)
                acc = merge_tile(partial, sums, place, pieces, top, weight, KV_HEADS, ROWS, BLOCK_DIM)
        real = real & whole
    tl.store(out + (index + token).to(tl.int64)[:, None] * out_stride + columns[:, None] + dims[None, :],
             acc.to(out.dtype.element_ty), mask=real)  # fmt: skip


def _described(pool: KVPool, keys: int, head_dim: int) -> TensorDescriptor | None:
    """Of all rows of the pool, in parts of `keys` of one head; None where spans are longer than a block."""
    layout, data = pool.layout, pool.data
    if keys > layout.block_size:
        return None
    width = layout.kv_heads * layout.head_dim
    return TensorDescriptor(data, [data.numel() // width, width], [width, 1], [keys, head_dim])


def _specialized(pool: KVPool, config: ChunkConfig, kv_heads: int, dim: int) -> "SpecializedChunks":
    from workers.kernels.attention.specialized import SpecializedChunks  # needs Gluon, which only what it runs on surely has

    return SpecializedChunks(pool, config.keys, config.stages, kv_heads, dim)


class ChunkAttention:
    """Causal attention of chunks over one rank's pool. heads: query heads of this rank. forms: of each layer, None: plain.
    kv_heads, head_dim: as in `DecodeAttention`. dtype: of queries, None: the pool's.

    Safety: block_tables name blocks of the pool for what is seen of each sequence's context, whose keys and values stand there
    already.
    """

    def __init__(
        self, pool: KVPool, heads: int, config: ChunkConfig | None = None, forms: Sequence[Form] | None = None,
        kv_heads: int | None = None, head_dim: int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        layout = pool.layout
        self._pool = pool
        self._forms = forms or plain_forms(layout.layers, layout.head_dim)
        self._kv_heads, self._head_dim = kv_heads or layout.kv_heads, head_dim or layout.head_dim
        self._group = heads // self._kv_heads
        self._dim = max(16, triton.next_power_of_2(self._head_dim))
        dtype = dtype or pool.dtype
        if config is None and may_specialize(pool, dtype, self._head_dim, self._group, self._forms):
            config = SPECIALIZED
        self.config = config = config or choose_config(pool, dtype, self._head_dim)
        self._specialized = _specialized(pool, config, self._kv_heads, self._dim) if config.specialized else None
        self._whole = self._tiling(config)
        self._cut = self._tiling(choose_config(pool, dtype, self._head_dim)) if config.specialized else self._whole
        self._shares = processors(pool.device) * config.shares
        reaches = {form.reach for form in self._forms}
        self._reach = reaches.pop() if len(reaches) == 1 else Reach()

    def _tiling(self, config: ChunkConfig) -> "_Tiling":
        described = config.described and self._head_dim == self._dim  # padded heads reach into their neighbours
        rows = max(config.rows, triton.next_power_of_2(self._group))
        return _Tiling(config, rows, rows // self._group, _described(self._pool, config.keys, self._dim) if described else None)

    def plan(self, query_starts: Tensor, context_lens: Tensor, tokens: int) -> Tiles:
        """The table of tiles, for all layers of a step. A captured plan follows what the tensors say when it is replayed.

        query_starts: [seqs + 1] int32, prefix sums that begin with the first chunk's row in the query; context_lens: [seqs]
        int32, the chunks' own tokens counted; tokens: at least the chunks' tokens.
        """
        cut, seqs = self._cut, len(context_lens)
        few = tokens // cut.tokens * self._kv_heads < self._shares and tokens // cut.tokens + seqs <= MOST_CUT_TILES
        if not few:
            return find_tiles(query_starts, context_lens, tokens, tile_tokens=self._whole.tokens)
        return cut_tiles(
            query_starts, context_lens, tokens, tile_tokens=cut.tokens, rows=cut.rows, kv_heads=self._kv_heads, dim=self._dim,
            keys=cut.config.keys, shares=self._shares, least=cut.config.least, reach=self._reach,
        )  # fmt: skip

    def run(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, tiles: Tiles, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """query, out: [tokens, heads, head_dim], rows may lie apart; block_tables: [seqs, any width] int32, the same; sinks:
        [heads], where the layer's form has them."""
        layout, form = self._pool.layout, self._forms[layer]
        assert form.sinks == (sinks is not None), "sinks come with the layers that have them"
        partials = tiles.partials
        if self._specialized is not None and partials is None:
            self._specialized.run(layer, query, block_tables, context_lens, tiles.table, out, form.scale * LOG2_E)
            return
        tiling = self._whole if partials is None else self._cut
        config = tiling.config
        parts = (None, None, None) if partials is None else (partials.out, partials.sums, partials.counters)
        key_scale, value_scale = self._pool.scales(layer) or (1.0, None)
        _attend[(len(tiles) * self._kv_heads,)](
            query, self._pool.data, tiling.spans_at, block_tables, tiles.table, context_lens, sinks, out, *parts, layer,
            form.scale * LOG2_E * key_scale, value_scale, query.stride(0), block_tables.stride(0), out.stride(0),
            KV_HEADS=self._kv_heads, GROUP=self._group, DIM=self._head_dim, ROW=layout.kv_heads * layout.head_dim,
            WINDOW=form.reach.window, CHUNK=form.reach.chunk, SOFTCAP=form.softcap or 0.0, KV_BLOCK=layout.block_size,
            LAYERS=layout.layers, ROWS=tiling.rows, BLOCK_DIM=self._dim, KEYS=config.keys, STAGES=config.stages,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=config.warps,
        )  # fmt: skip


class _Tiling(NamedTuple):
    """rows: of a tile, of so many tokens. spans_at: as in `_attend`."""

    config: ChunkConfig
    rows: int
    tokens: int
    spans_at: TensorDescriptor | None
