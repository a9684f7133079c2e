"""Paged attention on a GPU: every way to compute it checked and timed against the device's limit and against flash-attn.

Each way is compiled and checked in a process of its own first, many at once. Times are of CUDA graph replays that go round
over so many layers and block tables that the L2 cache holds none of them. Used by `benchmarks/kernels/attention.py`.

May import `kvcache` and `workers`.
"""

import importlib
import inspect
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.attention.prefixes import SharedPrefixes

LAYERS = 8
BLOCK = 256
SPREAD_BYTES = 400e6  # several times the L2 cache
CHECKED = (1, 255, 256, 257, 3000, 63, 7777, 64, 65, 1024)  # contexts of the rows that are compared with the reference
SCALES = KVScales((0.9,) * LAYERS, (1.1,) * LAYERS)  # of pools in FP8
FP8_NAN = 0x7F
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}


@dataclass(frozen=True, slots=True)
class Heads:
    """What the kernels are compiled for. kv: dtype of the pool, None: `dtype`."""

    heads: int
    kv_heads: int
    dim: int
    dtype: str = "bfloat16"
    kv: str | None = None

    @property
    def name(self) -> str:
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"{self.heads}/{self.kv_heads} x {self.dim}{kind}" + ("" if self.kv is None else f", KV {self.kv}")


MAIN = Heads(16, 8, 128)
OTHERS = (Heads(32, 8, 128), Heads(28, 4, 128), Heads(64, 8, 128), Heads(16, 8, 64), Heads(32, 8, 64))
BASE = DecodeConfig()
EVERY = (
    BASE,
    replace(BASE, stages=2),
    replace(BASE, stages=4),
    replace(BASE, keys=32, warps=2),
    replace(BASE, keys=32, warps=2, stages=4),
    replace(BASE, warps=2),
    replace(BASE, keys=128, stages=2),
    replace(BASE, keys=128, stages=3),
    replace(BASE, keys=128, stages=2, warps=8),
    replace(BASE, tile=32),
    replace(BASE, atomic=False),
    replace(BASE, dependent=True),
    replace(BASE, dependent=True, atomic=False),
)
FEW = (
    BASE,
    replace(BASE, stages=4),
    replace(BASE, keys=128, stages=2),
    replace(BASE, atomic=False),
    replace(BASE, tile=32),
)
SHARES = (1, 2, 3, 4, 6, 8)
CASES = ((1, 512), (1, 32_768), (32, 1_024), (256, 1_024))
RAGGED = (16, 32, 64, 96, 128, 192, 256)  # rows of 128 to 2,027 tokens
SHARED = ((64, 2_048), (256, 2_048), (32, 512))  # rows, common tokens; 96 of each row's own


def label(config: DecodeConfig) -> str:
    """What differs from the defaults."""
    changes = {k: v for k, v in asdict(config).items() if v != asdict(BASE)[k]}
    return " ".join(k if v is True else f"{k}={v}" for k, v in changes.items()) or "default"


@dataclass(frozen=True, slots=True)
class World:
    """Rows over `LAYERS` layers and so many block tables as the cache must be emptied by. shared: what is told of prefixes."""

    pool: KVPool
    query: Tensor
    out: Tensor
    contexts: Tensor
    tables: list[Tensor]
    shared: SharedPrefixes | None = None

    @property
    def kv_bytes(self) -> int:
        """Of one call: the keys and values of one layer that it must read."""
        return int(self.contexts.sum()) * self.pool.layout.token_bytes // self.pool.layout.layers


def make_world(heads: Heads, contexts: list[int], sets: int | None = None) -> World:
    layout = BlockLayout(BLOCK, LAYERS, heads.kv_heads, heads.dim, heads.kv or heads.dtype)
    if sets is None:
        sets = max(1, math.ceil(SPREAD_BYTES / (sum(contexts) * layout.token_bytes)))
    needed = [-(-context // BLOCK) for context in contexts]
    pool = KVPool(layout, sets * sum(needed) + 1, "cuda", scales=SCALES if layout.scaled else None)
    dtype = getattr(torch, heads.dtype)
    for part in torch.split(pool.data, 64):
        part.copy_(torch.randn(part.shape, dtype=dtype, device="cuda"))
    order = torch.split((torch.randperm(pool.blocks - 1, device="cuda") + 1).int(), sum(needed))
    tables = []
    for blocks in order[:sets]:
        table = torch.zeros((len(contexts), max(needed)), dtype=torch.int32, device="cuda")
        for row, part in enumerate(torch.split(blocks, needed)):
            table[row, : len(part)] = part
        tables.append(table)
    query = torch.randn((len(contexts), heads.heads, heads.dim), device="cuda").to(dtype)
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return World(pool, query, torch.empty_like(query), lens, tables)


def with_prefix(world: World, common: int, told: bool) -> World:
    """The same rows, beginning with the same blocks; `told`: in sets, so that these are read once for several rows."""
    rows, blocks = len(world.contexts), common // BLOCK
    for table in world.tables:
        table[:, :blocks] = table[0, :blocks].clone()
    limits = DecodeAttention(world.pool, world.query.shape[1], rows, dtype=world.query.dtype).prefixes
    sets = [(at, min(limits.rows, rows - at), common) for at in range(0, rows, limits.rows)]
    tensors = [[common] * rows, [number for one in sets for number in one], list(range(rows))]
    shared = SharedPrefixes(*(torch.tensor(numbers, dtype=torch.int32, device="cuda") for numbers in tensors))
    return replace(world, shared=shared if told else None)


def exact_kv(pool: KVPool, layer: int, table: Tensor, context: int) -> Tensor:
    """[k|v, context, kv_heads, dim] float64."""
    blocks = torch.stack([pool.data[block, layer] for block in table[: -(-context // BLOCK)].tolist()], 1)
    scales = torch.tensor(pool.scales(layer) or (1.0, 1.0), dtype=torch.float64, device=pool.device)
    return blocks.double().flatten(1, 2)[:, :context] * scales[:, None, None, None]


def spoil_unwritten(world: World) -> None:
    """NaN behind each row's context in its last block, all layers."""
    for context, table in zip(world.contexts.tolist(), world.tables[0].tolist(), strict=True):
        if context % BLOCK:
            unwritten = world.pool.data[table[context // BLOCK], :, :, context % BLOCK :]
            unwritten.view(torch.uint8).fill_(FP8_NAN) if world.pool.layout.scaled else unwritten.fill_(math.nan)


def reference(world: World, layer: int) -> Tensor:
    """[rows, heads, dim] float64, row by row."""
    rows = []
    group = world.query.shape[1] // world.pool.layout.kv_heads
    for query, context, table in zip(world.query, world.contexts.tolist(), world.tables[0], strict=True):
        key, value = exact_kv(world.pool, layer, table, context).repeat_interleave(group, 2)
        scores = torch.einsum("hd,khd->hk", query.double(), key) / math.sqrt(query.shape[1])
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value))
    return torch.stack(rows)


def check(heads: Heads, config: DecodeConfig) -> dict[str, Any]:
    """Compile and compare on ragged rows, their unwritten slots NaN; twice, since the second finds used buffers."""
    begin = time.perf_counter()
    result: dict[str, Any] = {"heads": heads.name, "config": label(config)}
    try:
        world = make_world(heads, list(CHECKED), 1)
        spoil_unwritten(world)
        attention = DecodeAttention(world.pool, heads.heads, len(CHECKED), config, dtype=world.query.dtype)
        error = 0.0
        for layer in (0, LAYERS - 1, LAYERS - 1):
            world.out.fill_(float("nan"))
            attention.plan(world.contexts, len(CHECKED))
            attention.run(layer, world.query, world.tables[0], world.out)
            difference = (world.out.double() - reference(world, layer)).abs().max().item()
            error = max(error, difference) if difference == difference else math.inf
        result |= {"error": error, "right": error < TOLERANCE[heads.dtype]}
    except Exception as failure:
        result |= {"right": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    return result | {"s": round(time.perf_counter() - begin, 1)}


def check_all(pairs: list[tuple[Heads, DecodeConfig]]) -> list[dict[str, Any]]:
    """One result for each pair; compiled kernels stay in triton's cache on disk, where this process finds them."""
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(check, *zip(*pairs, strict=True)))


def graph_us(run: Callable[[], object], calls: int, budget_s: float = 0.02) -> float:
    """Microseconds of one of the `calls` calls that `run` makes: median of five groups of replays of its graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def replays(count: int) -> float:
        events[0].record()
        for _ in range(count):
            graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1])) * 1e3 / (count * calls)

    replays(1)
    count = max(1, min(20, int(budget_s / 5 * 1e6 / (replays(1) * calls))))
    return statistics.median(replays(count) for _ in range(5))


def copy_rate() -> float:
    """GB/s of a large copy, read and written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_us(partial(target.copy_, source), 1) / 1e3


def ours(world: World, config: DecodeConfig, tables: list[Tensor] | None = None) -> tuple[Callable[[], None], int]:
    attention = DecodeAttention(world.pool, world.query.shape[1], len(world.query), config, dtype=world.query.dtype)
    attention.plan(world.contexts, len(world.query), world.shared)

    def run() -> None:
        for table in tables or world.tables:
            for layer in range(LAYERS):
                attention.run(layer, world.query, table, world.out)

    return run, LAYERS * len(world.tables)


Flash = Callable[..., Tensor]


def flash_kernels() -> dict[str, Flash]:
    """What is installed: a label -> (query, keys, values, contexts, table, **more) -> out. Says what the calls accept."""
    found: dict[str, Flash] = {}
    for module, table_name in (("flash_attn_interface", "page_table"), ("flash_attn", "block_table")):
        try:
            package = importlib.import_module(module)
            call = package.flash_attn_with_kvcache
        except Exception as error:
            print(f"{module}: {type(error).__name__}: {str(error)[:200]}")
            continue
        version = f"{module} {getattr(package, '__version__', '')}".strip()
        print(f"{version}: flash_attn_with_kvcache{inspect.signature(call)}")
        print(f"  {sorted(name for name in vars(package) if not name.startswith('_'))}")

        def attend(
            query: Tensor, keys: Tensor, values: Tensor, contexts: Tensor, table: Tensor, _call: Any = call,
            _name: str = table_name, **more: Any,
        ) -> Tensor:  # fmt: skip
            out = _call(query[:, None], keys, values, cache_seqlens=contexts, causal=True, **{_name: table}, **more)
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        found[version] = attend
    return found


def theirs(world: World, attend: Flash, tables: list[Tensor] | None = None, **more: Any) -> tuple[Callable[[], None], int]:
    views = [(world.pool.keys(layer), world.pool.values(layer)) for layer in range(LAYERS)]

    def run() -> None:
        for table in tables or world.tables:
            for keys, values in views:
                attend(world.query, keys, values, world.contexts, table, **more)

    return run, LAYERS * len(world.tables)


def widened(world: World, blocks: int) -> list[Tensor]:
    return [torch.nn.functional.pad(table, (0, blocks - table.shape[1])) for table in world.tables]


Making = Callable[[], tuple[Callable[[], None], int]]


def candidates(world: World, configs: Iterable[DecodeConfig], flash: dict[str, Flash]) -> Iterator[tuple[str, Making]]:
    """(label, what makes the run and its number of calls)."""
    wide = widened(world, 512)
    for name, attend in flash.items():
        yield name, partial(theirs, world, attend)
        yield f"{name} (table of 131,072 tokens)", partial(theirs, world, attend, wide)
        for splits in (1, 16, 32):
            yield f"{name} num_splits={splits} (131,072)", partial(theirs, world, attend, wide, num_splits=splits)
    for config in configs:
        for shares in SHARES:
            tuned = replace(config, shares=shares)
            yield label(tuned), partial(ours, world, tuned)
    yield "default (table of 131,072 tokens)", partial(ours, world, BASE, wide)


def time_case(
    heads: Heads, contexts: list[int], configs: list[DecodeConfig], flash: dict[str, Flash], limit: float
) -> list[dict[str, Any]]:
    """Every candidate on one batch. limit: GB/s."""
    world = make_world(heads, contexts)
    case = f"{len(contexts)} x {max(contexts):,}" + ("" if min(contexts) == max(contexts) else " ragged")
    rows = []
    for name, make in candidates(world, configs, flash):
        row: dict[str, Any] = {"heads": heads.name, "case": case, "way": name}
        try:
            run, calls = make()
            us = graph_us(run, calls)
            rows.append(row | {"us": us, "gb_s": world.kv_bytes / us / 1e3, "share": world.kv_bytes / us / 1e3 / limit})
        except Exception as failure:
            print(f"  {heads.name}, {case}, {name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            if "illegal" in str(failure) or "launch failure" in str(failure):
                raise
    return rows


def show(rows: list[dict[str, Any]], best: int) -> None:
    """flash-attn's lines, the default's, and the best few."""
    if not rows:
        return
    ranked = sorted((row for row in rows if "flash" not in row["way"]), key=lambda row: row["us"])
    others = [row for row in rows if "flash" in row["way"] or row["way"].startswith("default")]
    print(f"\n{rows[0]['heads']}, {rows[0]['case']}:")
    for row in [*others, *ranked[:best]]:
        print(f"  {row['us']:8.1f} us  {row['gb_s']:6.0f} GB/s  {row['share']:4.0%}  {row['way']}", flush=True)


def plan_us(batch: int, context: int) -> float:
    world = make_world(MAIN, [context] * batch, 1)
    attention = DecodeAttention(world.pool, MAIN.heads, batch)

    def run() -> None:
        for _ in range(50):
            attention.plan(world.contexts, batch)

    return graph_us(run, 50)


def shared_us(heads: Heads, rows: int, common: int) -> tuple[float, float]:
    """Of a call where each row reads the prefix, and where sets of rows do; the results are compared."""
    world = make_world(heads, [common + 96] * rows)
    results, times = [], []
    for told in (False, True):
        run, calls = ours(with_prefix(world, common, told), BASE)
        times.append(graph_us(run, calls))
        results.append(world.out.clone())
    error = float((results[0].double() - results[1].double()).abs().max())
    if not error < TOLERANCE[heads.dtype]:
        raise RuntimeError(f"{rows} rows with {common} common tokens: the sets' result is {error} off")
    return times[0], times[1]


def decode_report(seconds: float, kv: str | None = None) -> dict[str, Any]:
    """Checks, then times, as long as `seconds` allow; prints all of it and returns it for a file. kv: as in `Heads`."""
    begin = time.perf_counter()
    main, others = replace(MAIN, kv=kv), [replace(heads, kv=kv) for heads in OTHERS]
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    pairs = [(main, config) for config in EVERY] + [(heads, config) for heads in others for config in FEW]
    float32 = DecodeConfig(keys=32, stages=2, warps=8)
    pairs += [(replace(main, dtype="float32"), float32), (replace(main, dtype="float16"), BASE)]
    checks = check_all(pairs)
    for row in checks:
        print(f"  {'right' if row['right'] else 'WRONG'} {row.get('error', row.get('failure'))} {row['s']} s  "
              f"{row['heads']}  {row['config']}", flush=True)  # fmt: skip
    right = {(row["heads"], row["config"]) for row in checks if row["right"]}
    limit = copy_rate()
    print(f"checked in {time.perf_counter() - begin:.0f} s; copy {limit:.0f} GB/s", flush=True)
    report: dict[str, Any] = {"limit_gb_s": limit, "checks": checks, "rows": []}
    flash = {} if kv == FP8 else flash_kernels()
    work: list[tuple[Heads, list[int], Sequence[DecodeConfig]]] = [(main, [context] * batch, EVERY) for batch, context in CASES]
    work += [(main, [128 + (row * 7919) % 1900 for row in range(rows)], FEW) for rows in RAGGED]
    work += [(heads, [context] * batch, FEW) for heads in others for batch, context in CASES[1:]]
    for heads, contexts, configs in work:
        if time.perf_counter() - begin > seconds:
            print("no time for the rest")
            break
        usable = [config for config in configs if (heads.name, label(config)) in right]
        rows = time_case(heads, contexts, usable, flash, limit)
        show(rows, 8 if heads == main else 3)
        report["rows"] += rows
    report["shared_us"] = {f"{rows} x ({common} + 96)": shared_us(main, rows, common) for rows, common in SHARED}
    print(f"rows with a shared prefix, us, each reads it / sets read it: {report['shared_us']}", flush=True)
    report["plan_us"] = {f"{batch} x {context}": plan_us(batch, context) for batch, context in CASES}
    print(f"plan, us: {report['plan_us']}; {time.perf_counter() - begin:.0f} s in all")
    return report
