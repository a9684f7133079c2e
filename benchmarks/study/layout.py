"""Question 1: how pages lie in memory. Page-first (Manta) against layer-first, copy by copy, and what attention makes of it.

page-first   [page, layer, k|v, slot, head, dim]      a page is one run of bytes
layer-first  [layer, k|v, page, slot, head, dim]      a page is 2 x layers runs, in one tensor
per layer    layer-first in a tensor for each layer   a page is 2 x layers runs and operations (vLLM's pools)

May import `kvcache.pool`, `workers.attention` and torch.
"""

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.attention import CASES, Case, passes
from benchmarks.checkpoints import SHAPES
from benchmarks.study.options import Options, Result, in_turns, machine, run_alone, spread
from kvcache.layout import PageLayout
from kvcache.pool import KVPool

SHAPE, DTYPE, PAGE = "0.6B", "bfloat16", 256
GPU_CASES = (Case("decode 32 x 4,000", 32, 1, 4000), Case("chunk of 2,048 after 6,144", 1, 2048, 8192))
"""Beside the usual ones, which hardly keep a GPU busy."""

PARTIAL_TOKENS = 100
BATCH_PAGES = 8


class Pools:
    """The same number of pages in the three layouts, on one device, and a page's worth of host memory."""

    def __init__(self, layout: PageLayout, pages: int, device: str) -> None:
        self.layout = layout
        self.first = KVPool(layout, pages, device)
        layers, two, *rest = layout.shape
        shape = (layers, two, pages, *rest)
        self.layered = torch.zeros(shape, dtype=self.first.dtype, device=device)
        self.single = [torch.zeros(shape[1:], dtype=self.first.dtype, device=device) for _ in range(layers)]
        self.first.data.zero_()
        pinned = device == "cuda"
        self.host = torch.zeros(layout.shape, dtype=self.first.dtype, pin_memory=pinned)
        self.hosts = torch.zeros((BATCH_PAGES, *layout.shape), dtype=self.first.dtype, pin_memory=pinned)
        self.many = torch.arange(1, 2 * BATCH_PAGES, 2, device=device)

    def copy_page(self) -> dict[str, Callable[[], object]]:
        """One page to another, on the device: migration inside a pool, a whole-page copy on write."""
        return self.copy_part(self.layout.page_size)

    def copy_part(self, tokens: int) -> dict[str, Callable[[], object]]:
        """The first `tokens` slots of a page to another page: the copy of reuse inside a page."""

        def layered() -> None:
            self.layered[:, :, 1, :tokens].copy_(self.layered[:, :, 0, :tokens])

        def single() -> None:
            for pool in self.single:
                pool[:, 1, :tokens].copy_(pool[:, 0, :tokens])

        return {"page-first": partial(self.first.copy, 0, 1, tokens), "layer-first": layered, "per layer": single}

    def export_page(self) -> dict[str, Callable[[], object]]:
        """One page to contiguous host memory (pinned beside a GPU): offloading, or before sending."""

        def first() -> None:
            self.host.copy_(self.first.data[0], non_blocking=True)

        def layered() -> None:
            self.host.copy_(self.layered[:, :, 0], non_blocking=True)

        def single() -> None:
            for layer, pool in enumerate(self.single):
                self.host[layer].copy_(pool[:, 0], non_blocking=True)

        return {"page-first": first, "layer-first": layered, "per layer": single}

    def export_staged(self) -> dict[str, Callable[[], object]]:
        """Several scattered pages: gathered on the device into one run, which then goes to the host."""

        def first() -> None:
            self.hosts.copy_(self.first.data[self.many], non_blocking=True)

        def layered() -> None:
            pages = self.layered[:, :, self.many].movedim(2, 0)
            self.hosts.copy_(pages.contiguous(), non_blocking=True)

        def single() -> None:
            pages = torch.stack([pool[:, self.many] for pool in self.single]).movedim(2, 0)
            self.hosts.copy_(pages.contiguous(), non_blocking=True)

        return {"page-first": first, "layer-first": layered, "per layer": single}

    def import_page(self) -> dict[str, Callable[[], object]]:
        """One page from host memory."""

        def layered() -> None:
            self.layered[:, :, 0].copy_(self.host, non_blocking=True)

        def single() -> None:
            for layer, pool in enumerate(self.single):
                pool[:, 0].copy_(self.host[layer], non_blocking=True)

        return {
            "page-first": lambda: self.first.data[0].copy_(self.host, non_blocking=True),
            "layer-first": layered,
            "per layer": single,
        }


class Wire:
    """A socket pair and a thread that reads it empty: what sending a page costs the sender, on one host."""

    def __init__(self) -> None:
        self._near, far = socket.socketpair()
        for end in (self._near, far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self._thread = threading.Thread(target=self._drain, args=(far,))
        self._thread.start()

    def send(self, runs: list[memoryview]) -> None:
        """All runs in as few system calls as the kernel allows, then waits for the reader's word."""
        total = sum(len(run) for run in runs)
        self._near.sendall(total.to_bytes(8, "little"))
        if len(runs) == 1:
            self._near.sendall(runs[0])
        else:
            sent = 0
            while sent < total:
                sent += self._near.sendmsg(_after(runs, sent))
        self._near.recv(1)

    def close(self) -> None:
        self._near.close()
        self._thread.join()

    @staticmethod
    def _drain(far: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with far:
            while len(header := far.recv(8, socket.MSG_WAITALL)) == 8:
                left = int.from_bytes(header, "little")
                while left:
                    left -= far.recv_into(buffer, min(left, len(buffer)))
                far.sendall(b"k")


def _after(runs: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of the runs after so many bytes."""
    for at, run in enumerate(runs):
        if sent < len(run):
            return [run[sent:], *runs[at + 1 :]]
        sent -= len(run)
    return []


def _bytes(tensor: Tensor) -> memoryview:
    array: npt.NDArray[np.uint8] = tensor.view(torch.uint8).view(-1).numpy()
    return array.data


def sending(pools: Pools, wire: Wire) -> dict[str, Callable[[], object]]:
    """One page to another process of the host. Of pools in host memory: from a GPU a page is exported first."""
    runs = [_bytes(pools.layered[layer, kv, 0]) for layer in range(pools.layout.layers) for kv in range(2)]
    return {
        "page-first": lambda: wire.send([_bytes(pools.first.data[0])]),
        "layer-first": lambda: wire.send(runs),
        "per layer": lambda: wire.send([_bytes(pool[kv, 0]) for pool in pools.single for kv in range(2)]),
    }


def copies(options: Options, layout: PageLayout) -> dict[str, Any]:
    """Operation -> layout -> microseconds a page. On a CPU by one thread, as a rank has few beside its model's."""
    device = options.device
    torch.set_num_threads(1)
    pools = Pools(layout, 2 * BATCH_PAGES, device)
    settle: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    repeat = 3
    result: dict[str, Any] = {}
    for name, work, pages in (
        ("copy of a page", pools.copy_page(), 1),
        (f"copy of {PARTIAL_TOKENS} tokens", pools.copy_part(PARTIAL_TOKENS), 1),
        ("export of a page", pools.export_page(), 1),
        (f"export of {BATCH_PAGES} pages, gathered first", pools.export_staged(), BATCH_PAGES),
        ("import of a page", pools.import_page(), 1),
    ):
        times = in_turns(work, options.rounds, repeat=repeat, settle=settle, clock=clock_of(device))
        result[name] = {way: spread(values, 1e6 / pages) for way, values in times.items()}
    if device == "cpu":
        wire = Wire()
        try:
            times = in_turns(sending(pools, wire), options.rounds, repeat=repeat)
        finally:
            wire.close()
        result["sending a page over a socket"] = {way: spread(values, 1e6) for way, values in times.items()}
    return result


def clock_of(device: str) -> Callable[[], float]:
    return time.perf_counter if device == "cuda" else time.process_time


def attention(options: Options, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """By batch and backend: ms a layer, page-first and over a pool for each layer."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for case in cases:
        work = passes(case, SHAPES[SHAPE], DTYPE, PAGE, options.device)
        named: dict[str, Callable[[], object]] = {
            f"{backend}|{pages}": call for (backend, pages), call in work.items() if backend != "cpu torch"
        }
        settle: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
        times = in_turns(named, options.rounds, settle=settle, clock=clock_of(options.device))
        layers = SHAPES[SHAPE].layers
        for backend in dict.fromkeys(name.partition("|")[0] for name in named):
            first, single = times[f"{backend}|page-first"], times[f"{backend}|per layer"]
            ratio = [a / b for a, b in zip(first, single, strict=True)]
            rows.append({
                "case": case.name, "backend": backend, "page-first": spread(first, 1e3 / layers),
                "per layer": spread(single, 1e3 / layers), "ratio": spread(ratio),
            })  # fmt: skip
    return rows


def run(options: Options) -> Result:
    shape = SHAPES["tiny" if options.quick else SHAPE]
    layout = PageLayout(PAGE, shape.layers, shape.kv_heads, shape.head_dim, DTYPE)
    cases = (*CASES, *GPU_CASES) if options.device == "cuda" else CASES
    return {
        "command": options.command(1), "machine": machine(options), "shape": "tiny" if options.quick else SHAPE,
        "page": PAGE, "page_bytes": layout.page_bytes, "runs": 2 * layout.layers, "copies_us": copies(options, layout),
        "clock": "wall" if options.device == "cuda" else "CPU", "threads": options.threads,
        "attention_ms": [] if options.quick else attention(options, cases),
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(run, 1, __doc__)
