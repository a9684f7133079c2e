"""How long a kernel takes, and how fast this device is. Needs a CUDA device; imports torch."""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels.cases import DTYPE

BEYOND_L2_BYTES = 200_000_000
MAX_SETS = 64
RUNS_A_GRAPH = 64
ROUNDS = 7
COMPILERS = 14
Run = Callable[[], object]


def graph_us(runs: list[Run], least: int = RUNS_A_GRAPH, rounds: int = ROUNDS) -> float:
    """Microseconds a run, the median over replays of a graph of all runs, one after another, over and over."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = -(-least // len(runs))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for run in runs:
                run()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1000 / (repeats * len(runs))


def ceilings() -> tuple[float, float]:
    """This device's bytes a microsecond of a large copy, read and written, and its bf16 operations a microsecond."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / graph_us([partial(target.copy_, source)], 4)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=DTYPE) for _ in range(2))
    return copied, 2 * size**3 / graph_us([lambda: a @ b.T], 8)
