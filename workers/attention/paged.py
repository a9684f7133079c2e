"""Attention without writing, as the GPU's runner wants it: decodes driven by device tensors alone, and ragged chunks.

Imports torch, the pool, the decode kernel and the backends.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.flash import FlashAttention, FlashKernels, load_kernels
from workers.execution.step import StepInput


class PagedAttention(Protocol):
    """Paged attention over one rank's shard of the pool. The step's keys and values have been written before each call."""

    name: str

    def plan_decode(self, contexts: Tensor, batch: int) -> Any:
        """Once a step, on the device. contexts: [batch] int32 tokens that each row sees."""
        ...

    def decode(self, layer: int, query: Tensor, tables: Tensor, contexts: Tensor, out: Tensor, plan: Any) -> None:
        """query, out [batch, heads, head_dim]; tables [batch, pages] int32; contexts [batch] int32. May be captured."""
        ...

    def plan_chunks(self, step: StepInput) -> Any:
        """Once a step of chunks alone (`decodes` is 0)."""
        ...

    def chunks(self, layer: int, query: Tensor, step: StepInput, plan: Any) -> Tensor:
        """query [tokens, heads, head_dim] -> the same shape; causal."""
        ...


class FlashPaged:
    """flash-attn's kernels."""

    name = "flash"

    def __init__(self, pool: KVPool, kernels: FlashKernels) -> None:
        self._pool = pool
        self._kernels = kernels
        self._whole = FlashAttention(pool, kernels)

    def plan_decode(self, contexts: Tensor, batch: int) -> Any:
        return None

    def decode(self, layer: int, query: Tensor, tables: Tensor, contexts: Tensor, out: Tensor, plan: Any) -> None:
        from flash_attn import flash_attn_with_kvcache

        out.copy_(flash_attn_with_kvcache(
            query[:, None], self._pool.keys(layer), self._pool.values(layer), cache_seqlens=contexts, block_table=tables,
            causal=True,
        )[:, 0])  # fmt: skip

    def plan_chunks(self, step: StepInput) -> Any:
        return self._whole.plan(step)

    def chunks(self, layer: int, query: Tensor, step: StepInput, plan: Any) -> Tensor:
        return self._kernels.chunk(query, self._pool.keys(layer), self._pool.values(layer), plan)


class TritonPaged:
    """Our own kernels."""

    name = "triton"

    def __init__(self, pool: KVPool, heads: int, most: int) -> None:
        from workers.attention.triton import TritonAttention
        from workers.kernels.decode_attention import DecodeAttention

        self._decodes = DecodeAttention(pool, heads, most)
        self._chunks = TritonAttention(pool, heads)

    def plan_decode(self, contexts: Tensor, batch: int) -> Any:
        self._decodes.plan(contexts, batch)

    def decode(self, layer: int, query: Tensor, tables: Tensor, contexts: Tensor, out: Tensor, plan: Any) -> None:
        self._decodes.run(layer, query, tables, out)

    def plan_chunks(self, step: StepInput) -> Any:
        return self._chunks.plan(step)

    def chunks(self, layer: int, query: Tensor, step: StepInput, plan: Any) -> Tensor:
        out = torch.empty_like(query)
        chunks = self._chunks
        chunks._launch(layer, query, out, out, step, plan.chunk_tiles, chunks._chunk_rows, 1)
        return out


def select_paged(name: str, pool: KVPool, heads: int, most: int) -> PagedAttention:
    if name in ("auto", "flash"):
        try:
            return FlashPaged(pool, load_kernels())
        except ImportError:
            if name == "flash":
                raise
    return TritonPaged(pool, heads, most)
