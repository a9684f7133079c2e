"""Milliseconds per layer of every attention backend that runs here, for decodes and prefill chunks.

Each backend attends over a block-first pool and over pools of one layer each, where a block's keys and values lie alone: the
difference is what the block-first layout costs. Rounds are interleaved, so that a noisy machine is noisy to all alike.

    python -m benchmarks.kernels.attention --shape 0.6B --dtype bfloat16 --threads 2

On a GPU it reports the paged kernels by themselves instead (`paged.py`, `paged_chunks.py`), unless
--layouts asks for the above.

    python3 -m benchmarks.kernels.attention --json attention.json
    python3 -m benchmarks.kernels.attention --kernels decode --kv-dtype fp8

May import `kvcache` and `workers`.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.checkpoints import SHAPES, Shape
from benchmarks.shared.report import Spread, table
from kvcache.layout import FP8, BlockLayout
from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend
from workers.attention.select import select_backend
from workers.step import StepInput


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: so many sequences, each with so many new tokens at the end of so long a context."""

    name: str
    sequences: int
    queries: int
    context: int


CASES = (
    Case("decode 1 x 200", 1, 1, 200),
    Case("decode 32 x 200", 32, 1, 200),
    Case("decode 4 x 4,000", 4, 1, 4000),
    Case("chunk of 1,024", 1, 1024, 1024),
    Case("chunk of 256 after 768", 1, 256, 1024),
    Case("4 chunks of 64", 4, 64, 64),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result, ms per layer over the rounds."""

    case: str
    backend: str
    blocks: str  # "block-first" or "per layer"
    median_ms: float
    low_ms: float
    high_ms: float


def make_step(case: Case, block_size: int, device: str) -> StepInput:
    """Contexts differ a little, as in life; blocks are shuffled."""
    count = case.sequences
    contexts = np.array([case.context - i % 7 if case.queries == 1 else case.context for i in range(count)], np.int32)
    queries = np.full(count, case.queries, np.int32)
    blocks = -(-case.context // block_size)
    tables = np.random.default_rng(0).permutation(count * blocks).astype(np.int32).reshape(count, blocks)
    positions = np.concatenate([np.arange(c - case.queries, c) for c in contexts]).astype(np.int64)
    slots = tables[np.repeat(np.arange(count), queries), positions // block_size].astype(np.int64) * block_size
    step = StepInput(
        tokens=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots + positions % block_size),
        query_starts=torch.arange(0, (count + 1) * case.queries, case.queries, dtype=torch.int32),
        context_lens=torch.from_numpy(contexts),
        block_tables=torch.from_numpy(tables),
        sample_at=torch.zeros(0, dtype=torch.int64),
        decodes=count if case.queries == 1 else 0,
        host_query_lens=queries,
        host_context_lens=contexts,
        host_block_tables=tables,
    )
    names = ("tokens", "positions", "slots", "query_starts", "context_lens", "block_tables", "sample_at")
    return replace(step, **{name: getattr(step, name).to(device) for name in names})


CHOICES: dict[str, dict[str, tuple[str, bool | None]]] = {
    "cpu": {"cpu torch": ("cpu", False), "cpu compiled": ("cpu", True)},
    "cuda": {"flash": ("flash", None), "triton": ("triton", None)},
}
"""By device: the label of a backend -> its name and what to say of compiled CPU kernels."""


def passes(case: Case, shape: Shape, dtype: str, block_size: int, device: str) -> dict[tuple[str, str], Callable[[], None]]:
    """(backend, blocks) -> one pass over all layers of the step, plan included. Backends that cannot work are left out."""
    layout = BlockLayout(block_size, shape.layers, shape.kv_heads, shape.head_dim, dtype)
    step = make_step(case, block_size, device)
    whole = KVPool(layout, step.block_tables.numel(), device)
    single = [KVPool(replace(layout, layers=1), whole.blocks, device) for _ in range(shape.layers)]
    for pool in (whole, *single):
        pool.data.normal_()
    tokens = case.sequences * case.queries
    query = torch.randn(tokens, shape.heads, shape.head_dim, device=device).to(whole.dtype)
    key, value = torch.randn(2, tokens, shape.kv_heads, shape.head_dim, device=device).to(whole.dtype)

    def run(layers: list[tuple[AttentionBackend, int]]) -> None:
        plan = layers[0][0].plan(step)
        for backend, layer in layers:
            backend.attend(layer, query, key, value, step, plan)

    result: dict[tuple[str, str], Callable[[], None]] = {}
    for label, (name, native) in CHOICES[device].items():
        try:
            backend = select_backend(name, pool=whole, heads=shape.heads, native=native)
        except ValueError as error:
            print(f"{label} left out: {error}")
            continue
        each = [select_backend(name, pool=pool, heads=shape.heads, native=native) for pool in single]
        result[label, "block-first"] = partial(run, [(backend, layer) for layer in range(shape.layers)])
        result[label, "per layer"] = partial(run, [(backend, 0) for backend in each])
    return result


def measure(case: Case, shape: Shape, dtype: str, block_size: int, device: str, rounds: int) -> list[Row]:
    work = passes(case, shape, dtype, block_size, device)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):  # the first warms up
        for name, one_pass in work.items():
            begin = time.perf_counter()
            one_pass()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append((time.perf_counter() - begin) * 1e3 / shape.layers)
    spreads = {name: Spread.of(values) for name, values in times.items()}
    return [Row(case.name, *name, spread.median, spread.low, spread.high) for name, spread in spreads.items()]


def report_paged(parts: str, seconds: float, path: Path | None, kv: str | None) -> None:
    """parts: "decode", "chunk" or "both"; seconds for each. kv: dtype of pools, None: that of queries."""
    from benchmarks.kernels.paged import decode_report  # these import triton, which a CPU does not need
    from benchmarks.kernels.paged_chunks import chunk_report

    report = {}
    for name, make in (("decode", decode_report), ("chunk", chunk_report)):
        if parts in (name, "both"):
            report[name] = make(seconds, kv)
            if path:
                path.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layouts", action="store_true", help="on a GPU: compare block-first pools with pools of one layer")
    parser.add_argument("--kernels", choices=("decode", "chunk", "both"), default="both", help="on a GPU: which to report")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="on a GPU: of pools; auto: as queries")
    parser.add_argument("--seconds", type=float, default=60, help="on a GPU: of each kind; no case begins later")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not options.layouts:
        report_paged(options.kernels, options.seconds, options.json, FP8 if options.kv_dtype == "fp8" else None)
        return
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for case in CASES:
        shape = SHAPES[options.shape]
        rows += measure(case, shape, options.dtype, options.block_size, options.device, options.rounds)
    print(f"{options.shape}, {options.dtype}, blocks of {options.block_size}, {options.device}, {options.threads} threads")
    cells = [[r.case, r.backend, r.blocks, str(Spread(r.median_ms, r.low_ms, r.high_ms))] for r in rows]
    print(table(["batch", "backend", "blocks", "ms per layer"], cells))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**settings, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
