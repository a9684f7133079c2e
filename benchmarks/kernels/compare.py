"""Each GPU kernel against its limit: the bytes it must move or the operations it must do, at rates measured here first.

    python -m benchmarks.kernels [--json FILE] [--only NAME] [--sweep]

A kernel is checked against float64, then timed as a CUDA graph of many runs that go around among enough sets of inputs to
exceed the L2 cache. --sweep times configurations of the small-batch products instead, and prints the best of each shape.

Needs a CUDA device. May import `kvcache` and `workers`.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.cases import COUNTERS, DTYPE, SHAPES, Case, Operands, Product, all_cases
from benchmarks.kernels.experts import expert_cases
from benchmarks.kernels.lora import lora_cases
from benchmarks.kernels.reduced import reduced_cases
from benchmarks.shared.report import table
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import LEAST_TILE_TOKENS, MAX_TOKENS, STREAM_TOKENS, Tiling

BEYOND_L2_BYTES = 200_000_000
MAX_SETS = 64
RUNS_A_GRAPH = 64
ROUNDS = 7
COMPILERS = 14
Run = Callable[[], object]
Row = dict[str, str | float]


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


def measure(case: Case, bytes_us: float, flops_us: float) -> Iterator[Row]:
    sets = min(MAX_SETS, max(1, -(-BEYOND_L2_BYTES // case.bytes)))
    problems = [case.make() for _ in range(sets)]
    error = problems[0].error()
    limit = max(case.bytes / bytes_us, case.flops / flops_us)
    for name in problems[0].runs:
        row: Row = {"case": case.name, "by": name, "limit_us": limit}
        try:
            took = graph_us([problem.runs[name] for problem in problems]) / case.calls
            row |= {"us": took, "share": limit / took, "GB/s": case.bytes / took / 1000}
            row |= {"TFLOP/s": case.flops / took / 1e6} if case.flops else {}
            row |= {"error": error} if name == next(iter(problems[0].runs)) else {}
        except Exception as failure:  # one kernel's failure must not cost the others' figures
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        yield row


def show(row: Row) -> list[str]:
    if "failed" in row:
        return [str(row["case"]), str(row["by"]), str(row["failed"])]
    error = f"{row['error']:.1e}" if "error" in row else ""
    return [
        str(row["case"]), str(row["by"]), f"{row['us']:.2f}", f"{row['limit_us']:.2f}", f"{float(row['share']):.0%}",
        f"{row['GB/s']:.0f}", f"{row.get('TFLOP/s', 0):.1f}", error,
    ]  # fmt: skip


HEADERS = ["case", "by", "us", "limit", "share", "GB/s", "TFLOP/s", "error"]

Task = tuple[Product, int, bool, Tiling | None]


@lru_cache(maxsize=2)
def _empty(product: Product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def make(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=DTYPE)

    return make(MAX_TOKENS, product.k), make(product.rows, product.k), make(product.k), make(MAX_TOKENS, product.n)


def _compile(task: Task) -> str:
    """Runs once, in a process of its own, what this process will run: it finds the compiled kernel on disk."""
    product, tokens, pdl, config = task
    x, weight, norm, out = _empty(product)
    try:
        matvec(
            x[:tokens], weight, norm_weight=norm if product.norm else None, eps=1e-6, swiglu=product.swiglu, pdl=pdl,
            residual=out[:tokens] if product.residual else None, out=None if product.residual else out[:tokens],
            counters=COUNTERS, config=config,
        )  # fmt: skip
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{product.name} {product.n}x{product.k}, {tokens} tokens, {config}: {type(failure).__name__} {failure}"[:300]
    return ""


def _like(tokens: int, config: Tiling | None) -> int:
    """Another number of tokens that the same compiled kernel takes."""
    if config is None or tokens <= 2:
        return tokens
    return max(LEAST_TILE_TOKENS, 1 << (tokens - 1).bit_length()) if config.parts else STREAM_TOKENS


def compile_all(tasks: Iterable[Task]) -> None:
    tasks = {(product, _like(tokens, config), pdl, config) for product, tokens, pdl, config in tasks}
    ordered = sorted(tasks, key=lambda task: (task[0].n, task[0].k, task[0].name))
    start = time.perf_counter()
    processes = max(1, min(COMPILERS, (os.cpu_count() or 2) - 1, len(tasks)))
    with get_context("spawn").Pool(processes) as pool:
        for problem in filter(None, pool.imap_unordered(_compile, ordered, chunksize=4)):
            print("cannot compile", problem)
    print(f"{len(tasks)} kernels compiled in {time.perf_counter() - start:.1f} s", flush=True)


def products_of_cases(only: str) -> Iterator[Task]:
    for shape in SHAPES:
        for product in (*shape.products(), *shape.shards(2)):
            if not re.search(only, f"matvec layer {product.name} {shape.name}"):
                continue
            for tokens in (1, 2, 4, 8):
                for pdl in (False, True):
                    yield product, tokens, pdl, None


STREAMS = (
    Tiling(1, 1024, 4), Tiling(2, 512, 2), Tiling(2, 1024, 4), Tiling(4, 512, 2), Tiling(4, 512, 4), Tiling(4, 1024, 4),
    Tiling(8, 256, 1), Tiling(8, 512, 2), Tiling(8, 512, 4), Tiling(8, 1024, 4), Tiling(8, 1024, 8), Tiling(16, 512, 8),
    Tiling(4, 2048, 8), Tiling(2, 2048, 8), Tiling(4, 1024, 4, 3), Tiling(8, 1024, 4, 3), Tiling(8, 512, 4, 4),
    Tiling(16, 512, 4, 4),
)  # fmt: skip
ROWS, COLUMNS, WARPS, STAGES, PARTS = (16, 32, 64), (64, 128, 256, 512), (4, 8), (2, 3, 4, 6, 8), (1, 2, 4, 8)
SHARED_BYTES = 224 << 10  # of a multiprocessor's memory, for what its program keeps there
AHEAD_BYTES = 40 << 10  # of W that a program asks for at once, at least
PROGRAMS = range(96, 400)  # wanted of a product: enough to fill the device, and not too short
SWEPT = (1, 4, 8, 16, 32, 64)
BEST = 3


def candidates(product: Product, tokens: int) -> list[Tiling]:
    if tokens <= STREAM_TOKENS:
        return [config for config in STREAMS if product.k % config.columns == 0]
    return [tile for tile in (Tiling(*each) for each in itertools.product(ROWS, COLUMNS, WARPS, STAGES, PARTS))
            if _fits(product, tokens, tile)]  # fmt: skip


def _fits(product: Product, tokens: int, tile: Tiling) -> bool:
    """Whether it divides the product, fills the device, and has enough of W in flight in the memory that there is."""
    if product.k % (tile.columns * tile.parts) or -(-product.n // tile.rows) * tile.parts not in PROGRAMS:
        return False
    turns = product.k // tile.columns // tile.parts
    weight = 2 * tile.rows * tile.columns * (2 if product.swiglu else 1)
    x = 2 * max(LEAST_TILE_TOKENS, tokens) * tile.columns
    shared = tile.stages * weight + (tile.stages - (0 if product.norm else 1)) * x
    ahead = min(tile.stages - 1, turns) * weight
    wide = tile.rows * tile.columns >= 8192  # enough for eight warps
    return tile.stages <= turns + 1 and shared <= SHARED_BYTES and (
        ahead >= AHEAD_BYTES or tile.stages == turns + 1) and (tile.warps == 4 or wide)  # fmt: skip


def sweep(only: str, swept: Sequence[int], bytes_us: float) -> list[Row]:
    """The fastest configurations of each product, without PDL, and the same with it."""
    products = [(shape.name, product) for shape in SHAPES for product in shape.products()]
    products = [(name, product) for name, product in products if re.search(only, f"matvec {product.name} {name}")]
    compile_all((p, tokens, False, c) for _, p in products for tokens in swept for c in candidates(p, tokens))
    found: list[tuple[str, Product, int, list[tuple[float, Tiling]]]] = []
    for name, product in products:
        sets = max(1, -(-BEYOND_L2_BYTES // product.bytes(1)))
        for tokens in swept:
            operands = [Operands(product, tokens) for _ in range(sets)]
            times = []
            for config in candidates(product, tokens):
                with suppress(Exception):  # what does not fit into shared memory
                    times.append((_config_us(operands, False, config), config))
            times.sort(key=lambda pair: pair[0])
            found.append((name, product, tokens, times))
            library = graph_us([one.separate for one in operands], 32, 3)
            listed = ", ".join(f"{_short(config)} {us:.2f}" for us, config in times)
            print(f"{name} {product.name} {tokens}: cuBLAS, our norms {library:.2f}, {listed}", flush=True)
    compile_all((p, tokens, True, c) for _, p, tokens, times in found for _, c in times[:BEST])
    rows: list[Row] = []
    for name, product, tokens, times in found:
        sets = max(1, -(-BEYOND_L2_BYTES // product.bytes(1)))
        operands = [Operands(product, tokens) for _ in range(sets)]
        for us, config in times[:BEST]:
            case: Row = {"case": f"{product.name} {name} {tokens}", "limit_us": product.bytes(tokens) / bytes_us}
            for pdl, took in ((False, us), (True, _config_us(operands, True, config))):
                row = case | {"by": _short(config) + (" pdl" if pdl else ""), "us": took}
                row |= {"share": float(case["limit_us"]) / took, "GB/s": product.bytes(tokens) / took / 1000}
                rows.append(row | {"error": operands[0].error(pdl, config)})
    return rows


def _config_us(operands: list[Operands], pdl: bool, config: Tiling) -> float:
    return graph_us([partial(one.run, pdl, config) for one in operands], 32, 3)


def _short(config: Tiling) -> str:
    """rows x columns, warps, stages, parts"""
    return f"{config.rows}x{config.columns}w{config.warps}s{config.stages}p{config.parts}"


def invariance() -> None:
    """Whether a row's bits depend on how many rows there are, by the number of rows."""
    for shape in SHAPES:
        for product in shape.products()[:4]:
            operands = Operands(product, MAX_TOKENS)
            whole, x = operands.out.clone(), operands.x
            results = {}
            for tokens in range(1, MAX_TOKENS + 1):
                operands.x, operands.out = x[:tokens], whole[:tokens].clone()
                results[tokens] = operands.run()
            alike = [n for n, result in results.items() if torch.equal(result[0], results[1][0])]
            tiled = [n for n, result in results.items() if torch.equal(result[0], results[MAX_TOKENS][0])]
            print(f"{shape.name} {product.name}: row 0 as at 1 token: {alike}; as at {MAX_TOKENS}: {tiled}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as a list of objects")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases in whose name this is found")
    parser.add_argument("--sweep", action="store_true", help="configurations of the small-batch products")
    parser.add_argument("--tokens", type=int, nargs="+", default=SWEPT, help="of the sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    bytes_us, flops_us = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bytes_us / 1e6:.2f} TB/s, bf16 product {flops_us / 1e6:.0f} TFLOP/s")
    rows: list[Row] = [{"case": "ceilings", "by": "torch", "GB/s": bytes_us / 1000, "TFLOP/s": flops_us / 1e6}]
    with torch.inference_mode():
        if options.sweep:
            rows += sweep(options.only, options.tokens, bytes_us)
            print(table(HEADERS, [show(row) for row in rows[1:]]))
        else:
            rows += _all(options.only, bytes_us, flops_us)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _all(only: str, bytes_us: float, flops_us: float) -> list[Row]:
    cases = [case for case in (*all_cases(), *expert_cases(), *lora_cases(), *reduced_cases()) if re.search(only, case.name)]
    if any(case.name.startswith(("matvec", "layer")) for case in cases):
        compile_all(products_of_cases(only))
        invariance()
    rows: list[Row] = []
    for case in cases:
        try:
            rows += (measured := list(measure(case, bytes_us, flops_us)))
            for row in measured:
                print("  ".join(cell.ljust(24 if at < 2 else 9) for at, cell in enumerate(show(row))), flush=True)
        except Exception as failure:  # as above
            print(case.name, "failed:", f"{type(failure).__name__}: {failure}"[:500], flush=True)
    print(table(HEADERS, [show(row) for row in rows if "failed" not in row]))
    return rows


if __name__ == "__main__":
    main()
