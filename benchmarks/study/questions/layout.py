"""Question 1: how blocks lie in memory. Block-first (Manta) against layer-first, copy by copy, and what attention makes of it.

block-first   [block, layer, k|v, slot, head, dim]      a block is one run of bytes
layer-first  [layer, k|v, block, slot, head, dim]      a block is 2 x layers runs, in one tensor
per layer    layer-first in a tensor for each layer   a block is 2 x layers runs and operations (vLLM's pools)

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

from benchmarks.kernels.attention import CASES, Case, passes
from benchmarks.shared.checkpoints import SHAPES
from benchmarks.study.options import Options, Result, in_turns, machine, run_alone, spread
from kvcache.layout import BlockLayout
from kvcache.pool import KVPool

SHAPE, DTYPE, BLOCK = "0.6B", "bfloat16", 256
GPU_CASES = (Case("decode 32 x 4,000", 32, 1, 4000), Case("chunk of 2,048 after 6,144", 1, 2048, 8192))
"""Beside the usual ones, which hardly keep a GPU busy."""

PARTIAL_TOKENS = 100
BATCH_BLOCKS = 8


class Pools:
    """The same number of blocks in the three layouts, on one device, and a block's worth of host memory."""

    def __init__(self, layout: BlockLayout, blocks: int, device: str) -> None:
        self.layout = layout
        self.first = KVPool(layout, blocks, device)
        layers, two, *rest = layout.shape
        shape = (layers, two, blocks, *rest)
        self.layered = torch.zeros(shape, dtype=self.first.dtype, device=device)
        self.single = [torch.zeros(shape[1:], dtype=self.first.dtype, device=device) for _ in range(layers)]
        self.first.data.zero_()
        pinned = device == "cuda"
        self.host = torch.zeros(layout.shape, dtype=self.first.dtype, pin_memory=pinned)
        self.hosts = torch.zeros((BATCH_BLOCKS, *layout.shape), dtype=self.first.dtype, pin_memory=pinned)
        self.many = torch.arange(1, 2 * BATCH_BLOCKS, 2, device=device)

    def copy_block(self) -> dict[str, Callable[[], object]]:
        """One block to another, on the device: migration inside a pool, a whole-block copy on write."""
        return self.copy_part(self.layout.block_size)

    def copy_part(self, tokens: int) -> dict[str, Callable[[], object]]:
        """The first `tokens` slots of a block to another block: the copy of reuse inside a block."""

        def layered() -> None:
            self.layered[:, :, 1, :tokens].copy_(self.layered[:, :, 0, :tokens])

        def single() -> None:
            for pool in self.single:
                pool[:, 1, :tokens].copy_(pool[:, 0, :tokens])

        return {"block-first": partial(self.first.copy, 0, 1, tokens), "layer-first": layered, "per layer": single}

    def export_block(self) -> dict[str, Callable[[], object]]:
        """One block to contiguous host memory (pinned beside a GPU): offloading, or before sending."""

        def first() -> None:
            self.host.copy_(self.first.data[0], non_blocking=True)

        def layered() -> None:
            self.host.copy_(self.layered[:, :, 0], non_blocking=True)

        def single() -> None:
            for layer, pool in enumerate(self.single):
                self.host[layer].copy_(pool[:, 0], non_blocking=True)

        return {"block-first": first, "layer-first": layered, "per layer": single}

    def export_staged(self) -> dict[str, Callable[[], object]]:
        """Several scattered blocks: gathered on the device into one run, which then goes to the host."""

        def first() -> None:
            self.hosts.copy_(self.first.data[self.many], non_blocking=True)

        def layered() -> None:
            blocks = self.layered[:, :, self.many].movedim(2, 0)
            self.hosts.copy_(blocks.contiguous(), non_blocking=True)

        def single() -> None:
            blocks = torch.stack([pool[:, self.many] for pool in self.single]).movedim(2, 0)
            self.hosts.copy_(blocks.contiguous(), non_blocking=True)

        return {"block-first": first, "layer-first": layered, "per layer": single}

    def import_block(self) -> dict[str, Callable[[], object]]:
        """One block from host memory."""

        def layered() -> None:
            self.layered[:, :, 0].copy_(self.host, non_blocking=True)

        def single() -> None:
            for layer, pool in enumerate(self.single):
                pool[:, 0].copy_(self.host[layer], non_blocking=True)

        return {
            "block-first": lambda: self.first.data[0].copy_(self.host, non_blocking=True),
            "layer-first": layered,
            "per layer": single,
        }


class Wire:
    """A socket pair and a thread that reads it empty: what sending a block costs the sender, on one host."""

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
    """One block to another process of the host. Of pools in host memory: from a GPU a block is exported first."""
    runs = [_bytes(pools.layered[layer, kv, 0]) for layer in range(pools.layout.layers) for kv in range(2)]
    return {
        "block-first": lambda: wire.send([_bytes(pools.first.data[0])]),
        "layer-first": lambda: wire.send(runs),
        "per layer": lambda: wire.send([_bytes(pool[kv, 0]) for pool in pools.single for kv in range(2)]),
    }


def copies(options: Options, layout: BlockLayout) -> dict[str, Any]:
    """Operation -> layout -> microseconds a block. On a CPU by one thread, as a rank has few beside its model's."""
    device = options.device
    torch.set_num_threads(1)
    pools = Pools(layout, 2 * BATCH_BLOCKS, device)
    settle: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    repeat = 3
    result: dict[str, Any] = {}
    for name, work, blocks in (
        ("copy of a block", pools.copy_block(), 1),
        (f"copy of {PARTIAL_TOKENS} tokens", pools.copy_part(PARTIAL_TOKENS), 1),
        ("export of a block", pools.export_block(), 1),
        (f"export of {BATCH_BLOCKS} blocks, gathered first", pools.export_staged(), BATCH_BLOCKS),
        ("import of a block", pools.import_block(), 1),
    ):
        times = in_turns(work, options.rounds, repeat=repeat, settle=settle, clock=clock_of(device))
        result[name] = {way: spread(values, 1e6 / blocks) for way, values in times.items()}
    if device == "cpu":
        wire = Wire()
        try:
            times = in_turns(sending(pools, wire), options.rounds, repeat=repeat)
        finally:
            wire.close()
        result["sending a block over a socket"] = {way: spread(values, 1e6) for way, values in times.items()}
    return result


def clock_of(device: str) -> Callable[[], float]:
    return time.perf_counter if device == "cuda" else time.process_time


def attention(options: Options, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """By batch and backend: ms a layer, block-first and over a pool for each layer."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for case in cases:
        work = passes(case, SHAPES[SHAPE], DTYPE, BLOCK, options.device)
        named: dict[str, Callable[[], object]] = {
            f"{backend}|{blocks}": call for (backend, blocks), call in work.items() if backend != "cpu torch"
        }
        settle: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
        times = in_turns(named, options.rounds, settle=settle, clock=clock_of(options.device))
        layers = SHAPES[SHAPE].layers
        for backend in dict.fromkeys(name.partition("|")[0] for name in named):
            first, single = times[f"{backend}|block-first"], times[f"{backend}|per layer"]
            ratio = [a / b for a, b in zip(first, single, strict=True)]
            rows.append({
                "case": case.name, "backend": backend, "block-first": spread(first, 1e3 / layers),
                "per layer": spread(single, 1e3 / layers), "ratio": spread(ratio),
            })  # fmt: skip
    return rows


def run(options: Options) -> Result:
    shape = SHAPES["tiny" if options.quick else SHAPE]
    layout = BlockLayout(BLOCK, shape.layers, shape.kv_heads, shape.head_dim, DTYPE)
    cases = (*CASES, *GPU_CASES) if options.device == "cuda" else CASES
    return {
        "command": options.command(1), "machine": machine(options), "shape": "tiny" if options.quick else SHAPE,
        "block": BLOCK, "block_bytes": layout.block_bytes, "runs": 2 * layout.layers, "copies_us": copies(options, layout),
        "clock": "wall" if options.device == "cuda" else "CPU", "threads": options.threads,
        "attention_ms": [] if options.quick else attention(options, cases),
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(run, 1, __doc__)
