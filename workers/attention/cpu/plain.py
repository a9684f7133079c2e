"""Attention on the CPU in plain torch: correct in every float dtype, needs nothing but torch.

Imports torch, the pool and the step. The compiled kernels of `native` are several times faster where they can be built.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.write import TorchWriter
from workers.step import StepInput


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of the step: where its queries lie in the batch and its keys in the pool."""

    start: int
    stop: int
    context: int
    blocks: Tensor  # [blocks] int64
    mask: Tensor | None  # [stop - start, context] bool; None for a decode, and for a chunk that is the whole context


@dataclass(frozen=True, slots=True)
class CpuPlan:
    targets: Tensor  # [tokens] int64
    sequences: list[SequenceSpan]


class CpuAttention:
    """Plain scaled dot-product attention, sequence by sequence; `varied` has other forms. bf16 and fp16 accumulate in float32,
    float64 stays float64.

    A decode's query heads that share a KV head become the rows of one small matrix, so KV is read once, never repeated.
    """

    name = "cpu"

    def __init__(self, pool: KVPool, heads: int) -> None:
        self._pool = pool
        self._group = heads // pool.layout.kv_heads
        self._writer = TorchWriter(pool)

    def plan(self, step: StepInput) -> CpuPlan:
        layout = self._pool.layout
        sequences, start = [], 0
        tables = torch.from_numpy(step.host_block_tables).long()
        lengths = zip(step.host_query_lens.tolist(), step.host_context_lens.tolist(), strict=True)
        for table, (queries, context) in zip(tables, lengths, strict=True):
            mask = None
            if 1 < queries < context:
                mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
            sequences.append(SequenceSpan(start, start + queries, context, table[: layout.blocks_for(context)], mask))
            start += queries
        return CpuPlan(self._writer.targets(step.slots), sequences)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: StepInput,  # noqa: ARG002
        plan: CpuPlan,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert sinks is None, "of plain layers"
        self._writer.write(layer, key, value, plan.targets)
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        scale, scales = None, self._pool.scales(layer)
        if scales is not None:
            scale = scales[0] * query.shape[-1] ** -0.5
        out = query.new_empty(query.shape)
        for seq in plan.sequences:
            its_keys, its_values = (_context(cache, seq, query.dtype) for cache in (keys, values))
            out[seq.start : seq.stop] = self._attend(query[seq.start : seq.stop], its_keys, its_values, seq.mask, scale)
        return out if scales is None else out.mul_(scales[1])

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """query [queries, heads, head_dim], keys and values [1, kv_heads, context, head_dim] -> like query. scale: of query
        times key; None: 1/sqrt(head_dim)."""
        queries, _, dim = query.shape
        if queries == 1:
            grouped = query.reshape(1, -1, self._group, dim)
            return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).view(1, -1, dim)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=self._group > 1
        )
        return out[0].transpose(0, 1)


def _context(cache: Tensor, seq: SequenceSpan, dtype: torch.dtype) -> Tensor:
    """[block, slot, kv_head, head_dim] -> [1, kv_heads, context, head_dim] in `dtype`: a view of a single block that has it,
    else a copy."""
    blocks = cache[seq.blocks[0]] if len(seq.blocks) == 1 else cache[seq.blocks].flatten(0, 1)
    return blocks[: seq.context].to(dtype).transpose(0, 1)[None]
