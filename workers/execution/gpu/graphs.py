"""CUDA graphs of whole steps, one for each size of a ladder. Imports torch.

A graph replays the launches of one step, so a step costs the host one call. Sizes between two rungs are padded up to the next.
"""

import bisect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Launch = Callable[[int], Tensor]
"""Launches a step of that size; returns its logits. The host must not wait in it."""

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and loaded, libraries choose and allocate what they need."""


def ladder(most: int) -> tuple[int, ...]:
    """Sizes for batches up to `most`: all up to 8, then so few that capture takes seconds; padding stays below a fifth."""
    rungs = [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    rungs += range(288, 513, 32)
    rungs += range(576, most + 64, 64)
    return (*(rung for rung in rungs if rung < most), most)


SMALL_STEP = 2048
"""Prefill tokens up to which our own attention is as fast as flash-attn's, whose launch geometry wants bounds on lengths."""


def chunk_ladder(most: int) -> tuple[int, ...]:
    """Prefill tokens of a step, up to `most`. Launched one by one the kernels of 8,192 tokens take the host 24 ms, the device
    less."""
    rungs = [16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, SMALL_STEP]
    rungs += [*range(2560, 4097, 512), *range(5120, 8193, 1024)]
    return tuple(rung for rung in rungs if rung <= most) or (most,)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """One captured step. logits: [samples, vocab] where the graph leaves them, until any graph of the set is replayed."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class StepGraphs:
    """Graphs of one function, for all `sizes`, in one memory pool: only one of them runs at a time.

    Invariant: what the function reads and writes lies at the same addresses at each call, but for what it allocates itself.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._captured: dict[int, CapturedStep] = {}

    def fit(self, size: int) -> int | None:
        """The smallest one captured that holds so much; None if none does."""
        at = bisect.bisect_left(self.sizes, size)
        return self.sizes[at] if at < len(self.sizes) else None

    def capture(
        self, launch: Launch, captured: Callable[[int], None] = lambda _: None, prepare: Callable[[int], None] = lambda _: None,
        warming: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """Captures all sizes, the largest first, so that the smaller ones fit into its memory. captured: told how many are.
        prepare: called before each size, whose inputs must make sense when it is warmed up. warming: what it is warmed up in,
        where `launch` may do less, if each of its kernels is among that."""
        for done, size in enumerate(reversed(self.sizes), start=1):
            prepare(size)
            with warming():
                for _ in range(WARM_UPS if size == self.sizes[-1] else 1):
                    launch(size)
            self._captured[size] = self._capture(launch, size)
            captured(done)

    def _capture(self, launch: Launch, size: int) -> CapturedStep:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph: it collects garbage at each entry, which takes longer than the capture
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = launch(size)
            finally:
                graph.capture_end()
        return CapturedStep(graph, logits)

    def replay(self, size: int) -> Tensor:
        """Launches the step of that size on the current stream. Returns its logits."""
        step = self._captured[size]
        step.graph.replay()
        return step.logits
