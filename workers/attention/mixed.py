"""Layers by one backend or another, decodes and chunks each, where each is the faster. Imports torch and the interface."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from workers.attention.base import Chunks, PagedAttention
from workers.kernels.attention.prefixes import NOT_SHARED, SharedPrefixes
from workers.kernels.heads.turn import HeadTurn

Plans = dict[PagedAttention, Any]
"""Of one step, by backend."""


class MixedAttention:
    """Backends over one pool, behind the interface that a GPU's runner calls. decodes, chunks: what attends in each layer."""

    def __init__(self, decodes: Sequence[PagedAttention], chunks: Sequence[PagedAttention]) -> None:
        self.name = f"{_names(decodes)} for decodes, {_names(chunks)} for chunks"
        limits = {backend.prefixes for backend in decodes}
        self.prefixes = limits.pop() if len(limits) == 1 else NOT_SHARED
        self.bounds = all(backend.bounds for backend in chunks)
        self._decodes = decodes
        self._chunks = chunks

    def plan_decode(
        self, context_lens: Tensor, batch: int, blocks: int | None = None, shared: SharedPrefixes | None = None
    ) -> Plans:
        told = shared if self.prefixes != NOT_SHARED else None
        return {backend: backend.plan_decode(context_lens, batch, blocks, told) for backend in dict.fromkeys(self._decodes)}

    def turns(self, batch: int) -> bool:
        return all(backend.turns(batch) for backend in dict.fromkeys(self._decodes))

    def decode(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, plan: Plans, out: Tensor | None = None,
        turn: HeadTurn | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        backend = self._decodes[layer]
        return backend.decode(layer, query, block_tables, context_lens, plan[backend], out, turn, sinks)

    def plan_chunks(self, chunks: Chunks) -> Plans:
        return {backend: backend.plan_chunks(chunks) for backend in dict.fromkeys(self._chunks)}

    def chunks(
        self, layer: int, query: Tensor, plan: Plans, out: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        backend = self._chunks[layer]
        return backend.chunks(layer, query, plan[backend], out, sinks)


def _names(backends: Sequence[PagedAttention]) -> str:
    return " and ".join(dict.fromkeys(backend.name for backend in backends))
