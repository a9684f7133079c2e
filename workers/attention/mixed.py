"""Decodes by one backend and chunks by another, where each is the faster. Imports torch and the interface."""

from typing import Any

from torch import Tensor

from workers.attention.base import Chunks, PagedAttention
from workers.kernels.attention.prefixes import SharedPrefixes
from workers.kernels.turn import HeadTurn


class MixedAttention:
    """Two backends over one pool, behind the interface that a GPU's runner calls."""

    def __init__(self, decodes: PagedAttention, chunks: PagedAttention) -> None:
        self.name = f"{decodes.name} for decodes, {chunks.name} for chunks"
        self.prefixes, self.bounds = decodes.prefixes, chunks.bounds
        self._decodes = decodes
        self._chunks = chunks

    def plan_decode(
        self, context_lens: Tensor, batch: int, blocks: int | None = None, shared: SharedPrefixes | None = None
    ) -> Any:
        return self._decodes.plan_decode(context_lens, batch, blocks, shared)

    def turns(self, batch: int) -> bool:
        return self._decodes.turns(batch)

    def decode(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, plan: Any, out: Tensor | None = None,
        turn: HeadTurn | None = None,
    ) -> Tensor:  # fmt: skip
        return self._decodes.decode(layer, query, block_tables, context_lens, plan, out, turn)

    def plan_chunks(self, chunks: Chunks) -> Any:
        return self._chunks.plan_chunks(chunks)

    def chunks(self, layer: int, query: Tensor, plan: Any, out: Tensor | None = None) -> Tensor:
        return self._chunks.chunks(layer, query, plan, out)
