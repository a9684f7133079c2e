"""A step's attention as the model calls it, layer by layer: the decodes' and the chunks'. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvcache.layout import LayerKinds
from workers.attention.base import PagedAttention
from workers.kernels.heads.turn import HeadTurn


@dataclass(frozen=True, slots=True)
class DecodeAttend:
    """turns: the model hands over projections; see `workers.model.gpu.fused.Attend`."""

    attention: PagedAttention
    tables: Tensor
    contexts: Tensor
    plan: Any
    turns: bool

    def __call__(
        self, layer: int, query: Tensor, turn: HeadTurn | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        return self.attention.decode(layer, query, self.tables, self.contexts, self.plan, turn=turn, sinks=sinks)


@dataclass(frozen=True, slots=True)
class ChunkAttend:
    attention: PagedAttention
    plan: Any
    turns: bool = False

    def __call__(
        self, layer: int, query: Tensor, turn: HeadTurn | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        assert turn is None, "chunks attend to keys that stand in the pool"
        return self.attention.chunks(layer, query, self.plan, sinks=sinks)


class KindsAttend:
    """Of both kinds of layer: by a layer's number in the model. attends: of those that see all, and of the narrow ones."""

    def __init__(self, attends: "Sequence[DecodeAttend | ChunkAttend]", kinds: LayerKinds) -> None:
        self.turns = all(attend.turns for attend in attends)
        self._attends = attends
        self._layers = list(zip(kinds.narrow, kinds.places, strict=True))

    def __call__(
        self, layer: int, query: Tensor, turn: HeadTurn | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        narrow, place = self._layers[layer]
        return self._attends[narrow](place, query, turn, sinks)
