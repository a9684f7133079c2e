"""Attention on the CPU in plain torch: correct in every float dtype, needs nothing but torch.

Imports torch, the pool and the step. The compiled kernels of `native` are several times faster where a compiler is at hand.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool
from workers.step import StepInput


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of the step: where its queries lie in the batch and its keys in the pool."""

    start: int
    stop: int
    context: int
    pages: Tensor  # [pages] int64
    mask: Tensor | None  # [stop - start, context] bool; None where the queries see everything or the chunk is the whole context


@dataclass(frozen=True, slots=True)
class CpuPlan:
    rows: Tensor  # [tokens] int64, the slots as rows of the pool seen as [rows, kv_heads, head_dim], relative to layer and k|v
    sequences: list[Sequence]


class CpuAttention:
    """Scaled dot-product attention, sequence by sequence. bf16 and fp16 accumulate in float32, float64 stays float64.

    A decode's query heads that share a KV head become the rows of one small matrix, so KV is read once and never repeated.
    """

    name = "cpu"

    def __init__(self, pool: KVPool, heads: int) -> None:
        layout = pool.layout
        self._pool = pool
        self._group = heads // layout.kv_heads
        self._rows_per_page = layout.layers * 2 * layout.page_size
        rows = pool.data.view(-1, layout.kv_heads, layout.head_dim)
        self._key_rows = [rows[2 * layer * layout.page_size :] for layer in range(layout.layers)]
        self._value_rows = [rows[(2 * layer + 1) * layout.page_size :] for layer in range(layout.layers)]

    def plan(self, step: StepInput) -> CpuPlan:
        layout = self._pool.layout
        pages, offsets = step.slots // layout.page_size, step.slots % layout.page_size
        sequences, start = [], 0
        tables = torch.from_numpy(step.host_block_tables).long()
        lengths = zip(step.host_query_lens.tolist(), step.host_context_lens.tolist(), strict=True)
        for table, (queries, context) in zip(tables, lengths, strict=True):
            mask = None
            if 1 < queries < context:
                mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
            sequences.append(Sequence(start, start + queries, context, table[: layout.pages_for(context)], mask))
            start += queries
        return CpuPlan(pages * self._rows_per_page + offsets, sequences)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: CpuPlan) -> Tensor:  # noqa: ARG002
        self._key_rows[layer].index_copy_(0, plan.rows, key)
        self._value_rows[layer].index_copy_(0, plan.rows, value)
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        out = torch.empty_like(query)
        for seq in plan.sequences:
            k, v = _context(keys, seq), _context(values, seq)
            attend = self._attend_one if seq.stop - seq.start == 1 else self._attend_chunk
            out[seq.start : seq.stop] = attend(query[seq.start : seq.stop], k, v, seq.mask)
        return out

    def _attend_one(self, query: Tensor, keys: Tensor, values: Tensor, _mask: None) -> Tensor:
        """query [1, heads, head_dim], keys and values [1, kv_heads, context, head_dim] -> [1, heads, head_dim]."""
        grouped = query.view(1, -1, self._group, query.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values).view(query.shape)

    def _attend_chunk(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """query [queries, heads, head_dim], keys and values [1, kv_heads, context, head_dim] -> like query."""
        q = query.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=self._group > 1)
        return out[0].transpose(0, 1)


def _context(cache: Tensor, seq: Sequence) -> Tensor:
    """[page, slot, kv_head, head_dim] -> [1, kv_heads, context, head_dim]: a view of a single page, a copy of several."""
    pages = cache[seq.pages[0]] if len(seq.pages) == 1 else cache[seq.pages].flatten(0, 1)
    return pages[: seq.context].transpose(0, 1)[None]
