"""CUDA graphs of whole decode steps, one for each size of a ladder. Imports torch.

A graph replays the launches of one step, so a step costs the host one call. Sizes between two rungs are padded up to the next.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Decode = Callable[[int], Tensor]
"""Launches a decode step of so many sequences; returns its logits. The host must not wait in it."""

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and loaded, libraries choose and allocate what they need."""


def ladder(most: int) -> tuple[int, ...]:
    """Sizes for batches up to `most`: all up to 8, then so few that capture takes seconds; padding stays below a fifth."""
    rungs = [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    rungs += range(288, 513, 32)
    rungs += range(576, most + 64, 64)
    return (*(rung for rung in rungs if rung < most), most)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """One captured decode step. logits: [size, vocab] where the graph leaves them, until any graph of the set is replayed."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Graphs of one function, for all `sizes`, in one memory pool: only one of them runs at a time.

    Invariant: what the function reads and writes lies at the same addresses at each call, but for what it allocates itself.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._captured: dict[int, CapturedStep] = {}

    def fit(self, batch: int) -> int:
        """The smallest size that holds `batch` sequences."""
        return self.sizes[bisect.bisect_left(self.sizes, batch)]

    def capture(self, decode: Decode, captured: Callable[[int], None] = lambda _: None) -> None:
        """Captures all sizes, the largest first, so that the smaller ones fit into its memory. captured: told how many are."""
        for done, size in enumerate(reversed(self.sizes), start=1):
            self._captured[size] = self._capture(decode, size)
            captured(done)

    def _capture(self, decode: Decode, size: int) -> CapturedStep:
        for _ in range(WARM_UPS if size == self.sizes[-1] else 1):
            decode(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph: it collects garbage at each entry, which takes longer than the capture
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = decode(size)
            finally:
                graph.capture_end()
        return CapturedStep(graph, logits)

    def replay(self, size: int) -> Tensor:
        """Launches the step of that size on the current stream. Returns its logits."""
        step = self._captured[size]
        step.graph.replay()
        return step.logits
