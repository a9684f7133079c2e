"""Paged attention in Triton: what any CUDA install of torch can run. One kernel attends, one merges splits, one writes KV.

The only file that imports triton. Runs on CUDA, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.write import dense_rows
from workers.execution.step import StepInput

CHUNK_ROWS = 64  # query rows (tokens x heads of the group) of a chunk's tile
MIN_ROWS = 16  # the least that tensor cores take
BLOCK_KEYS = 64
MIN_SPLIT_KEYS = 256  # a split reads at least so many keys, if the block tables are that wide
MAX_SPLITS = 32
INTERPRETED_PROCESSORS = 4


@triton.jit
def _write(key, value, keys, values, slots, key_stride, value_stride, page_stride, PAGE: tl.constexpr, ROW: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """One program writes the key and the value of one token, ROW = kv_heads * head_dim numbers each."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)  # int64, as everything that is multiplied by a page's stride must be
    target = slot // PAGE * page_stride + slot % PAGE * ROW
    at = tl.arange(0, BLOCK)
    mask = at < ROW
    tl.store(keys + target + at, tl.load(key + token * key_stride + at, mask=mask), mask=mask)
    tl.store(values + target + at, tl.load(value + token * value_stride + at, mask=mask), mask=mask)


@triton.jit
def _attend(query, keys, values, out, lse, tiles, query_starts, context_lens, tables, scale, query_stride, page_stride,
            table_stride, slot_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
            ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One program: one tile of query rows x one KV head x one of SPLITS parts of the keys that the tile sees.

    Rows are (token, head of the group), so a KV head is read once for all query heads that share it. KEYS divides PAGE, so
    a block of keys lies in one page. With SPLITS > 1 `out` is [tokens, heads, SPLITS, DIM] float32, with `lse` beside it.
    """
    seq = tl.load(tiles + tl.program_id(0) * 2)
    first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(query_starts + seq)
    count = tl.load(query_starts + seq + 1) - start
    before = tl.load(context_lens + seq) - count  # keys that stand before the sequence's first query

    rows = tl.arange(0, ROWS)
    token = first + rows // GROUP
    valid = (rows < ROWS // GROUP * GROUP) & (token < count)
    index = (start + token).to(tl.int64)
    head = kv * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    q = tl.load(query + index[:, None] * query_stride + head[:, None] * DIM + dims[None, :],
                mask=valid[:, None] & inside[None, :], other=0.0)  # fmt: skip

    seen = before + tl.minimum(first + ROWS // GROUP, count)  # keys that the tile's last token sees
    part = tl.cdiv(tl.cdiv(seen, KEYS), SPLITS) * KEYS
    low = split * part
    high = tl.minimum(low + part, seen)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for block in range(low, high, KEYS):
        page = tl.load(tables + seq.to(tl.int64) * table_stride + block // PAGE).to(tl.int64)
        position = block + tl.arange(0, KEYS)
        written = position < seen  # other slots may hold NaN
        at = page * page_stride + (position % PAGE) * slot_stride + kv * DIM
        k = tl.load(keys + at[None, :] + dims[:, None], mask=written[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(position[None, :] <= (before + token)[:, None], scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        factor = tl.exp2(top - peak)
        weight = weight * factor + tl.sum(p, 1)
        v = tl.load(values + at[:, None] + dims[None, :], mask=written[:, None] & inside[None, :], other=0.0)
        acc = acc * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = peak
    some = tl.where(weight > 0, weight, 1.0)
    acc = acc / some[:, None]
    place = (index * HEADS + head) * SPLITS + split
    tl.store(out + place[:, None] * DIM + dims[None, :], acc.to(out.dtype.element_ty),
             mask=valid[:, None] & inside[None, :])  # fmt: skip
    if SPLITS > 1:  # a split without keys weighs nothing
        tl.store(lse + place, top + tl.log2(some), mask=valid)


@triton.jit
def _merge(partial, lse, out, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One program merges the splits of one (token, head) by their log-sum-exp, in base 2."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    sums = tl.load(lse + row * SPLITS + splits)
    weights = tl.exp2(sums - tl.max(sums, 0))
    parts = tl.load(partial + (row * SPLITS + splits[:, None]) * DIM + dims[None, :], mask=inside[None, :], other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * DIM + dims, merged.to(out.dtype.element_ty), mask=inside)


class TritonWriter:
    """Writes a step's keys and values in one launch a layer."""

    def __init__(self, pool: KVPool) -> None:
        if pool.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError("Triton's kernels need a CUDA device; on a CPU choose the attention backend 'cpu'")
        self._pool = pool

    def rows(self, slots: Tensor) -> Tensor:
        return slots

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor) -> None:
        """key, value [tokens, kv_heads, head_dim], tokens may lie apart; rows [tokens] int64 slots."""
        pool, size = self._pool, self._pool.layout.kv_heads * self._pool.layout.head_dim
        key, value = dense_rows(key), dense_rows(value)
        _write[(len(rows),)](
            key, value, pool.keys(layer), pool.values(layer), rows, key.stride(0), value.stride(0), pool.data.stride(0),
            PAGE=pool.layout.page_size, ROW=size, BLOCK=triton.next_power_of_2(size),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TritonPlan:
    decode_tiles: Tensor  # [decodes, 2] int32
    chunk_tiles: Tensor  # [tiles, 2] int32: sequence, first token
    splits: int  # of a decode's keys, a power of two


class TritonAttention:
    """Split-KV decodes and causal chunks over pages: FlashAttention's online softmax, flash-decoding's merge.

    The launch geometry depends on shapes and query lengths only, never on context lengths: a decode step may be captured
    as a CUDA graph and replayed as contexts grow. Raises ValueError for float64 and for a pool that is not on CUDA.
    """

    name = "triton"

    def __init__(self, pool: KVPool, heads: int) -> None:
        if pool.dtype == torch.float64:
            raise ValueError("Triton's kernels serve bfloat16, float16 and float32, not float64; choose one of them")
        self._pool = pool
        self._heads = heads
        self._group = heads // pool.layout.kv_heads
        self._writer = TritonWriter(pool)
        self._decode_rows = max(MIN_ROWS, triton.next_power_of_2(self._group))
        self._chunk_rows = max(CHUNK_ROWS, self._decode_rows)
        self._processors = INTERPRETED_PROCESSORS
        if pool.device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(pool.device).multi_processor_count

    def plan(self, step: StepInput) -> TritonPlan:
        tokens = self._chunk_rows // self._group
        tiles = [(seq, 0) for seq in range(step.decodes)]
        for seq, count in enumerate(step.host_query_lens[step.decodes :].tolist(), start=step.decodes):
            tiles += [(seq, first) for first in range(0, count, tokens)]
        on_device = torch.tensor(tiles, dtype=torch.int32).view(-1, 2).to(self._pool.device, non_blocking=True)
        return TritonPlan(on_device[: step.decodes], on_device[step.decodes :], self._splits(step))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: TritonPlan
    ) -> Tensor:
        self._writer.write(layer, key, value, step.slots)
        query = dense_rows(query)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        dim, splits = query.shape[2], plan.splits
        if len(plan.chunk_tiles):
            self._launch(layer, query, out, out, step, plan.chunk_tiles, self._chunk_rows, 1)
        if step.decodes and splits == 1:
            self._launch(layer, query, out, out, step, plan.decode_tiles, self._decode_rows, 1)
        elif step.decodes:
            partial = query.new_empty((step.decodes, self._heads, splits, dim), dtype=torch.float32)
            lse = query.new_empty((step.decodes, self._heads, splits), dtype=torch.float32)
            self._launch(layer, query, partial, lse, step, plan.decode_tiles, self._decode_rows, splits)
            _merge[(step.decodes * self._heads,)](
                partial, lse, out, DIM=dim, BLOCK_DIM=triton.next_power_of_2(dim), SPLITS=splits
            )
        return out

    def _launch(
        self, layer: int, query: Tensor, out: Tensor, lse: Tensor, step: StepInput, tiles: Tensor, rows: int, splits: int
    ) -> None:
        layout = self._pool.layout
        keys = self._pool.keys(layer)
        _attend[(len(tiles), layout.kv_heads, splits)](
            query, keys, self._pool.values(layer), out, lse, tiles, step.query_starts, step.context_lens,
            step.block_tables, layout.head_dim**-0.5 * 1.4426950408889634, query.stride(0), keys.stride(0),
            step.block_tables.stride(0), keys.stride(1), HEADS=self._heads, GROUP=self._group, DIM=layout.head_dim,
            PAGE=layout.page_size, ROWS=rows, KEYS=min(BLOCK_KEYS, layout.page_size),
            BLOCK_DIM=max(16, triton.next_power_of_2(layout.head_dim)), SPLITS=splits,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    def _splits(self, step: StepInput) -> int:
        """Enough programs for two on each multiprocessor, unless the splits would become too short."""
        programs = max(1, step.decodes * self._pool.layout.kv_heads)
        wanted = 2 * self._processors // programs
        widest = step.block_tables.shape[1] * self._pool.layout.page_size // MIN_SPLIT_KEYS
        return 1 << (max(1, min(wanted, widest, MAX_SPLITS)).bit_length() - 1)
