"""Sums over the GPUs of one host, by size: NCCL, and a kernel over their joined memory, alone and with what follows a product.

    python -m benchmarks.gpu.all_reduce --ranks 2 [--json]

A process for each rank, which sees one GPU; bf16; times are of CUDA graphs of 100 calls one after another, the slowest rank's,
in microseconds a call. `one` and `two` are one meeting and two; `norm` adds the residual and RMSNorm to NCCL's sum, a launch
of its own, and `one + norm` is the one kernel. Before that each kernel's sum is compared with all parts added in rank order,
bit by bit, and each rank's with the first one's.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.options import positive
from benchmarks.shared.report import table

SIZES = [(rows, width) for width in (1024, 4096, 8192) for rows in (1, 8, 32, 64, 128)]
CALLS, ROUNDS = 100, 5
EPS = 1e-6
WAYS = ("nccl", "one", "two", "nccl + norm", "one + norm", "two + norm")

Figures = dict[str, dict[str, float]]


def measure_rank(rank: int, size: int, address: str, pipe: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    from workers.parallel.connect import TorchGroup, connect

    device = torch.device("cuda", 0)
    comm = connect(rank, size, device=device, address=address, timeout_s=300.0, custom_all_reduce=True)
    assert isinstance(comm, TorchGroup)
    if comm.peers is None:
        pipe.send("the ranks do not reach each other's memory (the log says why)")
        return
    figures: Figures = {}
    for rows, width in SIZES:
        check(comm, rows, width)
        figures[f"{rows} x {width}"] = {way: time_us(comm, launch) for way, launch in ways(comm, rows, width).items()}
    pipe.send(figures)
    pipe.recv()
    comm.close()


def ways(comm: Any, rows: int, width: int) -> dict[str, Callable[[], object]]:
    from workers.kernels.rows.norm import add_rms_norm
    from workers.kernels.rows.reduce import sum_add_rms_norm, sum_rows

    x, hidden, weight = numbers(comm.rank, rows, width), numbers(-1, rows, width), numbers(-2, 1, width)[0]
    x.mul_(0.0)  # summed again and again, in place
    peers, nccl = comm.peers, comm._group
    return {
        "nccl": lambda: nccl.allreduce([x]),
        "one": lambda: sum_rows(peers, x, two_shot=False),
        "two": lambda: sum_rows(peers, x, two_shot=True),
        "nccl + norm": lambda: (nccl.allreduce([x]), add_rms_norm(hidden, x, weight, EPS)),
        "one + norm": lambda: sum_add_rms_norm(peers, x, hidden, weight, EPS, two_shot=False),
        "two + norm": lambda: sum_add_rms_norm(peers, x, hidden, weight, EPS, two_shot=True),
    }


def check(comm: Any, rows: int, width: int) -> None:
    from workers.kernels.rows.norm import add_rms_norm
    from workers.kernels.rows.reduce import sum_add_rms_norm, sum_rows
    from workers.parallel.in_process import sum_in_rank_order

    mine = numbers(comm.rank, rows, width)
    parts = list(comm.all_gather(mine).clone())
    total = sum_in_rank_order(parts, torch.empty_like(mine))
    weight = numbers(-2, 1, width)[0]
    hidden = numbers(-1, rows, width)
    normed = add_rms_norm(hidden, total, weight, EPS)
    for two_shot in (False, True):
        assert torch.equal(sum_rows(comm.peers, mine.clone(), two_shot=two_shot), total), (rows, width, two_shot)
        ours = numbers(-1, rows, width)
        assert torch.equal(sum_add_rms_norm(comm.peers, mine, ours, weight, EPS, two_shot=two_shot), normed)
        assert torch.equal(ours, hidden)
        everybody = comm.all_gather(ours)
        assert all(torch.equal(other, everybody[0]) for other in everybody), "the same bits on every rank"


def numbers(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 + seed)
    return torch.randn(rows, width, device="cuda", generator=generator).to(torch.bfloat16)


def time_us(comm: Any, launch: Callable[[], object]) -> float:
    """Of one call; the slowest rank's."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                launch()
        best = float("inf")
        for _ in range(ROUNDS):
            comm.all_gather(torch.zeros(1, device="cuda"))  # all begin together
            stream.synchronize()
            begun = time.perf_counter()
            graph.replay()
            stream.synchronize()
            best = min(best, time.perf_counter() - begun)
        slowest = comm.all_gather(torch.tensor([best], dtype=torch.float64, device="cuda")).max().item()
    return float(slowest) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    asked = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    context, pipes, processes = get_context("spawn"), [], []
    for rank in range(asked.ranks):
        here, there = context.Pipe()
        processes.append(context.Process(target=measure_rank, args=(rank, asked.ranks, address, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        told = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("done")
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    figures = told[0]
    if isinstance(figures, str):
        raise SystemExit(figures)
    print(table(["rows x width", *WAYS], [[size, *(f"{row[way]:.1f}" for way in WAYS)] for size, row in figures.items()]))
    if asked.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
