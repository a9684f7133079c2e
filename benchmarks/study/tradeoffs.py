"""Question 5: impact and trade-offs. Hit rate against time to first token and throughput, hashing against compute saved, memory
against recompute, page size against kernel speed, and whether fetching ahead and padding pay.

Replays, the real engine on a CPU, kernels on the chosen device. May import every room.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.study.options import Options, Result, in_turns, machine, run_alone, spread
from benchmarks.study.replays import pool_sweep, second_tier
from benchmarks.study.token_costs import bookkeeping_ns, copy_us

KERNEL_PAGES = (16, 32, 64, 128, 256)
KERNEL_CASES = ("decode 32 x 200", "decode 4 x 4,000", "chunk of 1,024")
KERNEL_SHAPE = "0.1B"


def kernels(options: Options) -> list[dict[str, Any]]:
    """By batch, backend and page size: ms a layer. All page sizes take turns; a backend that cannot have one is left out."""
    import torch

    from benchmarks.attention import CASES, passes
    from benchmarks.checkpoints import SHAPES

    torch.set_num_threads(options.threads)
    shape = SHAPES[KERNEL_SHAPE]
    settle: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    rows: list[dict[str, Any]] = []
    for case in (each for each in CASES if each.name in KERNEL_CASES):
        named: dict[str, Callable[[], object]] = {}
        for page in KERNEL_PAGES:
            for (backend, pages), work in passes(case, shape, "bfloat16", page, options.device).items():
                if pages == "page-first" and backend != "cpu torch":
                    named[f"{backend}|{page}"] = work
        times = in_turns(named, options.rounds, settle=settle)
        for name, values in times.items():
            backend, _, page_text = name.partition("|")
            rows.append({
                "case": case.name, "backend": backend, "page": int(page_text), "ms": spread(values, 1e3 / shape.layers),
            })  # fmt: skip
    return rows


def run(options: Options) -> Result:
    """On a GPU only what runs there: copies and kernels. quick: no model, no kernels."""
    result: Result = {"command": options.command(5), "machine": machine(options)}
    if options.device == "cpu":
        result |= {"sweep": pool_sweep(options), "tier": second_tier(options), "token_ns": bookkeeping_ns(options)}
    if options.quick:
        return result
    result |= {"copy_us": copy_us(options), "kernel_shape": KERNEL_SHAPE, "kernels": kernels(options)}
    if options.device == "cpu":
        from benchmarks.study.engine_runs import engine_runs

        result["engine"] = engine_runs(options)
    return result


if __name__ == "__main__":
    run_alone(run, __doc__)
