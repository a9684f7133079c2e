"""Paged attention in Triton, what any CUDA install of torch can run: the backend over `workers.kernels`, and the KV write.

Runs on CUDA, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.base import Chunks
from workers.attention.forms import Form, HeadShape
from workers.attention.write import dense_rows
from workers.kernels.attention.chunks import ChunkAttention
from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import FEW_ROWS, SOME_ROWS
from workers.kernels.attention.prefixes import SharedPrefixes
from workers.kernels.attention.tiles import Tiles
from workers.kernels.heads.finite import finite
from workers.kernels.heads.fp8 import stored
from workers.kernels.heads.turn import HeadTurn
from workers.step import StepInput

TURNED_ROWS = 32
"""Decodes up to which a launch of their own for norms, rotation and KV write costs more than to do it in the attention."""
FIRST_BATCH = 64  # rows that the decode buffers are made for at first


@triton.jit
def _write(key, value, keys, values, slots, key_stride, value_stride, block_stride, key_scale, value_scale,
           KV_BLOCK: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program writes the key and the value of one token, ROW = kv_heads * head_dim numbers each. key_scale, value_scale: of
    a pool in FP8, None for another."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)  # int64, as everything that is multiplied by a block's stride must be
    target = slot // KV_BLOCK * block_stride + slot % KV_BLOCK * ROW
    at = tl.arange(0, BLOCK)
    mask = at < ROW
    kept = tl.load(key + token * key_stride + at, mask=mask)
    if key_scale is not None:
        kept = stored(kept, key_scale)
    tl.store(keys + target + at, kept, mask=mask)
    kept = tl.load(value + token * value_stride + at, mask=mask)
    kept = finite(kept) if value_scale is None else stored(kept, value_scale)
    tl.store(values + target + at, kept, mask=mask)


class TritonWriter:
    """Writes a step's keys and values in one launch a layer."""

    def __init__(self, pool: KVPool) -> None:
        if pool.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError("Triton's kernels need a CUDA device; on a CPU choose the attention backend 'cpu'")
        self._pool = pool

    def targets(self, slots: Tensor) -> Tensor:
        return slots

    def write(self, layer: int, key: Tensor, value: Tensor, targets: Tensor) -> None:
        """key, value [tokens, kv_heads, head_dim], tokens may lie apart; targets [tokens] int64 slots."""
        pool, size = self._pool, self._pool.layout.kv_heads * self._pool.layout.head_dim
        key, value = dense_rows(key), dense_rows(value)
        _write[(len(targets),)](
            key, value, pool.keys(layer), pool.values(layer), targets, key.stride(0), value.stride(0), pool.data.stride(0),
            *(pool.scales(layer) or (None, None)), KV_BLOCK=pool.layout.block_size, ROW=size,
            BLOCK=triton.next_power_of_2(size),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    tiles: Tiles
    contexts: Tensor  # [chunks] int32
    tables: Tensor  # [chunks, width] int32


@dataclass(frozen=True, slots=True)
class TritonPlan:
    decodes: int
    chunks: ChunkPlan | None  # its tiles index the whole step's query


class TritonAttention:
    """The backend over `workers.kernels`: decodes cut into pieces on the device, causal chunks in tiles; layers of any form.

    Everything that it launches depends on counts of rows and tokens only, never on context lengths. `reserve` the largest
    batch before graphs are captured. dtype: of queries, None: the pool's. Raises ValueError for float64 and for a pool that is
    not on CUDA.
    """

    name = "triton"
    bounds = True

    def __init__(
        self, pool: KVPool, heads: int, max_batch: int = FIRST_BATCH, forms: Sequence[Form] | None = None,
        shape: HeadShape | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """forms: of each layer, None: plain. shape: of the heads of the layers that it is asked for, keys and values alike;
        None: the pool's, and only then it writes. dtype: of queries, None: the pool's."""
        self._pool = pool
        self._heads = heads
        self._head_dim = shape.key_dim if shape is not None else pool.layout.head_dim
        kv_heads, dim = (None, None) if shape is None else (shape.kv_heads, shape.key_dim)
        self._writer = TritonWriter(pool)
        sizes = FEW_ROWS, SOME_ROWS, max(max_batch, SOME_ROWS + 1)
        self._decode = [DecodeAttention(pool, heads, rows, None, forms, kv_heads, dim, dtype) for rows in sizes]
        self._chunk = ChunkAttention(pool, heads, None, forms, kv_heads, dim, dtype)
        self.prefixes = self._decode[0].prefixes  # of all: they depend on the pool and the heads alone

    @property
    def memory_bytes(self) -> int:
        """Of the buffers that decodes work in, on the device."""
        return sum(decode.memory_bytes for decode in self._decode)

    def reserve(self, max_batch: int) -> None:
        """Make room for so many decodes at once; never within a capture."""
        if max_batch > self._decode[-1].max_batch:
            self._decode[-1].reserve(max_batch)

    def plan(self, step: StepInput) -> TritonPlan:
        if step.decodes:
            self.plan_decode(step.context_lens, step.decodes)
        if step.decodes == len(step.host_query_lens):
            return TritonPlan(step.decodes, None)
        starts, contexts = step.query_starts[step.decodes :], step.context_lens[step.decodes :]
        tiles = self._chunk.plan(starts, contexts, len(step.tokens) - step.decodes)
        return TritonPlan(step.decodes, ChunkPlan(tiles, contexts, step.block_tables[step.decodes :]))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: TritonPlan,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self._writer.write(layer, key, value, step.slots)
        query = dense_rows(query)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if plan.chunks is not None:
            self.chunks(layer, query, plan.chunks, out, sinks)
        if plan.decodes:
            rows = slice(plan.decodes)
            self.decode(layer, query[rows], step.block_tables[rows], step.context_lens[rows], plan, out[rows], sinks=sinks)
        return out

    def plan_decode(
        self, context_lens: Tensor, batch: int, blocks: int | None = None, shared: SharedPrefixes | None = None  # noqa: ARG002
    ) -> TritonPlan:
        """Raises ValueError where a capture would have to make room for more rows than were reserved."""
        if batch > self._decode[-1].max_batch and not (context_lens.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.reserve(triton.next_power_of_2(batch))
        self._of(batch).plan(context_lens, batch, shared)
        return TritonPlan(batch, None)

    def turns(self, batch: int) -> bool:
        return batch <= TURNED_ROWS

    def decode(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, plan: TritonPlan,  # noqa: ARG002
        out: Tensor | None = None, turn: HeadTurn | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        query = query if turn is not None else dense_rows(query)
        if out is None:
            out = torch.empty((len(query), self._heads, self._head_dim), dtype=query.dtype, device=query.device)
        self._of(len(query)).run(layer, query, block_tables, out, turn, sinks)
        return out

    def _of(self, batch: int) -> DecodeAttention:
        """The one that is made for so many rows."""
        return next((decode for decode in self._decode if batch <= decode.max_batch), self._decode[-1])

    def plan_chunks(self, chunks: Chunks) -> ChunkPlan:
        tiles = self._chunk.plan(chunks.query_starts, chunks.context_lens, chunks.tokens)
        return ChunkPlan(tiles, chunks.context_lens, chunks.block_tables)

    def chunks(
        self, layer: int, query: Tensor, plan: ChunkPlan, out: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        query = dense_rows(query)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        self._chunk.run(layer, query, plan.tables, plan.contexts, plan.tiles, out, sinks)
        return out
