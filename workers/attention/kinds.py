"""Narrow layers beside others that see all: each by a backend over the pool of its kind, on a CPU. Imports torch, the interface
and the layouts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcache.layout import LayerKinds
from workers.attention.base import AttentionBackend
from workers.step import StepInput


class KindsAttention:
    """Behind the interface of one backend; a layer goes by its number in the model here, in its backend by that among its kind.

    backends: of the layers that see all, and of the narrow ones.
    """

    def __init__(self, backends: Sequence[AttentionBackend], kinds: LayerKinds) -> None:
        self.name = backends[0].name
        self._backends = backends
        self._layers = list(zip(kinds.narrow, kinds.places, strict=True))

    def plan(self, step: StepInput) -> list[Any]:
        return [backend.plan(step.of(narrow)) for backend, narrow in zip(self._backends, (False, True), strict=True)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: list[Any],
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        narrow, place = self._layers[layer]
        return self._backends[narrow].attend(place, query, key, value, step.of(narrow), plan[narrow], sinks)
