"""Question 5: impact and trade-offs. Hit rate against time to first token and throughput, hashing against compute saved, memory
against recompute, block size against kernel speed, and whether fetching ahead and padding pay.

Replays, the real engine on a CPU, kernels on the chosen device. May import every room.
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.study.measured.replays import moves, pool_sweep, second_tier
from benchmarks.study.measured.token_costs import bookkeeping_ns, copy_us
from benchmarks.study.options import Options, Result, in_turns, machine, run_alone, spread

if TYPE_CHECKING:
    from benchmarks.kernels.attention import Case
    from benchmarks.shared.checkpoints import Shape
    from workers.attention.base import AttentionBackend

KERNEL_BLOCKS = (16, 32, 64, 128, 256)
KERNEL_CASES = ("decode 32 x 200", "decode 4 x 4,000", "chunk of 1,024")
KERNEL_SHAPE = "0.1B"


def kernels(options: Options) -> list[dict[str, Any]]:
    """By batch, backend and block size: ms a layer. All block sizes take turns; a backend that cannot have one is left out."""
    import torch

    from benchmarks.kernels.attention import CASES, Case
    from benchmarks.shared.checkpoints import SHAPES

    torch.set_num_threads(options.threads)
    shape = SHAPES[KERNEL_SHAPE]
    settle: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    rows: list[dict[str, Any]] = []
    cases = [case for case in CASES if case.name in KERNEL_CASES]
    if options.device == "cuda":
        cases += [Case("decode 64 x 8,000", 64, 1, 8000), Case("chunk of 2,048 after 6,144", 1, 2048, 8192)]
    for case in cases:
        named: dict[str, Callable[[], object]] = {}
        for block in KERNEL_BLOCKS:
            named |= {f"{name}|{block}": work for name, work in kernel_passes(case, shape, block, options.device).items()}
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        times = in_turns(named, options.rounds, settle=settle, clock=clock)
        for name, values in times.items():
            backend, _, page_text = name.partition("|")
            rows.append({
                "case": case.name, "backend": backend, "block": int(page_text), "ms": spread(values, 1e3 / shape.layers),
            })  # fmt: skip
    return rows


def kernel_passes(case: "Case", shape: "Shape", block: int, device: str) -> dict[str, Callable[[], object]]:
    """Backend -> one pass over all layers of the case, block-first. The CPU's compiled kernels; on a GPU flash and Triton."""
    import torch

    from benchmarks.kernels.attention import make_step
    from kvcache.layout import BlockLayout
    from kvcache.pool import KVPool
    from workers.attention.select import select_backend

    step = make_step(case, block, device)
    layout = BlockLayout(block, shape.layers, shape.kv_heads, shape.head_dim, "bfloat16")
    pool = KVPool(layout, step.block_tables.numel(), device)
    pool.data.normal_()
    tokens = case.sequences * case.queries
    query = torch.randn(tokens, shape.heads, shape.head_dim, device=device).to(pool.dtype)
    key, value = torch.randn(2, tokens, shape.kv_heads, shape.head_dim, device=device).to(pool.dtype)
    result: dict[str, Callable[[], object]] = {}
    for name in ("cpu",) if device == "cpu" else ("flash", "triton"):
        try:
            backend = select_backend(name, pool=pool, heads=shape.heads, native=True if name == "cpu" else None)
        except ValueError as error:
            print(f"{name} left out at blocks of {block}: {error}", file=sys.stderr)
            continue

        def work(backend: "AttentionBackend" = backend) -> None:
            plan = backend.plan(step)
            for layer in range(shape.layers):
                backend.attend(layer, query, key, value, step, plan)

        result[name] = work
    return result


def run(options: Options) -> Result:
    """On a GPU only what runs there: copies and kernels. quick: no model, no kernels."""
    result: Result = {"command": options.command(5), "machine": machine(options)}
    if options.device == "cpu":
        result |= {"sweep": pool_sweep(options), "tier": second_tier(options), "moves": moves(options)}
        result["token_ns"] = bookkeeping_ns(options)
    if options.quick:
        return result
    result |= {"copy_us": copy_us(options), "kernel_shape": KERNEL_SHAPE, "threads": options.threads}
    result["kernels"] = kernels(options)
    if options.device == "cpu":
        from benchmarks.study.measured.engine_runs import engine_runs

        result["engine"] = engine_runs(options)
    return result


if __name__ == "__main__":
    run_alone(run, 5, __doc__)
