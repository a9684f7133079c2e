"""Sums over the GPUs of one host, by size: NCCL, and a kernel over their joined memory, alone and with what follows a product.

    python -m benchmarks.gpu.all_reduce --ranks 2 [--json]
    python -m benchmarks.gpu.all_reduce --ranks 4 --one-device

A process for each rank, which sees one GPU; bf16; times are of CUDA graphs of 100 calls one after another, the slowest rank's,
in microseconds a call. `one` and `two` are one exchange and two; `norm` adds the residual and RMSNorm to NCCL's sum, a launch
of its own, and `one + norm` is the one kernel; `gather` brings each rank what all have. Before that each kernel's sum is
compared with all parts added in rank order, bit by bit, and each rank's with the first one's.

--one-device: ranks that are streams of one process on one GPU, whose memory is their own: what the kernels take where no link
lies between them. NCCL has no part in it. All programs of all ranks have to be on the device at once, as they are on GPUs of
their own: sizes for which that is not sure are left out.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.shared.options import positive
from benchmarks.shared.ports import free_ports
from benchmarks.shared.ranks import ranks_of
from benchmarks.shared.report import table

SIZES = [(rows, width) for width in (1024, 4096, 8192) for rows in (1, 8, 32, 64, 128)]
CALLS, ROUNDS = 100, 5
WARPS = 16
"""Of a multiprocessor, that are sure to be on it at once: of 128 registers a thread."""
EPS = 1e-6
OURS = ("one", "two", "one + norm", "two + norm", "gather")
WAYS = ("nccl", *OURS[:2], "nccl + norm", *OURS[2:4], "nccl gather", OURS[4])

Figures = dict[str, dict[str, float]]
T = TypeVar("T")


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

    x, hidden, weight = nothing(rows, width), numbers(-1, rows, width), numbers(-2, 1, width)[0]
    everybody, nccl = x.new_empty(comm.size, rows, width), comm._group
    of_nccl: dict[str, Callable[[], object]] = {
        "nccl": lambda: nccl.allreduce([x]),
        "nccl + norm": lambda: (nccl.allreduce([x]), add_rms_norm(hidden, x, weight, EPS)),
        "nccl gather": lambda: nccl._allgather_base(everybody, x),
    }
    return of_nccl | kernels(comm.peers, rows, width)


def kernels(peers: Any, rows: int, width: int) -> dict[str, Callable[[], object]]:
    """`OURS` of one rank."""
    from workers.kernels.launch import may_start_early
    from workers.kernels.rows.gather import gather
    from workers.kernels.rows.reduce import sum_add_rms_norm, sum_rows

    pdl = may_start_early(torch.device("cuda"))
    x, hidden, weight = nothing(rows, width), numbers(-1, rows, width), numbers(-2, 1, width)[0]
    return {
        "one": lambda: sum_rows(peers, x, two_shot=False, pdl=pdl),
        "two": lambda: sum_rows(peers, x, two_shot=True, pdl=pdl),
        "one + norm": lambda: sum_add_rms_norm(peers, x, hidden, weight, EPS, two_shot=False, pdl=pdl),
        "two + norm": lambda: sum_add_rms_norm(peers, x, hidden, weight, EPS, two_shot=True, pdl=pdl),
        "gather": lambda: gather(peers, x),
    }


def check(comm: Any, rows: int, width: int) -> None:
    from workers.kernels.rows.norm import add_rms_norm
    from workers.kernels.rows.reduce import sum_add_rms_norm, sum_rows
    from workers.parallel.in_process import sum_in_rank_order

    mine = numbers(comm.rank, rows, width)
    parts = _gathered(comm, mine)
    assert torch.equal(comm.memory.all_gather(mine), torch.stack(parts))
    total = sum_in_rank_order(parts, torch.empty_like(mine))
    weight = numbers(-2, 1, width)[0]
    hidden = numbers(-1, rows, width)
    normed = add_rms_norm(hidden, total, weight, EPS)
    for two_shot in (False, True):
        assert torch.equal(sum_rows(comm.peers, mine.clone(), two_shot=two_shot), total), (rows, width, two_shot)
        ours = numbers(-1, rows, width)
        assert torch.equal(sum_add_rms_norm(comm.peers, mine, ours, weight, EPS, two_shot=two_shot), normed)
        assert torch.equal(ours, hidden)
        everybody = _gathered(comm, ours)
        assert all(torch.equal(other, everybody[0]) for other in everybody), "the same bits on every rank"


def _gathered(comm: Any, x: Tensor) -> list[Tensor]:
    """By NCCL, against which the kernels are held."""
    of_all = x.new_empty(comm.size, *x.shape)
    comm._group._allgather_base(of_all, x).wait()
    return list(of_all)


def nothing(rows: int, width: int) -> Tensor:
    """What may be summed again and again, in place."""
    return torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)


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


class Streams:
    """Ranks on one GPU. Each kernel is compiled and read before one of it waits: loading one may wait for the device."""

    def __init__(self, size: int) -> None:
        from workers.kernels.rows.peers import PROGRAMS, Peers
        from workers.parallel.peer_memory import PACKETS

        self._inboxes = [torch.zeros(2, PACKETS, dtype=torch.int64, device="cuda") for _ in range(size)]
        inboxes = torch.tensor([inbox.data_ptr() for inbox in self._inboxes], device="cuda")
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        turns = [torch.zeros(PROGRAMS, dtype=torch.int32, device="cuda") for _ in range(size)]
        self.peers = [Peers(rank, size, PACKETS, inboxes, turns[rank], self._given_up.data_ptr()) for rank in range(size)]
        self._streams = [torch.cuda.Stream() for _ in range(size)]  # type: ignore[no-untyped-call]

    def run(self, launches: list[Callable[[], T]]) -> list[T]:
        """One of each rank, at the same time, after one of each by itself."""
        self._given_up.fill_(1)
        for launch in launches:
            launch()
            torch.cuda.synchronize()
        self._given_up.fill_(0)
        for tensor in (*self._inboxes, *(peers.turns for peers in self.peers)):
            tensor.zero_()
        torch.cuda.synchronize()
        told = []
        for stream, launch in zip(self._streams, launches, strict=True):
            with torch.cuda.stream(stream):
                told.append(launch())
        torch.cuda.synchronize()
        return told

    def time_us(self, launches: list[Callable[[], object]]) -> float:
        graphs = []
        for stream, launch in zip(self._streams, launches, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                for _ in range(CALLS):
                    launch()
        best = float("inf")
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for stream, graph in zip(self._streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
        return best / CALLS * 1e6


def measure_streams(size: int) -> Figures:
    from workers.kernels.launch import warps_for
    from workers.kernels.rows.gather import gather
    from workers.kernels.rows.norm import add_rms_norm
    from workers.parallel.in_process import sum_in_rank_order

    streams, figures = Streams(size), Figures()
    warps = torch.cuda.get_device_properties(0).multi_processor_count * WARPS
    for rows, width in [each for each in SIZES if size * each[0] * warps_for(each[1]) <= warps]:
        parts = [numbers(rank, rows, width) for rank in range(size)]
        total = sum_in_rank_order(parts, torch.empty_like(parts[0]))
        weight, hidden = numbers(-2, 1, width)[0], numbers(-1, rows, width)
        before = hidden.clone()
        normed = add_rms_norm(hidden, total, weight, EPS)
        ranks = list(zip(streams.peers, parts, strict=True))
        for two_shot in (False, True):
            for ours in streams.run([partial(_summed, each, part, two_shot) for each, part in ranks]):
                assert torch.equal(ours, total), (rows, width, two_shot)
            for norm, ours in streams.run([partial(_normed, each, part, before, weight, two_shot) for each, part in ranks]):
                assert torch.equal(norm, normed), (rows, width, two_shot)
                assert torch.equal(ours, hidden), (rows, width, two_shot)
        for each in streams.run([partial(gather, each, part) for each, part in ranks]):
            assert torch.equal(each, torch.stack(parts)), (rows, width)
        of_ranks = [kernels(each, rows, width) for each in streams.peers]
        for way in OURS:
            streams.run([of_rank[way] for of_rank in of_ranks])
        figures[f"{rows} x {width}"] = {way: streams.time_us([of_rank[way] for of_rank in of_ranks]) for way in OURS}
        print(f"{rows} x {width}: done", file=sys.stderr, flush=True)
    return figures


def _summed(peers: Any, part: Tensor, two_shot: bool) -> Tensor:
    from workers.kernels.rows.reduce import sum_rows

    return sum_rows(peers, part.clone(), two_shot=two_shot)


def _normed(peers: Any, part: Tensor, before: Tensor, weight: Tensor, two_shot: bool) -> tuple[Tensor, Tensor]:
    from workers.kernels.rows.reduce import sum_add_rms_norm

    hidden = before.clone()
    return sum_add_rms_norm(peers, part, hidden, weight, EPS, two_shot=two_shot), hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--one-device", action="store_true", help="ranks are streams on one GPU")
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    asked = parser.parse_args()
    figures = measure_streams(asked.ranks) if asked.one_device else measure_processes(asked.ranks)
    ways = OURS if asked.one_device else WAYS
    print(table(["rows x width", *ways], [[size, *(f"{row[way]:.1f}" for way in ways)] for size, row in figures.items()]))
    if asked.json:
        print(json.dumps(figures))


def measure_processes(ranks: int) -> Figures:
    [port] = free_ports(1)
    with ranks_of(ranks, measure_rank, ranks, f"127.0.0.1:{port}") as pipes:
        told = [pipe.recv() for pipe in pipes]
    figures: Figures | str = told[0]
    if isinstance(figures, str):
        raise SystemExit(figures)
    return figures


if __name__ == "__main__":
    main()
