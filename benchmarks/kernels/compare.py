"""Each GPU kernel against its limit: the bytes it must move or the operations it must do, at rates measured here first.

    python -m benchmarks.kernels [--json FILE] [--only NAME]

A kernel is checked against float64, then timed as a CUDA graph of many runs that go around among enough sets of inputs to
exceed the L2 cache. `benchmarks.kernels.sweep` compares tilings.

Needs a CUDA device. May import `kvcache` and `workers`.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.cases import DTYPE, SHAPES, Case, Operands, Product, all_cases, multiply
from benchmarks.kernels.experts import expert_cases
from benchmarks.kernels.lora import lora_cases
from benchmarks.kernels.measuring import BEYOND_L2_BYTES, COMPILERS, MAX_SETS, ceilings, graph_us
from benchmarks.kernels.reduced import reduced_cases
from benchmarks.shared.report import table
from workers.kernels.products.tilings import MAX_TOKENS

Row = dict[str, str | float]


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

Task = tuple[Product, int, bool]


@lru_cache(maxsize=2)
def _empty(product: Product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def make(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=DTYPE)

    return make(MAX_TOKENS, product.k), make(product.rows, product.k), make(product.k), make(MAX_TOKENS, product.n)


def _compile(task: Task) -> str:
    """Runs once, in a process of its own, what this process will run: it finds the compiled kernel on disk."""
    product, tokens, pdl = task
    x, weight, norm, out = _empty(product)
    try:
        multiply(product, x[:tokens], weight, norm, out[:tokens], pdl)
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{product.name} {product.n}x{product.k}, {tokens} tokens: {type(failure).__name__} {failure}"[:300]
    return ""


def compile_all(tasks: Iterable[Task]) -> None:
    tasks = set(tasks)
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
                    yield product, tokens, pdl


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
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    bytes_us, flops_us = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bytes_us / 1e6:.2f} TB/s, bf16 product {flops_us / 1e6:.0f} TFLOP/s")
    rows: list[Row] = [{"case": "ceilings", "by": "torch", "GB/s": bytes_us / 1000, "TFLOP/s": flops_us / 1e6}]
    with torch.inference_mode():
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
