"""Prefill chunks over blocks on a GPU: every way checked and timed against the matrix units and against flash-attn.

Beside `benchmarks/kernels/paged.py`, whose pools and timing it uses. May import `kvcache` and `workers`.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.paged import LAYERS, TOLERANCE, Heads, World, exact_kv, graph_us, make_world, spoil_unwritten
from kvcache.layout import FP8
from workers.attention.base import Chunks
from workers.attention.flash import FlashChunkPlan, FlashKernels, load_kernels
from workers.kernels.attention.chunks import SPECIALIZED, ChunkAttention, ChunkConfig

MAIN = Heads(16, 8, 128)
OTHERS = (Heads(32, 8, 128), Heads(16, 8, 64), Heads(32, 8, 64))
BASE = ChunkConfig()
Way = ChunkConfig | None
"""None: as it is chosen for pool and heads."""
EVERY: tuple[Way, ...] = (
    None,
    BASE,
    SPECIALIZED,
    replace(BASE, described=True),
    replace(BASE, rows=128, warps=8, keys=128, described=True),
    replace(BASE, stages=2),
    replace(BASE, stages=4),
    replace(BASE, keys=128, stages=2),
    replace(BASE, keys=128),
    replace(BASE, rows=128, warps=8),
    replace(BASE, rows=128, warps=8, keys=128),
    replace(BASE, warps=8),
    replace(BASE, shares=0, described=True),
    replace(BASE, shares=2, described=True),
    replace(BASE, shares=4, described=True),
)
CASES = (("1 x 4,096", [(4096, 4096)]), ("2 x 4,096", [(4096, 4096)] * 2), ("8 x 1,024", [(1024, 1024)] * 8),
         ("2,048 after 30,000", [(2048, 32_048)]), ("25 after 32,000", [(25, 32_025)]), ("256 after 32,000", [(256, 32_256)]),
         ("25 after 100,000", [(25, 100_025)]), ("8 x 25 after 4,000", [(25, 4025)] * 8), ("512 after 8,000", [(512, 8512)]),
         ("512", [(512, 512)]))  # fmt: skip
CHECKED = [(1, 700), (70, 70), (300, 1000), (257, 257), (5, 260), (128, 4096)]
"""(new tokens, context) of each chunk."""


def label(config: Way) -> str:
    if config is None:
        return "as chosen"
    changes = {k: v for k, v in asdict(config).items() if v != asdict(BASE)[k]}
    return " ".join(k if v is True else f"{k}={v}" for k, v in changes.items()) or "base"


def make_chunks(heads: Heads, sizes: list[tuple[int, int]], sets: int | None = None) -> tuple[World, Tensor, Chunks]:
    """(pool and tables, query, the first table's chunks)."""
    world = make_world(heads, [context for _, context in sizes], sets)
    queries = [new for new, _ in sizes]
    starts = torch.tensor([0, *queries], device="cuda").cumsum(0, dtype=torch.int32)
    query = torch.randn((sum(queries), heads.heads, heads.dim), device="cuda").to(world.query.dtype)
    longest = max(queries), max(context for _, context in sizes)
    return world, query, Chunks(starts, world.contexts, world.tables[0], sum(queries), *longest)


def reference(world: World, query: Tensor, sizes: list[tuple[int, int]], layer: int) -> Tensor:
    """[tokens, heads, dim] float64."""
    parts, group = [], query.shape[1] // world.pool.layout.kv_heads
    queries = torch.split(query, [new for new, _ in sizes])
    for part, (new, context), table in zip(queries, sizes, world.tables[0], strict=True):
        key, value = exact_kv(world.pool, layer, table, context).repeat_interleave(group, 2)
        scores = torch.einsum("qhd,khd->hqk", part.double(), key) / math.sqrt(query.shape[2])
        later = torch.arange(context, device="cuda") > torch.arange(context - new, context, device="cuda")[:, None]
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), value))
    return torch.cat(parts)


def check(heads: Heads, config: Way) -> dict[str, Any]:
    result: dict[str, Any] = {"heads": heads.name, "config": label(config)}
    begin = time.perf_counter()
    try:
        world, query, chunks = make_chunks(heads, CHECKED, 1)
        spoil_unwritten(world)
        attention = ChunkAttention(world.pool, heads.heads, config, dtype=query.dtype)
        tiles = attention.plan(chunks.query_starts, chunks.context_lens, chunks.tokens)
        out = torch.full_like(query, float("nan"))
        attention.run(LAYERS - 1, query, chunks.block_tables, chunks.context_lens, tiles, out)
        error = (out.double() - reference(world, query, CHECKED, LAYERS - 1)).abs().max().item()
        result |= {"error": error, "right": error < TOLERANCE[heads.dtype]}
    except Exception as failure:
        result |= {"right": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    return result | {"s": round(time.perf_counter() - begin, 1)}


def ours(world: World, query: Tensor, chunks: Chunks, config: Way) -> Callable[[], None]:
    attention = ChunkAttention(world.pool, query.shape[1], config, dtype=query.dtype)
    tiles = attention.plan(chunks.query_starts, chunks.context_lens, chunks.tokens)
    out = torch.empty_like(query)

    def run() -> None:
        for layer in range(LAYERS):
            attention.run(layer, query, chunks.block_tables, chunks.context_lens, tiles, out)

    return run


def theirs(world: World, query: Tensor, chunks: Chunks, kernels: FlashKernels) -> Callable[[], None]:
    plan = FlashChunkPlan(chunks, torch.nn.functional.pad(chunks.context_lens.cumsum(0, dtype=torch.int32), (1, 0)))

    def run() -> None:
        for layer in range(LAYERS):
            kernels.chunk(query, world.pool.keys(layer), world.pool.values(layer), plan)

    return run


def time_case(
    heads: Heads, name: str, sizes: list[tuple[int, int]], configs: list[Way], flash: FlashKernels | None
) -> list[dict[str, Any]]:
    world, query, chunks = make_chunks(heads, sizes, 1)
    seen = sum(new * context - new * (new - 1) // 2 for new, context in sizes)
    flops = 4 * heads.heads * heads.dim * seen
    ways = {label(config): partial(ours, world, query, chunks, config) for config in configs}
    if flash is not None:
        ways = {f"flash-attn {flash.version}": partial(theirs, world, query, chunks, flash)} | ways
    rows: list[dict[str, Any]] = []
    for way, make in ways.items():
        try:
            us = graph_us(make(), LAYERS)
        except Exception as failure:
            print(f"  {heads.name}, {name}, {way}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            continue
        rows.append({"heads": heads.name, "case": name, "way": way, "us": us, "tflops": flops / us / 1e6})
    print(f"\n{heads.name}, chunks {name}:")
    for row in sorted(rows, key=lambda row: row["us"]):
        print(f"  {row['us']:9.1f} us  {row['tflops']:5.0f} TFLOP/s  {row['way']}", flush=True)
    return rows


def chunk_report(seconds: float, kv: str | None = None) -> dict[str, Any]:
    """Checks, then times, as long as `seconds` allow; prints all of it and returns it for a file. kv: as in `Heads`."""
    begin = time.perf_counter()
    timed = [replace(heads, kv=kv) for heads in (MAIN, *OTHERS)]
    pairs: list[tuple[Heads, Way]] = [(heads, config) for heads in timed for config in EVERY]
    pairs += [(Heads(28, 4, 128, kv=kv), None), (Heads(16, 8, 128, "float16", kv), None)]
    pairs.append((Heads(4, 2, 128, "float32", kv), ChunkConfig(rows=32, keys=16, stages=2)))
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        checks = list(pool.map(check, *zip(*pairs, strict=True)))
    for row in checks:
        print(f"  {'right' if row['right'] else 'WRONG'} {row.get('error', row.get('failure'))} {row['s']} s  "
              f"{row['heads']}  chunks {row['config']}", flush=True)  # fmt: skip
    right = {(row["heads"], row["config"]) for row in checks if row["right"]}
    try:
        flash = None if kv == FP8 else load_kernels()
    except ImportError as error:
        flash = None
        print(error)
    report: dict[str, Any] = {"checks": checks, "rows": []}
    for heads in timed:
        for name, sizes in CASES:
            if time.perf_counter() - begin > seconds:
                print("no time for the rest")
                return report
            usable = [config for config in EVERY if (heads.name, label(config)) in right]
            report["rows"] += time_case(heads, name, sizes, usable, flash)
    print(f"chunks: {time.perf_counter() - begin:.0f} s in all")
    return report
